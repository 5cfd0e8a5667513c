import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from micro_diffusion.diffusion import samplers
from micro_diffusion.diffusion.objectives import EDM, Flow
from micro_diffusion.diffusion.samplers import SAMPLERS

STD = 0.7
ORDERS = {"euler": 1, "heun": 2, "dpmpp_2m": 2}


def variance(objective: EDM | Flow, level: float) -> float:
    """Of noised Gaussian data of standard deviation STD."""
    return STD**2 + level**2 if isinstance(objective, EDM) else (1 - level) ** 2 * STD**2 + level**2


def gaussian(objective: EDM | Flow):
    """The exact denoiser of such data."""

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        t = level[0].item()
        alpha = 1 if isinstance(objective, EDM) else 1 - t
        return x.double() * alpha * STD**2 / variance(objective, t)

    return denoise


def two_points(x: Tensor, level: Tensor) -> Tensor:
    """The exact denoiser of data that is -1 or 1 everywhere at once in an image, under EDM."""
    return (x.sum((1, 2, 3)) / level**2).tanh()[:, None, None, None].expand_as(x)


def test_every_sampler_is_measured():
    assert SAMPLERS.keys() == ORDERS.keys()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("objective", "top"), [(EDM(), 3.0), (Flow(), 0.9)])
def test_order_of_convergence(name, objective, top):
    """Error against the exact shrinkage of x, from one level to another above 0."""
    errors = []
    for steps in (32, 64, 128):
        levels = torch.linspace(top, 0.1, steps + 1, dtype=torch.float64)
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        end = SAMPLERS[name](gaussian(objective), x, levels, alpha=objective.alpha).item()
        errors.append(abs(end / math.sqrt(variance(objective, 0.1) / variance(objective, top)) - 1))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[name], abs=0.15)


@pytest.mark.parametrize(("name", "tolerance"), [("euler", 0.1), ("heun", 0.02), ("dpmpp_2m", 0.02)])
@pytest.mark.parametrize("objective", [EDM(), Flow()])
def test_whole_path_shrinks_noise_to_the_data(name, tolerance, objective):
    """By s / sqrt(s^2 + 80^2) from 80 x unit noise; by s for flow matching."""
    noise = torch.tensor([-1.5, 0.3, 2.0])[:, None, None, None]
    x = objective.start(noise)
    end = SAMPLERS[name](gaussian(objective), x, objective.levels(30), alpha=objective.alpha)
    exact = x * STD / math.sqrt(variance(objective, objective.levels(30)[0].item()))
    torch.testing.assert_close(end, exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_land_on_the_data(name):
    x = EDM().start(torch.linspace(-2, 2, 8)[:, None, None, None].expand(8, 1, 2, 2))
    end = SAMPLERS[name](two_points, x, EDM().levels(20), alpha=EDM().alpha)
    torch.testing.assert_close(end, x.sign(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("objective", [EDM(), Flow()])
def test_one_step_is_one_evaluation(name, objective):
    x = objective.start(torch.linspace(-2, 2, 8).reshape(2, 1, 2, 2))
    end = SAMPLERS[name](gaussian(objective), x, objective.levels(1), alpha=objective.alpha)
    level = objective.levels(1)[:1].float().expand(2)
    torch.testing.assert_close(end, gaussian(objective)(x, level).float())


@pytest.mark.parametrize(("name", "count"), [("euler", 10), ("heun", 19), ("dpmpp_2m", 10)])
def test_denoiser_is_called_in_float64_at_one_level(name, count):
    calls = []

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        assert x.dtype == level.dtype == torch.float64 and (level == level[0]).all()
        calls.append(level[0].item())
        return x / 2

    SAMPLERS[name](denoise, EDM().start(torch.ones(3, 1, 2, 2)), EDM().levels(10), alpha=EDM().alpha)
    assert len(calls) == count
    assert sorted(set(calls), reverse=True) == EDM().levels(10)[:-1].tolist()


def test_heun_equals_a_plain_loop():
    """Algorithm 1 of arXiv 2206.00364 in numpy, in float64."""

    def denoise(x, sigma):
        return x / (1 + sigma**2 + x**2)

    noise = torch.linspace(-2, 2, 12).reshape(3, 1, 2, 2)
    end = SAMPLERS["heun"](
        lambda x, level: denoise(x, level[:, None, None, None]),
        EDM().start(noise.double()), EDM().levels(5), alpha=EDM().alpha,
    )  # fmt: skip
    sigmas = np.append((80 ** (1 / 7) + np.arange(5) / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, 0)
    x = 80 * noise.numpy().astype(np.float64)
    for now, later in pairwise(sigmas):
        d = (x - denoise(x, now)) / now
        there = x + (later - now) * d
        if later != 0:
            d_there = (there - denoise(there, later)) / later
            there = x + (later - now) * (d / 2 + d_there / 2)
        x = there
    np.testing.assert_allclose(end.numpy(), x, rtol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("objective", [EDM(), Flow()])
def test_state_falls_back_to_float32(name, objective, monkeypatch):
    def run() -> Tensor:
        return SAMPLERS[name](gaussian(objective), x, objective.levels(30), alpha=objective.alpha)

    assert samplers.state_dtype(torch.device("cpu")) == torch.float64
    assert samplers.state_dtype(torch.device("mps")) == torch.float32
    x = objective.start(torch.linspace(-2, 2, 12).reshape(3, 1, 2, 2))
    double = run()
    monkeypatch.setattr(samplers, "state_dtype", lambda device: torch.float32)
    single = run()
    assert single.dtype == double.dtype == torch.float32
    torch.testing.assert_close(single, double, rtol=1e-4, atol=0)
    assert not torch.equal(single, double)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_step_is_shown_and_may_be_changed(sampler: str) -> None:
    levels, seen = EDM().levels(4), []

    def on_step(step: int, level: float, state: torch.Tensor) -> torch.Tensor:
        seen.append((step, level, state.dtype))
        return state * 0 if step == 3 else state

    x = torch.randn(2, 3, 4, 4)
    out = SAMPLERS[sampler](lambda x, level: x * 0.5, x, levels, alpha=EDM().alpha, on_step=on_step)
    assert seen == [(i, level, torch.float64) for i, level in enumerate(levels[:-1].tolist())]
    assert not out.any()
