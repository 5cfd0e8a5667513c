"""AdamW, its learning rate over a stage, and the guarded step."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from micro_diffusion.training.config import Recipe, Stage


def learning_rate(stage: Stage, images: int) -> float:
    """Rate of the step that ends `images` into the stage: linear warm-up, then constant or a half cosine to the end."""
    if images < stage.warmup_images:
        return stage.learning_rate * images / stage.warmup_images
    if stage.schedule == "constant":
        return stage.learning_rate
    progress = (images - stage.warmup_images) / (stage.images - stage.warmup_images)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return stage.learning_rate * (stage.final_lr_ratio + (1 - stage.final_lr_ratio) * cosine)


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> AdamW:
    """Fused AdamW whose moments exist from the start, so that a checkpoint can be loaded into them in place."""
    optimizer = AdamW(
        list(parameters), betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay, fused=True
    )
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


class Step(NamedTuple):
    """What a guarded step saw; both stay on the device."""

    grad_norm: Float[Tensor, ""]
    taken: Bool[Tensor, ""]


def guarded_step(optimizer: AdamW, loss: Float[Tensor, ""], *, lr: float, clip_norm: float) -> Step:
    """Clip by the global norm and step, or leave weights and moments alone where loss or gradient is not finite.

    The host never waits: fused AdamW divides by `grad_scale` and obeys `found_inf` inside its kernel, the way that
    `torch.amp.GradScaler` drives it. The gradients are freed.
    """
    group = optimizer.param_groups[0]
    norm = nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    taken = torch.isfinite(norm) & torch.isfinite(loss)
    group["lr"] = lr
    optimizer.grad_scale = (norm / clip_norm).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(norm, taken)
