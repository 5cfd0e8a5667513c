"""What the log says of speed, cost and noise levels, against sums made by hand."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from micro_diffusion.models.flops import forward_flops
from micro_diffusion.runtime.hardware import GPUS
from micro_diffusion.training import meter as module
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.meter import Meter
from micro_diffusion.training.optim import Step
from micro_diffusion.training.stages import State, first_state

CPU = torch.device("cpu")
STEP = Step(torch.tensor(1.0), torch.tensor(True))


def at(recipe: Recipe, images: int, *, stage: int = 0) -> State:
    state = first_state(recipe, downscale=8, device=CPU)
    state.images, state.stage = images, stage
    return state


def cost(recipe: Recipe, resolution: int, mask_ratio: float) -> int:
    stage = next(stage for stage in recipe.stages if stage.resolution == resolution)
    model = recipe.stage_model(stage, downscale=8)
    return 3 * forward_flops(model, mask_ratio=mask_ratio, text_length=16)


def test_flops_follow_stages_and_mask_schedules(recipe: Recipe) -> None:
    first = replace(recipe.stages[0], mask_schedule=((16, 0.25),))
    recipe = replace(recipe, stages=(first, *recipe.stages[1:]))
    meter = Meter(recipe, downscale=8, device=CPU)
    small = [cost(recipe, 64, ratio) for ratio in (0.5, 0.25, 0.0)]
    large = [cost(recipe, 128, ratio) for ratio in (0.5, 0.0)]
    assert small[0] < small[1] < small[2]
    assert meter.flops(0, 16) == 16 * small[0]
    assert meter.flops(8, 32) == 8 * small[0] + 16 * small[1]
    assert meter.flops(0, 160) == 16 * small[0] + 24 * small[1] + 40 * (small[2] + large[0] + large[1])
    assert meter.flops(160, 160) == 0


def test_time_left_and_utilisation(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds for the sixteen images behind image 32: of the 40 unmasked ones of stage 2, 8 were among them."""
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(module, "gpu_of", lambda device: GPUS["h100"])
    meter = Meter(recipe, downscale=8, device=CPU)
    for _ in range(2):
        meter.add(torch.tensor(0.5), STEP, images=8)
    now = 102.0
    row = meter.row(at(recipe, 48, stage=1), 1e-3)
    speed = 8 * (cost(recipe, 64, 0.5) + cost(recipe, 64, 0.0)) / 2.0
    left = 32 * cost(recipe, 64, 0.0) + 40 * (cost(recipe, 128, 0.5) + cost(recipe, 128, 0.0))
    assert row["images_per_second"] == pytest.approx(8.0)
    assert row["utilisation"] == pytest.approx(speed / 494.7e12)
    assert row["seconds_left"] == pytest.approx(left / speed)
    assert row["loss"] == 0.5


def test_no_utilisation_of_an_unknown_device(recipe: Recipe) -> None:
    meter = Meter(recipe, downscale=8, device=CPU)
    meter.add(torch.tensor(0.5), STEP, images=8)
    assert meter.row(at(recipe, 8), 1e-3)["utilisation"] is None


def test_losses_by_noise_level(recipe: Recipe) -> None:
    meter = Meter(recipe, downscale=8, device=CPU)
    edges = torch.special.ndtri(torch.arange(1, 8) / 8)
    normals = torch.cat([edges - 0.01, edges[-1:] + 0.01, torch.tensor([-9.0, 9.0])])  # the last two: far tails
    losses = torch.cat([torch.arange(8.0), torch.tensor([10.0, 17.0])])
    for part in (slice(0, 4), slice(4, None)):
        meter.add_levels(normals[part], losses[part])
    meter.add(torch.tensor(0.5), STEP, images=8)
    row = meter.row(at(recipe, 8), 1e-3)
    assert [row[f"loss/level_{i}"] for i in range(8)] == [5.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 12.0]


def test_a_level_without_images_or_with_a_bad_loss_only_is_none(recipe: Recipe) -> None:
    meter = Meter(recipe, downscale=8, device=CPU)
    meter.add_levels(torch.tensor([-2.0, 0.1, 2.0]), torch.tensor([1.0, torch.nan, torch.inf]))
    meter.add(torch.tensor(0.5), STEP, images=8)
    row = meter.row(at(recipe, 8), 1e-3)
    assert [row[f"loss/level_{i}"] for i in range(8)] == [1.0] + [None] * 7


def test_levels_are_equally_likely_and_their_mean_is_the_loss(recipe: Recipe) -> None:
    meter = Meter(recipe, downscale=8, device=CPU)
    normals = torch.randn(8000, generator=torch.Generator().manual_seed(0))
    meter.add_levels(normals, normals.square())
    counts = meter.levels[:, 1]
    assert counts.sum() == 8000
    assert (counts - 1000).abs().max() < 5 * 1000**0.5
    assert meter.levels[:, 0].sum().item() / 8000 == pytest.approx(normals.square().mean().item(), rel=1e-4)


def test_a_restarted_meter_has_forgotten(one_stage: Callable[..., Recipe]) -> None:
    meter = Meter(one_stage(), downscale=8, device=CPU)
    meter.add_levels(torch.zeros(2), torch.ones(2))
    meter.add(torch.tensor(0.5), STEP, images=8)
    meter.restart()
    assert not meter.levels.any() and not meter.sums.any() and meter.images == 0
