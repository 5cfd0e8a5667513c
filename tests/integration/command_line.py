"""What tests of the command line share: pictures, a tiny autoencoder with random weights, a tiny recipe, processes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from micro_diffusion.models.presets import PRESETS
from micro_diffusion.training.config import Recipe, Stage

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black")
SHAPES = {"circle": "ellipse", "square": "rectangle"}


def make_pictures(folder: Path, count: int) -> None:
    """Coloured shapes as PNG and JPEG of several sizes, each with its caption in name.txt."""
    for i in range(count):
        colour, shape = COLOURS[i % len(COLOURS)], list(SHAPES)[i % 2]
        width, height = 64 + i % 5, 64 + i % 3
        picture = Image.new("RGB", (width, height), "white")
        corner = 4 + i % 16
        getattr(ImageDraw.Draw(picture), SHAPES[shape])((corner, corner, corner + 40, corner + 40), fill=colour)
        place = folder / f"{i // 1000:03d}"
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{i:06d}.{'png' if i % 2 else 'jpg'}")
        (place / f"{i:06d}.txt").write_text(f"a {colour} {shape}")


def make_autoencoder(folder: Path, *, seed: int = 0) -> None:
    """Eight times down to four channels, with random weights, in diffusers format."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    ).save_pretrained(folder)


def tiny_recipe(autoencoder: Path) -> Recipe:
    """Two stages, 32 px masked and 64 px, of a model with a few thousand parameters."""
    model = replace(
        PRESETS["MicroDiT_Nano_4"](text_mask="padding"),
        patch_size=2, dim=32, head_dim=16, depth=2, qkv_multipliers=(1.0, 1.0), ffn_multipliers=(1.0, 1.0),
        multiple_of=16, num_experts=2, patch_mixer_dim=32, patch_mixer_depth=1,
    )  # fmt: skip
    first = Stage(
        name="32 px masked", resolution=32, images=240, batch_size=8, learning_rate=2e-3, warmup_images=16,
        mask_ratio=0.5, start="scratch",
    )  # fmt: skip
    second = Stage(
        name="64 px", resolution=64, images=240, batch_size=8, learning_rate=1e-3, start="weights",
        pos_interp_scale=2.0, ema_halflife_images=32,
    )  # fmt: skip
    return Recipe(
        name="tiny", model=model, stages=(first, second), autoencoder=str(autoencoder),
        log_every=8, checkpoint_every=48, sample_every=240, validate_every=160,
    )  # fmt: skip


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """The command line in a process of its own, without network."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "micro_diffusion", *map(str, arguments)],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*arguments: str | Path, code: int = 0, seconds: float = 600) -> str:
    """Run to the end, check the exit code, return what was printed."""
    process = start(*arguments)
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, err
    return out + err
