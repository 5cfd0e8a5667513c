import math

import pytest
import torch

from micro_diffusion.diffusion.objectives import EDM, Flow
from micro_diffusion.runtime.random import draw_normal

NORMAL = draw_normal(0, "moments", torch.arange(200), (500,)).flatten().double()


def test_log_normal_sigma_has_the_moments_of_a_log_normal():
    sigma = EDM(p_mean=-0.6, p_std=0.5).noise_level(NORMAL)
    mean, variance = math.exp(-0.6 + 0.5**2 / 2), math.expm1(0.5**2) * math.exp(-1.2 + 0.5**2)
    assert sigma.mean().item() == pytest.approx(mean, rel=0.01)
    assert sigma.var().item() == pytest.approx(variance, rel=0.03)
    assert sigma.log().std().item() == pytest.approx(0.5, rel=0.01)


def test_logit_normal_time_has_the_quantiles_of_a_logit_normal():
    time = Flow(mean=0.4, std=1.3).noise_level(NORMAL)
    for deviations, probability in ((-1, 0.15866), (0, 0.5), (1, 0.84134), (2, 0.97725)):
        bound = 1 / (1 + math.exp(-(0.4 + 1.3 * deviations)))
        assert (time < bound).double().mean().item() == pytest.approx(probability, abs=0.005)
    assert Flow().noise_level(NORMAL).std().item() == pytest.approx(0.2083, abs=0.002)  # by numerical integration


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_karras_sigmas_follow_equation_5(steps):
    sigmas = EDM().levels(steps)
    for i in range(1, steps):
        expected = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert sigmas[i].item() == pytest.approx(expected, rel=1e-12)
    assert sigmas[0].item() == pytest.approx(80, rel=1e-12)
    assert sigmas[-1] == 0
    assert len(sigmas) == steps + 1 and sigmas.dtype == torch.float64


def test_flow_times_are_even_without_shift():
    torch.testing.assert_close(Flow().levels(4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))


@pytest.mark.parametrize("shift", [0.1, 0.7, 3.0, 1 / 3])
def test_shift_multiplies_the_ratio_of_noise_to_latents(shift):
    plain, shifted = Flow().levels(7), Flow(shift=shift).levels(7)
    assert shifted[0] == 1 and shifted[-1] == 0
    torch.testing.assert_close((shifted / (1 - shifted))[1:-1], shift * (plain / (1 - plain))[1:-1])


def test_a_grid_needs_a_step_and_a_positive_shift():
    with pytest.raises(ValueError, match="at least one step, not 0"):
        EDM().levels(0)
    with pytest.raises(ValueError, match="at least one step, not -1"):
        Flow().levels(-1)
    with pytest.raises(ValueError, match="shift must be positive, not 0"):
        Flow(shift=0.0).levels(3)
