import pytest
import torch
from torch import Tensor

from micro_diffusion.diffusion.guidance import guided
from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.diffusion.samplers import SAMPLERS

X = torch.linspace(-1, 1, 16).reshape(2, 2, 2, 2)


class Counted:
    def __init__(self, factor: float) -> None:
        self.factor, self.levels = factor, []

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        self.levels.append(level[0].item())
        return self.factor * x


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 5.0])
def test_guidance_extrapolates_from_unconditional_to_conditional(scale):
    denoise = guided(Counted(3.0), Counted(2.0), scale=scale)
    torch.testing.assert_close(denoise(X, torch.ones(2)), (2 + scale * (3 - 2)) * X)


def test_scale_one_never_calls_the_unconditional_denoiser():
    unconditional = Counted(2.0)
    denoise = guided(Counted(3.0), unconditional, scale=1.0)
    torch.testing.assert_close(denoise(X, torch.ones(2)), 3 * X)
    assert unconditional.levels == []


def test_interval_leaves_out_its_low_end_and_has_its_high_one():
    conditional, unconditional = Counted(3.0), Counted(2.0)
    denoise = guided(conditional, unconditional, scale=4.0, interval=(0.5, 2.0))
    for level, factor in ((0.25, 3), (0.5, 3), (0.75, 6), (2.0, 6), (2.25, 3)):
        torch.testing.assert_close(denoise(X, torch.full((2,), level)), factor * X)
    assert unconditional.levels == [0.75, 2.0]
    assert len(conditional.levels) == 5


def test_interval_saves_evaluations_in_a_sampler():
    conditional, unconditional = Counted(0.5), Counted(0.4)
    denoise = guided(conditional, unconditional, scale=2.0, interval=(0.2, 3.0))
    SAMPLERS["heun"](denoise, EDM().start(X), EDM().levels(10), alpha=EDM().alpha)
    assert len(conditional.levels) == 19
    assert 0 < len(unconditional.levels) < 19
    assert unconditional.levels == [level for level in conditional.levels if 0.2 < level <= 3.0]


def test_an_empty_interval_is_an_error():
    with pytest.raises(ValueError, match="from low to high"):
        guided(Counted(3.0), Counted(2.0), scale=4.0, interval=(2.0, 0.5))
