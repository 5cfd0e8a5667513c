import pytest
import torch
from torch import Tensor

from micro_diffusion.diffusion.guidance import guided
from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.diffusion.samplers import SAMPLERS

X = torch.linspace(-1, 1, 16).reshape(2, 2, 2, 2)


class Counted:
    """Multiplies by a factor; given two, the first half of the images by the first, the second half by the second."""

    def __init__(self, *factors: float) -> None:
        self.factors, self.levels, self.images = factors, [], []

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        assert x.shape[0] == level.shape[0]
        self.levels.append(level[0].item())
        self.images.append(len(x))
        return torch.cat([f * part for f, part in zip(self.factors, x.chunk(len(self.factors)), strict=True)])


@pytest.mark.parametrize("scale", [0.0, 0.5, 5.0])
def test_guidance_extrapolates_from_unconditional_to_conditional_in_one_call(scale):
    conditional, both = Counted(3.0), Counted(3.0, 2.0)
    denoise = guided(conditional, both, scale=scale)
    torch.testing.assert_close(denoise(X, torch.ones(2)), (2 + scale * (3 - 2)) * X)
    assert both.images == [2 * len(X)] and conditional.images == []


def test_scale_one_never_calls_the_unconditional_denoiser():
    both = Counted(3.0, 2.0)
    denoise = guided(Counted(3.0), both, scale=1.0)
    torch.testing.assert_close(denoise(X, torch.ones(2)), 3 * X)
    assert both.levels == []


def test_interval_leaves_out_its_low_end_and_has_its_high_one():
    conditional, both = Counted(3.0), Counted(3.0, 2.0)
    denoise = guided(conditional, both, scale=4.0, interval=(0.5, 2.0))
    for level, factor in ((0.25, 3), (0.5, 3), (0.75, 6), (2.0, 6), (2.25, 3)):
        torch.testing.assert_close(denoise(X, torch.full((2,), level)), factor * X)
    assert both.levels == [0.75, 2.0]
    assert conditional.levels == [0.25, 0.5, 2.25]


def test_interval_saves_evaluations_in_a_sampler():
    conditional, both = Counted(0.5), Counted(0.5, 0.4)
    denoise = guided(conditional, both, scale=2.0, interval=(0.2, 3.0))
    SAMPLERS["heun"](denoise, EDM().start(X), EDM().levels(10), alpha=EDM().alpha)
    assert len(conditional.levels) + len(both.levels) == 19
    assert both.levels and all(0.2 < level <= 3.0 for level in both.levels)
    assert conditional.levels and not any(0.2 < level <= 3.0 for level in conditional.levels)


def test_an_empty_interval_is_an_error():
    with pytest.raises(ValueError, match="from low to high"):
        guided(Counted(3.0), Counted(3.0, 2.0), scale=4.0, interval=(2.0, 0.5))
