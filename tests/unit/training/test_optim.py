import math
from collections.abc import Callable

import pytest
import torch

from micro_diffusion.training.config import Recipe
from micro_diffusion.training.optim import guarded_step, learning_rate, make_optimizer


def test_warmup_then_constant(one_stage: Callable[..., Recipe]) -> None:
    stage = one_stage(learning_rate=2.0, warmup_images=16).stages[0]
    assert [learning_rate(stage, images) for images in (4, 8, 16, 24, 40)] == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_cosine(one_stage: Callable[..., Recipe]) -> None:
    stage = one_stage(learning_rate=2.0, warmup_images=8, schedule="cosine", final_lr_ratio=0.25).stages[0]
    assert learning_rate(stage, 8) == 2.0
    assert learning_rate(stage, 24) == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert learning_rate(stage, 16) == pytest.approx(2.0 * (0.25 + 0.75 * (1 + math.cos(math.pi / 4)) / 2))
    assert learning_rate(stage, 40) == pytest.approx(0.5)


def test_step_is_clipped_adamw(recipe: Recipe) -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    plain = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    optimizer = make_optimizer(parameters, recipe)
    expected = torch.optim.AdamW(plain, lr=0.1, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay)
    for size in (0.01, 100.0, 1.0):
        for ours, theirs in zip(parameters, plain, strict=True):
            ours.grad = size * torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        step = guarded_step(optimizer, torch.tensor(1.0), lr=0.1, clip_norm=0.5)
        norm = torch.nn.utils.clip_grad_norm_(plain, 0.5)
        expected.step()
        assert step.taken
        torch.testing.assert_close(step.grad_norm, norm)
        for ours, theirs in zip(parameters, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
            assert ours.grad is None


@pytest.mark.parametrize(
    ("bad_loss", "bad_gradient"), [(math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_a_bad_batch_changes_nothing(recipe: Recipe, bad_loss: float, bad_gradient: float) -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = make_optimizer([parameter], recipe)

    def step(loss: float, gradient: float) -> bool:
        parameter.grad = torch.tensor([1.0, 2.0, 3.0, gradient])
        return bool(guarded_step(optimizer, torch.tensor(loss), lr=0.1, clip_norm=1.0).taken)

    def everything() -> list[torch.Tensor]:
        return [parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values())]

    assert step(1.0, 4.0)
    before = everything()
    assert not step(bad_loss, bad_gradient)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(everything(), before, strict=True))
    assert step(1.0, 4.0)
    assert not torch.equal(parameter, before[0])
