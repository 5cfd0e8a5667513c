"""Recipes of the paper's four released models ("Stretching Each Dollar", arXiv 2407.15811).

Hardware: 8 H100, bf16. Cost as the paper reports it: 2.6 days, 1,890 dollars at 30 dollars an hour, 3.45e20 FLOP.
Data sets and encoders are prepared as in docs/data.md; every number stands in docs/paper.md.
"""

import math
from dataclasses import replace

from micro_diffusion.models.checkpoints import OSTRIS, SDXL
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.models.text_encoders import DFN5B
from micro_diffusion.training.config import Recipe, Stage

BATCH = 2048


def paper_37m() -> Recipe:
    """22 M real and 15 M synthetic images: FID-30K on COCO 12.66, GenEval 0.46.

    Stores: CC12M, SA1B, TextCaps, JourneyDB and DiffusionDB at 256 px; at 512 px SA1B, TextCaps, JourneyDB and CC12M's
    pictures of 512 px and more. A stage is fed by the stores that hold its resolution. The averages of the weights are
    those that the paper's configuration lists and its script ignored. Half a learning rate for experts is left out: the
    paper intends it, its script never applied it.
    Command: torchrun --nproc-per-node 8 -m -- micro_diffusion train paper-37m --run RUN --store STORE --store ...
    """
    first = Stage(
        name="256 px masked", resolution=256, images=250_000 * BATCH, batch_size=BATCH, micro_batch=256,
        mask_ratio=0.75, learning_rate=2.4e-4, warmup_images=2_500 * BATCH, schedule="cosine", final_lr_ratio=0.33,
        clip_norm=0.25, p_mean=-0.6, p_std=1.2, start="scratch",
    )  # fmt: skip
    second = Stage(
        name="256 px", resolution=256, images=30_000 * BATCH, batch_size=BATCH, micro_batch=64,
        learning_rate=8e-5, clip_norm=0.25, p_mean=-0.6, p_std=1.2, start="all_but_schedule",
    )  # fmt: skip
    third = Stage(
        name="512 px masked", resolution=512, images=50_000 * BATCH, batch_size=BATCH, micro_batch=32,
        mask_ratio=0.75, learning_rate=8e-5, warmup_images=500 * BATCH, clip_norm=0.5, p_mean=0.0, p_std=0.6,
        start="weights", pos_interp_scale=2.0, ema_halflife_images=halflife(0.99975), ema_start_images=25_000 * BATCH,
    )  # fmt: skip
    fourth = replace(
        third, name="512 px", images=5_000 * BATCH, micro_batch=16, mask_ratio=0.0, warmup_images=0,
        start="all_but_schedule", ema_halflife_images=halflife(0.9975), ema_start_images=1_000 * BATCH,
    )  # fmt: skip
    return Recipe(
        name="paper-37m", model=PRESETS["MicroDiT_XL_2"](), stages=(first, second, third, fourth),
        sigma_data=0.9, caption_dropout=0.1, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8, seed=18,
        autoencoder=SDXL, text_encoder=DFN5B, text_length=77, precision="bf16", compile=True,
        log_every=50 * BATCH, checkpoint_every=1_000 * BATCH, sample_every=2_500 * BATCH, validate_every=2_500 * BATCH,
    )  # fmt: skip


def paper_22m() -> Recipe:
    """The real images alone, CC12M, SA1B and TextCaps: FID-30K on COCO 12.72, GenEval 0.46; cost as `paper_37m`.

    Command: torchrun --nproc-per-node 8 -m -- micro_diffusion train paper-22m --run RUN --store STORE --store ...
    """
    return replace(paper_37m(), name="paper-22m")


def paper_37m_16_channels() -> Recipe:
    """Latents of 16 channels from Ostris's autoencoder: FID-30K on COCO 13.04, GenEval 0.40; cost as `paper_37m`.

    Command: torchrun --nproc-per-node 8 -m -- micro_diffusion train paper-37m-16-channels --run RUN --store STORE ...
    """
    model = PRESETS["MicroDiT_XL_2"](in_channels=16)
    return replace(paper_37m(), name="paper-37m-16-channels", model=model, autoencoder=OSTRIS)


def paper_synthetic() -> Recipe:
    """490 M synthetic images: FID-30K on COCO 13.26, GenEval 0.52; stages as in `paper_37m`, cost not reported.

    Command: torchrun --nproc-per-node 8 -m -- micro_diffusion train paper-synthetic --run RUN --store STORE ...
    """
    return replace(paper_37m(), name="paper-synthetic")


def halflife(decay: float) -> int:
    """Half-life in images of an average that keeps `decay` of itself in each step of `BATCH` images."""
    return round(BATCH * math.log(0.5) / math.log(decay))
