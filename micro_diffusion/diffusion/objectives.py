"""Training objectives: how latents are noised, what the network is asked for, how its answer becomes latents.

Both mix clean latents and unit noise along a straight line, `x = alpha * latents + level * noise`, so that samplers
and hooks treat them alike. All runs in the dtype of the latents (float32); only the network may run in less.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Latents = Float[Tensor, "b c h w"]
Level = Float[Tensor, " b"]
"""Noise level of each image: sigma of EDM, time of flow matching."""


class Prediction(NamedTuple):
    """What a network returns; in dropped patches the sample means nothing (the network's own output is zero there)."""

    sample: Float[Tensor, "b c h w"]
    dropped: Bool[Tensor, "b t"] | None = None


class LossTerms(NamedTuple):
    """Loss of each image and its mean over the batch."""

    per_image: Float[Tensor, " b"]
    mean: Float[Tensor, ""]


Network = Callable[[Float[Tensor, "b c h w"], Float[Tensor, " b"]], Prediction]
"""Called with its scaled input and the noise label; caption, mask and precision are already fixed."""


class Objective:
    """What `EDM` and `Flow` share; each of them gives the functions that are only declared here."""

    noise_level: Callable[[Level], Level]  # for training, from standard normal draws
    levels: Callable[[int], Float[Tensor, " levels"]]  # for sampling: steps + 1, from pure noise to 0, in float64
    alpha: Callable[[Level], Level]  # share of the clean latents in the noised ones
    noise_label: Callable[[Level], Level]  # the noise level as the network is told it
    target: Callable[[Latents, Level, Latents], Latents]  # of latents, level and noise: what the network should answer
    _scaled: Callable[[Latents, Level], Latents]  # noised latents as the network sees them
    _clean: Callable[[Latents, Latents, Level], Latents]  # the latents that its answer to x at a level stands for

    def start(self, noise: Latents) -> Latents:
        """Where sampling starts: unit noise brought to the first level."""
        return self.levels(1)[0].item() * noise

    def noised(self, latents: Latents, level: Level, noise: Latents) -> Latents:
        """Latents with noise of the given levels."""
        return _column(self.alpha(level)) * latents + _column(level) * noise

    def denoise(self, network: Network, x: Latents, level: Level) -> Prediction:
        """The denoiser D(x; level): an estimate of the clean latents."""
        output, dropped = network(self._scaled(x, level), self.noise_label(level))
        return Prediction(self._clean(output.to(x.dtype), x, level), dropped)

    def loss(self, network: Network, latents: Latents, level: Level, noise: Latents, *, patch_size: int) -> LossTerms:
        """Squared error of the network's answer: mean over channels and each patch, kept patches, then images."""
        x = self.noised(latents, level, noise)
        output, dropped = network(self._scaled(x, level), self.noise_label(level))
        error = (output.to(x.dtype) - self.target(latents, level, noise)).square()
        patches = error.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
        per_patch = patches.mean((1, 3, 5)).flatten(1)
        if dropped is None:
            per_image = per_patch.mean(1)
        else:
            per_image = per_patch.masked_fill(dropped, 0).sum(1) / (~dropped).sum(1)
        return LossTerms(per_image, per_image.mean())


@dataclass(frozen=True)
class EDM(Objective):
    """Denoising with the preconditioning of Karras et al. 2022 (arXiv 2206.00364, table 1, last column).

    x = latents + sigma noise; D(x) = c_skip x + c_out F(c_in x; c_noise). The weight (sigma^2 + d^2) / (sigma d)^2 of
    D's error makes it the plain error of F (equation 8), where `loss` takes it: there no small sigma cancels digits.
    """

    sigma_data: float = 0.9
    p_mean: float = -0.6
    p_std: float = 1.2

    def noise_level(self, normal: Level) -> Level:
        """Sigma with ln(sigma) ~ N(p_mean, p_std^2) (table 1)."""
        return (self.p_mean + self.p_std * normal).exp()

    def levels(self, steps: int) -> Float[Tensor, " levels"]:
        """Sigmas from 80 to 0.002, evenly in their seventh root, then 0 (equation 5); one step goes straight to 0."""
        _check(steps)
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        top, bottom = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
        return torch.cat([(top + ramp * (bottom - top)) ** 7, ramp.new_zeros(1)])

    def alpha(self, level: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return torch.ones_like(level)

    def noise_label(self, level: Level) -> Level:
        """c_noise = ln(sigma) / 4."""
        return level.log() / 4

    def target(self, latents: Latents, level: Level, noise: Latents) -> Latents:
        """(latents - c_skip x) / c_out of equation 8, multiplied out."""
        sigma, data = _column(level), self.sigma_data
        return (sigma * latents - data**2 * noise) / (data * self._total(level))

    def _scaled(self, x: Latents, level: Level) -> Latents:
        return x / self._total(level)  # c_in x

    def _clean(self, output: Latents, x: Latents, level: Level) -> Latents:
        sigma, data, total = _column(level), self.sigma_data, self._total(level)
        return (data / total) ** 2 * x + sigma * data / total * output  # c_skip x + c_out F

    def _total(self, level: Level) -> Float[Tensor, "b 1 1 1"]:
        """Standard deviation of the noised latents."""
        return (_column(level) ** 2 + self.sigma_data**2).sqrt()


@dataclass(frozen=True)
class Flow(Objective):
    """Flow matching on straight paths (arXiv 2210.02747, 2209.03003): x = (1 - t) latents + t noise.

    The network answers the velocity noise - latents. To shift the training times as much as `shift` does the sampling
    grid, add ln(shift) to `mean`.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def noise_level(self, normal: Level) -> Level:
        """Time with logit(t) ~ N(mean, std^2) (arXiv 2403.03206, equation 19)."""
        return (self.mean + self.std * normal).sigmoid()

    def levels(self, steps: int) -> Float[Tensor, " levels"]:
        """Times from 1 to 0; a shift above 1 spends more of them near noise.

        t becomes shift t / (1 + (shift - 1) t) (arXiv 2403.03206, equation 23, where shift is sqrt(m / n)): the ratio
        of noise to latents grows `shift` times.
        """
        _check(steps)
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, not {self.shift}")
        time = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return self.shift * time / (self.shift * time + (1 - time))  # exactly 1 at 1

    def alpha(self, level: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return 1 - level

    def noise_label(self, level: Level) -> Level:
        """ln(t / (1 - t)) / 4, which is EDM's label at the same ratio of noise to latents.

        Kept finite by holding t within 0.001 of 0 and 1: labels reach from -1.73 to 1.73.
        """
        return level.logit(eps=1e-3) / 4

    def target(self, latents: Latents, level: Level, noise: Latents) -> Latents:
        return noise - latents  # the velocity dx/dt, the same all along the path

    def _scaled(self, x: Latents, level: Level) -> Latents:
        return x

    def _clean(self, output: Latents, x: Latents, level: Level) -> Latents:
        return x - _column(level) * output


def _check(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"sampling takes at least one step, not {steps}")


def _column(level: Level) -> Float[Tensor, "b 1 1 1"]:
    return level[:, None, None, None]


OBJECTIVES: dict[str, type[EDM] | type[Flow]] = {"edm": EDM, "flow": Flow}
