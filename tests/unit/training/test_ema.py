from collections.abc import Callable

import torch

from micro_diffusion.models.dit import DiT
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.ema import Ema, follow


def constant(dit: DiT, value: float) -> DiT:
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.fill_(value)
    return dit


def values(dit: DiT) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in dit.parameters()])


def test_half_of_the_difference_remains_after_the_half_life(recipe: Recipe) -> None:
    dit = constant(DiT(recipe.stage_model(recipe.stages[0], downscale=8)), 0.0)
    ema = Ema(dit)
    constant(dit, 1.0)
    for step in range(1, 5):
        ema.update(dit, images=8, halflife=16)
        torch.testing.assert_close(values(ema.dit), torch.full_like(values(dit), 1 - 0.5 ** (step / 2)))
    assert not any(parameter.requires_grad for parameter in ema.dit.parameters())


def test_the_average_starts_past_its_start(one_stage: Callable[..., Recipe]) -> None:
    recipe = one_stage(ema_halflife_images=8, ema_start_images=16)
    dit, stage = DiT(recipe.stage_model(recipe.stages[0], downscale=8)), recipe.stages[0]
    ema = None
    for images, expected in ((8, None), (16, None), (24, 3.0), (32, 3.5)):
        ema = follow(ema, constant(dit, images / 8), stage, images=images)
        assert (ema is None) == (expected is None)
        if ema is not None and expected is not None:
            torch.testing.assert_close(values(ema.dit), torch.full_like(values(dit), expected))


def test_no_average_without_half_life(one_stage: Callable[..., Recipe]) -> None:
    recipe = one_stage()
    dit = DiT(recipe.stage_model(recipe.stages[0], downscale=8))
    assert follow(None, dit, recipe.stages[0], images=40) is None
