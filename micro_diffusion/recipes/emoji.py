"""Recipes for the embedded emoji: a first taste on two CPU cores, and the whole set on one GPU."""

from dataclasses import replace

from micro_diffusion.models.presets import PRESETS
from micro_diffusion.training.config import Recipe, Stage

TEXT_WIDTH = 384  # of the embedded text encoder


def quickstart() -> Recipe:
    """The paper's four stages in five minutes of two CPU cores, on a subset of 156 pictures.

    3 M parameters and 4 x 4 latent patches, so 4 tokens at 64 px and 16 at 128 px. At this size the model learns its
    pictures by heart: hence the high learning rate, and hardly any caption dropout.
    Command: micro-diffusion quickstart
    """
    first = Stage(
        name="64 px masked", resolution=64, images=64 * 300, batch_size=64, mask_ratio=0.5, learning_rate=2e-3,
        warmup_images=64 * 50, clip_norm=1.0, start="scratch",
    )  # fmt: skip
    second = Stage(
        name="64 px", resolution=64, images=64 * 100, batch_size=64, learning_rate=1e-3, clip_norm=1.0,
        start="all_but_schedule",
    )  # fmt: skip
    third = replace(first, name="128 px masked", resolution=128, start="weights", pos_interp_scale=2.0)
    fourth = replace(
        second, name="128 px", resolution=128, images=64 * 1300, learning_rate=2e-3, schedule="cosine",
        final_lr_ratio=0.01, pos_interp_scale=2.0, ema_halflife_images=64 * 50,
    )  # fmt: skip
    model = PRESETS["MicroDiT_Nano_4"](in_channels=4, caption_channels=TEXT_WIDTH, text_mask="padding")
    return Recipe(
        name="quickstart", model=model, stages=(first, second, third, fourth), caption_dropout=0.02, weight_decay=0.0,
        betas=(0.9, 0.99), log_every=64 * 20, checkpoint_every=64 * 500,
    )  # fmt: skip


def emoji() -> Recipe:
    """The whole training split on one GPU, alone or mixed with scenes.

    Most images are seen with three quarters of the patches masked, as in the paper; the last stage is short, since a
    longer one overfitted (docs/results.md).
    Command: micro-diffusion train emoji --store STORE --run RUN
    """
    batch = 2048
    first = Stage(
        name="64 px masked", resolution=64, images=batch * 900, batch_size=batch, mask_ratio=0.75,
        learning_rate=1.2e-3, warmup_images=batch * 200, start="scratch",
    )  # fmt: skip
    second = replace(first, name="64 px", images=batch * 200, mask_ratio=0.0, warmup_images=0, start="all_but_schedule")
    third = replace(
        first, name="128 px masked", resolution=128, images=batch * 8000, start="weights", pos_interp_scale=2.0,
        ema_halflife_images=batch * 200, ema_start_images=batch * 1000,
    )  # fmt: skip
    fourth = replace(
        third, name="128 px", images=batch * 1200, mask_ratio=0.0, warmup_images=0, schedule="cosine",
        final_lr_ratio=0.02, start="all_but_schedule", ema_start_images=0,
    )  # fmt: skip
    return Recipe(
        name="emoji", model=PRESETS["MicroDiT_Mini_2"](), stages=(first, second, third, fourth), text_length=32,
        precision="bf16", compile=True, log_every=batch * 25, checkpoint_every=batch * 1000,
        sample_every=batch * 1000, validate_every=batch * 250,
    )  # fmt: skip
