"""The reference's samples out of `generate`, from an official file loaded by the package's own code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from micro_diffusion.models.dit import DiTConfig
from micro_diffusion.models.model import LatentDiffusion
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.models.text_encoders import TextFeatures

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("batch_size", [3, 2])
def test_the_references_samples(batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with safe_open(DATA / "dit_small.safetensors", "pt") as file:
        tensors, settings = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    official = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    torch.save(official, tmp_path / "official.pt")
    monkeypatch.setitem(PRESETS, "fixture", lambda **settings_of_shapes: DiTConfig(**json.loads(settings["config"])))
    model = LatentDiffusion.from_checkpoint(str(tmp_path / "official.pt"), autoencoder="none", text_encoder="none")
    text = tensors["in.text"].squeeze(1)
    states = TextFeatures(text, torch.ones(text.shape[:2], dtype=torch.bool))
    # prompts are the numbers of the fixture's captions
    monkeypatch.setattr(model, "encode_prompts", lambda rows, mask: TextFeatures(*(each[rows] for each in states)))
    found = model.generate(
        tokenized_prompts=torch.arange(3),
        noise=tensors["in.latents"],
        num_inference_steps=int(settings["num_inference_steps"]),
        guidance_scale=float(settings["guidance_scale"]),
        batch_size=batch_size,
        return_only_latents=True,
    )
    wanted = tensors["out.sample"]
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
