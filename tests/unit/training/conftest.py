from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from micro_diffusion.data.loader import Batch, Loader
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.training.config import Recipe, Stage

WIDTH, DOWNSCALE = 12, 8


class FakeLoader(Loader):
    """Twenty rows of random latents; captions of one to four tokens."""

    def __init__(self, resolution: int) -> None:
        generator = torch.Generator().manual_seed(resolution)
        self.latents = torch.randn(20, 4, resolution // DOWNSCALE, resolution // DOWNSCALE, generator=generator)
        self.text = torch.randn(20, 4, WIDTH, generator=generator)
        self.mask = torch.arange(4) <= torch.arange(20)[:, None] % 4

    def __len__(self) -> int:
        return 20

    def rows(self, indices: Sequence[int]) -> Batch:
        rows = torch.tensor(indices)
        text = torch.where(self.mask[rows, :, None], self.text[rows], 0)
        return Batch(self.latents[rows], text, self.mask[rows], tuple(map(str, indices)))

    def batch(self, start: int, count: int) -> Batch:
        return self.rows([position * 7 % 20 for position in range(start, start + count)])

    def batches(
        self, start: int, stop: int, batch_size: int, *, rank: int = 0, world: int = 1, prefetch: int = 2
    ) -> Iterator[Batch]:
        for position in range(start, stop, batch_size):
            yield self.batch(position, min(batch_size, stop - position))


@pytest.fixture
def loaders() -> dict[int, Loader]:
    return {64: FakeLoader(64), 128: FakeLoader(128)}


@pytest.fixture
def recipe() -> Recipe:
    """Four stages of five steps of eight images, with everything switched on."""
    model = PRESETS["MicroDiT_Nano_4"](in_channels=4, caption_channels=WIDTH, text_mask="padding")
    model = replace(
        model, dim=32, depth=2, head_dim=16, multiple_of=16, patch_mixer_dim=32, patch_mixer_depth=1,
        qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 4.0),
    )  # fmt: skip
    stage = Stage(
        name="1", resolution=64, images=40, batch_size=8, learning_rate=1e-2, warmup_images=16, mask_ratio=0.5,
        clip_norm=1.0, start="scratch",
    )  # fmt: skip
    second = replace(stage, name="2", mask_ratio=0.0, warmup_images=0, start="all_but_schedule")
    third = replace(stage, name="3", resolution=128, pos_interp_scale=2.0, start="weights", ema_halflife_images=16)
    fourth = replace(
        third,
        name="4",
        mask_ratio=0.0,
        warmup_images=0,
        schedule="cosine",
        final_lr_ratio=0.1,
        start="all_but_schedule",
    )
    return Recipe(
        name="tiny", model=model, stages=(stage, second, third, fourth), log_every=8, checkpoint_every=24, seed=3
    )


@pytest.fixture
def one_stage(recipe: Recipe) -> Callable[..., Recipe]:
    """The recipe's first stage alone, changed as asked."""

    def make(**changes: object) -> Recipe:
        return replace(recipe, stages=(replace(recipe.stages[0], **changes),))  # type: ignore[arg-type]

    return make
