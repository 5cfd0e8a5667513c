"""Classifier-free guidance."""

import torch
from jaxtyping import Float
from torch import Tensor

from micro_diffusion.diffusion.samplers import Denoiser, Latents


def guided(
    conditional: Denoiser, both: Denoiser, *, scale: float, interval: tuple[float, float] | None = None
) -> Denoiser:
    """The denoiser unconditional + scale * (conditional - unconditional) (arXiv 2207.12598, equation 6).

    `both` is given every image twice, and answers conditionally in the first half, unconditionally in the second: one
    call of twice the batch. With an interval (low, high] of noise levels, guidance acts inside it only (arXiv
    2404.07724, equation 6). Where it does not act, and at scale 1, `conditional` is called and `both` is not. All
    images of a call share one noise level.
    """
    if interval is not None and not interval[0] < interval[1]:
        raise ValueError(f"a guidance interval goes from low to high, not {interval}")
    if scale == 1:
        return conditional

    def denoise(x: Latents, level: Float[Tensor, " b"]) -> Latents:
        # only an interval looks at the level: reading it waits for the device
        if interval is not None and not interval[0] < level[0].item() <= interval[1]:
            return conditional(x, level)
        cond, uncond = both(torch.cat([x, x]), torch.cat([level, level])).chunk(2)
        return uncond + scale * (cond - uncond)

    return denoise
