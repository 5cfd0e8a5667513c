"""How much noise: the levels that training draws and the grids that sampling walks down."""

import torch
from jaxtyping import Float
from torch import Tensor


def log_normal_sigma(normal: Float[Tensor, "*n"], *, mean: float, std: float) -> Float[Tensor, "*n"]:
    """Sigma with ln(sigma) ~ N(mean, std^2), from standard normal draws (arXiv 2206.00364, table 1)."""
    return (mean + std * normal).exp()


def logit_normal_time(normal: Float[Tensor, "*n"], *, mean: float = 0.0, std: float = 1.0) -> Float[Tensor, "*n"]:
    """Time with logit(t) ~ N(mean, std^2), from standard normal draws (arXiv 2403.03206, equation 19)."""
    return (mean + std * normal).sigmoid()


def karras_sigmas(
    steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float[Tensor, " levels"]:
    """Sigmas from `sigma_max` down to `sigma_min`, then 0: `steps + 1` in float64 (arXiv 2206.00364, equation 5).

    One step goes from `sigma_max` straight to 0.
    """
    _check(steps)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(top + ramp * (bottom - top)) ** rho, ramp.new_zeros(1)])


def flow_times(steps: int, *, shift: float = 1.0) -> Float[Tensor, " levels"]:
    """Times from 1 to 0, `steps + 1` in float64; a shift above 1 spends more of them near noise.

    t becomes shift t / (1 + (shift - 1) t) (arXiv 2403.03206, equation 23, where shift is sqrt(m / n)): the ratio of
    noise to latents grows `shift` times.
    """
    _check(steps)
    if shift <= 0:
        raise ValueError(f"shift must be positive, not {shift}")
    time = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * time / (shift * time + (1 - time))  # exactly 1 at 1


def _check(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"sampling takes at least one step, not {steps}")
