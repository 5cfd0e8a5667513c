"""OpenCLIP's text towers. A published file holds the vision tower too: the text tower is cut out once and cached."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from micro_diffusion.models.pretrained import cache_folder, first_line, load_tensors, optional_package, part_folder
from micro_diffusion.runtime.files import UserError, atomic_file, sha256

PREFIX = "openclip:"
CONFIG = "open_clip_config.json"
FILES = (CONFIG, "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model")
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TEXT_KEYS = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "cls_emb")


class OpenClipTokenizer:
    """OpenCLIP's tokenizer with the mask that it does not give: True up to the end-of-text token."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def tokenize(self, captions: Sequence[str] | str) -> dict[str, Int[Tensor, "b l"]]:
        """`input_ids`, padded to the context's length, and `attention_mask`."""
        ids: Tensor = self.library(captions if isinstance(captions, str) else list(captions))
        # the end-of-text token has the highest number: OpenCLIP's own pooling looks for it in this way
        mask = torch.arange(ids.shape[1]) <= ids.argmax(1, keepdim=True)
        return {"input_ids": ids, "attention_mask": mask.long()}


def load_text_tower(name: str) -> tuple[Any, OpenClipTokenizer, str]:
    """The text tower of `hf-hub:NAME` or of a folder in OpenCLIP's hub format, its tokenizer and the tower's sha256.

    It is in float32 and returns (pooled, all positions after the final LayerNorm); the vision tower is never built.
    """
    open_clip = optional_package("open_clip")
    folder = part_folder(name.removeprefix("hf-hub:"), FILES, weights=[[file] for file in WEIGHTS])
    weights = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if weights is None or not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no OpenCLIP folder: it needs {CONFIG} and {WEIGHTS[0]} or {WEIGHTS[1]}.")
    tower_file = _cut_out(weights)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
        text = config["text_cfg"]
        if text.get("hf_model_name"):
            raise UserError(f"{folder} has a transformers text tower ({text['hf_model_name']}): load that by its name.")
        with torch.device("meta"):  # no time spent on initial weights
            # this private function is what OpenCLIP's own models build their text tower with
            tower = text | {"output_tokens": True, "proj_type": "none"}
            model = open_clip.model._build_text_tower(config["embed_dim"], tower, config.get("quick_gelu", False))
        model.load_state_dict(load_file(tower_file), assign=True)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise UserError(f"The text tower in {folder} does not load ({first_line(error)}).") from error
    if model.attn_mask is not None:
        model.attn_mask = model.build_causal_mask()  # not in the file, so still without values
    return model, OpenClipTokenizer(tokenizer), sha256(tower_file)


def _cut_out(weights: Path) -> Path:
    """The text tower of a weights file as a file of its own, made at the first call."""
    state = weights.stat()
    key = hashlib.sha256(f"{weights.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
    cached = cache_folder() / f"openclip-text-{key}.safetensors"
    if cached.is_file():
        return cached
    named = ((name.removeprefix("text."), tensor) for name, tensor in load_tensors(weights).items())
    tower = {name: tensor.float().contiguous() for name, tensor in named if name.startswith(TEXT_KEYS)}
    cached.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(cached, shared=True) as temporary:
        save_file(tower, temporary, metadata={"format": "pt"})
    return cached
