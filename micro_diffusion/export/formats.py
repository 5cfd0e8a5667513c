"""A checkpoint in another format: model folder, diffusers pipeline, official .pt. Tensors keep their bits."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from micro_diffusion.models import checkpoints
from micro_diffusion.runtime.files import UserError, atomic_file, atomic_folder, write_atomic
from micro_diffusion.runtime.parse import choose

Weights = Mapping[str, Tensor]


def export(
    name: str, out: Path, *, to: str, autoencoder: str | None = None, text_encoder: str | None = None
) -> checkpoints.ModelCard:
    """Write the checkpoint that `read_checkpoint` finds to `out`, in one of `FORMATS`; returns its card."""
    write = choose(FORMATS, to, "format")
    for path in (out, *([out.with_suffix(".json")] if to == "official" else [])):
        if path.exists():
            raise UserError(f"{path} is there already; remove it, or choose another --out.")
    weights, card = checkpoints.read_checkpoint(name, autoencoder=autoencoder, text_encoder=text_encoder)
    dit = checkpoints.build(weights, card, where=name)  # checks that they fit
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, {name: weights[name].contiguous() for name in dit.state_dict()}, card=card)
    return card


def write_official(out: Path, weights: Weights, *, card: checkpoints.ModelCard) -> None:
    """A flat state dict, as the paper's files are, and beside it a .json with what the file cannot say."""
    write_atomic(out.with_suffix(".json"), card.to_json())
    with atomic_file(out) as temporary:
        torch.save(dict(weights), temporary)


def write_diffusers(out: Path, weights: Weights, *, card: checkpoints.ModelCard) -> None:
    """A folder that `MicroDiffusionPipeline.from_pretrained` opens: the transformer, and the names of its encoders.

    The encoders are not copied: their licences are their own, and `pipeline.vae` and `text_encoder` load them by name.
    """
    library = "micro_diffusion.export.pipeline"
    index = {"_class_name": "MicroDiffusionPipeline", "transformer": [library, "MicroDiTModel"]}
    config = {"_class_name": "MicroDiTModel", "card": json.loads(card.to_json())}
    with atomic_folder(out) as temporary:
        (temporary / "transformer").mkdir()
        tensors = {f"dit.{name}": tensor for name, tensor in weights.items()}
        save_file(tensors, temporary / checkpoints.PIPELINE_WEIGHTS, metadata={"format": "pt"})
        (temporary / checkpoints.PIPELINE_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        mode = (temporary / checkpoints.PIPELINE_CONFIG).stat().st_mode
        (temporary / checkpoints.PIPELINE_WEIGHTS).chmod(mode)  # safetensors lets its owner alone read
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        (temporary / "README.md").write_text(model_card(card, parameters=sum(t.numel() for t in weights.values())))


FORMATS: dict[str, Callable[..., None]] = {
    "safetensors": checkpoints.write_folder,
    "diffusers": write_diffusers,
    "official": write_official,
}


def model_card(card: checkpoints.ModelCard, *, parameters: int) -> str:
    """README.md of a pipeline folder."""
    height, width = card.dit.latent_size
    seen = f"{card.images_seen:,} images seen in training" if card.images_seen else "trained elsewhere"
    return f"""---
pipeline_tag: text-to-image
library_name: diffusers
tags: [micro-diffusion]
---

# {card.recipe}

A text-to-image diffusion transformer (MicroDiT, arXiv 2407.15811): {parameters / 1e6:,.0f} M parameters, latents of
{height} x {width} x {card.dit.in_channels}, {type(card.objective).__name__} objective, {seen}.

    from micro_diffusion.export.pipeline import MicroDiffusionPipeline
    pipeline = MicroDiffusionPipeline.from_pretrained("FOLDER").to("cuda")
    pipeline("An elegant squirrel pirate on a ship", guidance_scale=5.0).images[0].save("squirrel.png")

The autoencoder ({card.autoencoder.name}) and the text encoder ({card.text_encoder.name}) are
loaded by name at their first use and not part of this folder; each has a licence of its own.
"""
