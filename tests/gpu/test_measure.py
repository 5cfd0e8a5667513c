"""The planner's measurement on a GPU: compiled, timed by events."""

import pytest
import torch

from micro_diffusion.models.presets import PRESETS
from micro_diffusion.planning.cost import Work
from micro_diffusion.planning.measure import measure
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.optim import guarded_step, make_optimizer

pytestmark = pytest.mark.gpu


def test_speeds_are_those_of_this_gpu() -> None:
    config = PRESETS["MicroDiT_Small_2"](text_mask="none")
    work = Work("256 px", config, ((2048, 0.75),), 256, 16, "bf16", True)
    recipe = Recipe(
        "measured", config, (Stage("256 px", resolution=256, images=2048, batch_size=256, learning_rate=1e-4),)
    )

    def optimizer(dit: torch.nn.Module) -> object:
        made, loss = make_optimizer(dit, recipe), torch.zeros((), device="cuda")
        return lambda: guarded_step(made, loss, lr=1e-4, clip_norm=1.0)

    flops, step = measure(work, 0.75, torch.device("cuda"), optimizer)
    assert 1e12 < flops < 2.5e15  # between a laptop's GPU and the peak of any
    assert 1e-12 < step < 1e-9  # seconds for a parameter: 32 bytes of it at 32 TB/s, and at 32 GB/s
