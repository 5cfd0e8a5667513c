"""The exported folder as a diffusers pipeline, against `LatentDiffusion` on the same checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from real_formats import tiny_preset, write_official, write_vae
from tiny_parts import TEXT_WIDTH, write_text_encoder
from torch import Tensor

from micro_diffusion.export.formats import export
from micro_diffusion.export.pipeline import MicroDiffusionPipeline
from micro_diffusion.models.checkpoints import read_checkpoint
from micro_diffusion.models.model import LatentDiffusion
from micro_diffusion.models.presets import PRESETS

PROMPTS = ["a red apple", "a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder whose encoders are local folders."""
    place = tmp_path_factory.mktemp("export")
    write_official(place / "dit.pt", tiny_preset(caption_channels=TEXT_WIDTH))
    write_vae(place / "vae")
    write_text_encoder(place / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", tiny_preset)
        parts = {"autoencoder": str(place / "vae"), "text_encoder": str(place / "text")}
        export(str(place / "dit.pt"), place / "pipeline", to="diffusers", **parts)
    return place / "pipeline"


@pytest.fixture
def pipeline(folder: Path) -> MicroDiffusionPipeline:
    made = MicroDiffusionPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def noise(count: int) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def test_draws_what_the_checkpoint_draws(folder: Path, pipeline: MicroDiffusionPipeline) -> None:
    model = LatentDiffusion.from_checkpoint(str(folder))
    settings = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "guidance_interval": (0.1, 50.0),
        "sampler": "dpmpp_2m",
    }
    wanted = model.generate(PROMPTS, negative_prompt="a green cat", noise=noise(2), **settings)
    found = pipeline(PROMPTS, "a green cat", latents=noise(2), output_type="pt", **settings).images
    assert torch.equal(found, wanted)
    assert isinstance(pipeline, DiffusionPipeline)


def test_outputs(pipeline: MicroDiffusionPipeline) -> None:
    def draw(output_type: str) -> object:
        return pipeline("a cat", num_inference_steps=2, latents=noise(1), output_type=output_type).images

    pt, array, (picture,), latent = draw("pt"), draw("np"), draw("pil"), draw("latent")
    assert isinstance(pt, Tensor) and pt.shape == (1, 3, 64, 64)
    assert isinstance(array, np.ndarray) and np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert isinstance(picture, Image.Image) and np.abs(np.asarray(picture) / 255 - array[0]).max() < 0.003
    assert isinstance(latent, Tensor) and latent.shape == (1, 4, 8, 8)
    tuple_of_one = pipeline("a cat", num_inference_steps=1, output_type="latent", return_dict=False)
    assert isinstance(tuple_of_one, tuple) and tuple_of_one[0].shape == (1, 4, 8, 8)
    for settings in ({"output_type": "jpeg"}, {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}):
        with pytest.raises(ValueError, match="jpeg|callbacks"):
            pipeline("a cat", **settings)


def test_generators_and_pictures_of_a_prompt(pipeline: MicroDiffusionPipeline) -> None:
    def draw(prompts: list[str], seeds: list[int] | int, count: int = 1, negative: list[str] | None = None) -> Tensor:
        generator = (
            torch.Generator().manual_seed(seeds)
            if isinstance(seeds, int)
            else [torch.Generator().manual_seed(seed) for seed in seeds]
        )
        return pipeline(
            prompts, negative, generator=generator, num_images_per_prompt=count, num_inference_steps=2,
            output_type="latent",
        ).images  # fmt: skip

    assert torch.equal(draw(PROMPTS, 5), draw(PROMPTS, 5)) and not torch.equal(draw(PROMPTS, 5), draw(PROMPTS, 6))
    four = draw(PROMPTS, [1, 2, 3, 4], count=2, negative=["a red cat", "a green apple"])
    assert len(four) == 4
    for i, wanted in (
        (1, draw(PROMPTS[:1], [2], negative=["a red cat"])),
        (2, draw(PROMPTS[1:], [3], negative=["a green apple"])),
    ):
        assert (four[i] - wanted[0]).norm() < 1e-3 * wanted.norm()


def test_callbacks_see_and_change_each_step(pipeline: MicroDiffusionPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def stop_noise(pipe: object, step: int, level: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipe is pipeline
        seen.append((step, round(level, 3)))
        return {"latents": torch.ones_like(tensors["latents"])} if step == 2 else {}

    out = pipeline("a cat", num_inference_steps=3, callback_on_step_end=stop_noise, output_type="latent").images
    assert seen[0] == (0, 80.0) and seen[2] == (2, 0.002) and len(seen) == 3
    assert torch.equal(out, torch.ones(1, 4, 8, 8))


def test_bfloat16_is_near(folder: Path, pipeline: MicroDiffusionPipeline) -> None:
    half = MicroDiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert next(half.transformer.parameters()).dtype == torch.bfloat16
    found, wanted = (
        each("a cat", num_inference_steps=2, latents=noise(1), guidance_scale=1.5, output_type="latent").images
        for each in (half, pipeline)
    )
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()


def test_saved_by_diffusers_it_is_still_a_checkpoint(
    folder: Path, pipeline: MicroDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path)
    (weights, card), (wanted, same) = read_checkpoint(str(tmp_path)), read_checkpoint(str(folder))
    assert card == same and all(torch.equal(weights[name], wanted[name]) for name in wanted)
    ours, theirs = (json.loads((each / "model_index.json").read_text()) for each in (folder, tmp_path))
    assert ours["transformer"] == theirs["transformer"] and ours["_class_name"] == theirs["_class_name"]
    readme = (folder / "README.md").read_text()
    assert "library_name: diffusers" in readme and "from_pretrained" in readme and card.text_encoder.name in readme
