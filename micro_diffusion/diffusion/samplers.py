"""Samplers: from noise to latents down a grid of noise levels, without added noise on the way.

A sampler goes from `x` at the first level to the last one; all but the network's work is done in float64.
For both objectives x moves along dx/dt = (x - D(x; t)) / t, with t the noise level (sigma of EDM, arXiv 2206.00364,
equations 1 and 3; time of flow matching), so one step of any sampler serves both.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "b c h w"]
Levels = Float[Tensor, " levels"]
Denoiser = Callable[[Latents, Float[Tensor, " b"]], Latents]
"""D(x; level), an estimate of the clean latents. Called in the state's dtype with the same level for all images.

The network inside may run in less; what an objective makes of its answer should not: at small levels that answer is a
small part of D, and float32 would lose digits that guidance and division by the level then magnify.
"""

Alpha = Callable[[Levels], Levels]
"""Share of the clean latents at each noise level: an objective's `alpha`."""

OnStep = Callable[[int, float, Latents], Latents]
"""Called after each step with its number, the level it came from and the state; returns the state to go on with."""


def euler(denoise: Denoiser, x: Latents, levels: Levels, *, alpha: Alpha, on_step: OnStep | None = None) -> Latents:
    """First order, one evaluation a step (DDIM, arXiv 2010.02502, in these variables)."""
    state = x.to(state_dtype(x.device))
    for i, (level, lower) in enumerate(pairwise(levels.tolist())):
        state = state + (lower - level) * _slope(denoise, state, level)
        state = on_step(i, level, state) if on_step else state
    return state.to(x.dtype)


def heun(denoise: Denoiser, x: Latents, levels: Levels, *, alpha: Alpha, on_step: OnStep | None = None) -> Latents:
    """Second order, two evaluations a step but one in a step to 0 (arXiv 2206.00364, algorithm 1)."""
    state = x.to(state_dtype(x.device))
    for i, (level, lower) in enumerate(pairwise(levels.tolist())):
        slope = _slope(denoise, state, level)
        ahead = state + (lower - level) * slope
        if lower > 0:
            ahead = state + (lower - level) * (slope + _slope(denoise, ahead, lower)) / 2
        state = on_step(i, level, ahead) if on_step else ahead
    return state.to(x.dtype)


def dpmpp_2m(denoise: Denoiser, x: Latents, levels: Levels, *, alpha: Alpha, on_step: OnStep | None = None) -> Latents:
    """Second order, one evaluation a step: DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2).

    D is extrapolated in the log signal-to-noise ratio lambda from the two latest evaluations; in the first step and in
    one to 0, where lambda ends in infinity, it is the latest.
    """
    state, before = x.to(state_dtype(x.device)), None
    grid, lambdas = levels.tolist(), (alpha(levels) / levels).log().tolist()
    for i, (level, lower) in enumerate(pairwise(grid)):
        clean = latest = _evaluate(denoise, state, level)
        if before is not None and lower > 0:
            ratio = (lambdas[i + 1] - lambdas[i]) / (lambdas[i] - lambdas[i - 1])
            clean = latest + ratio / 2 * (latest - before)
        # the algorithm's alpha_i (exp(-h_i) - 1) is lower / level - 1 on straight paths
        state, before = lower / level * state + (1 - lower / level) * clean, latest
        state = on_step(i, level, state) if on_step else state
    return state.to(x.dtype)


def state_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _slope(denoise: Denoiser, state: Latents, level: float) -> Latents:
    return (state - _evaluate(denoise, state, level)) / level


def _evaluate(denoise: Denoiser, state: Latents, level: float) -> Latents:
    return denoise(state, torch.full((len(state),), level, dtype=state.dtype, device=state.device)).to(state.dtype)


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
