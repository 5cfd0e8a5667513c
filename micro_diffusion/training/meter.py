"""What the log says of the steps between two rows: loss, gradient norm, speed, part of the GPUs' peak, time left."""

import time
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from micro_diffusion.models.flops import forward_flops
from micro_diffusion.runtime.hardware import device_count, gpu_of
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.optim import Step
from micro_diffusion.training.stages import State

LEVELS = 8
TRAINING = 3  # FLOPs of forward and backward together, as a multiple of the forward's


class Meter:
    """Loss, gradient norm and speed between two rows of the log; summed on the device, read once a row."""

    def __init__(self, recipe: Recipe, *, downscale: int, device: torch.device) -> None:
        self.recipe, self.device, self.started = recipe, device, time.monotonic()
        self.spans = []  # (first image of the run, image after the last one, FLOPs of training on one of them)
        for stage, end in zip(recipe.stages, recipe.ends, strict=True):
            model, first = recipe.stage_model(stage, downscale=downscale), end - stage.images
            for start, stop, ratio in stage.mask_spans:
                flops = forward_flops(model, mask_ratio=ratio, text_length=recipe.text_length or 16)
                self.spans.append((first + start, first + stop, TRAINING * flops))
        gpu = gpu_of(device)
        self.peak = gpu.peak_flops(recipe.precision) if gpu else None
        self.restart()

    def restart(self) -> None:
        """Begin a new row."""
        self.sums = torch.zeros(3, device=self.device)
        self.levels = torch.zeros(LEVELS, 2, device=self.device)
        self.images, self.since = 0, time.monotonic()

    def add(self, loss: Tensor, step: Step, *, images: int) -> None:
        """Count a step; one that the guard skipped stays out of the means."""
        values = torch.stack([loss, step.grad_norm, torch.ones_like(loss)])
        self.sums += torch.where(step.taken, values, 0)
        self.images += images

    def add_levels(self, sigma_normal: Float[Tensor, " b"], losses: Float[Tensor, " b"]) -> None:
        """Count the finite losses of some images in the eighths of the noise distribution that their levels fall into.

        Without adding at indices, which is not deterministic on CUDA.
        """
        quantile = 0.5 * (1 + torch.erf(sigma_normal / 2**0.5))
        level = (quantile * LEVELS).long().clamp(max=LEVELS - 1)
        finite = losses.detach().isfinite()
        inside = ((level == torch.arange(LEVELS, device=level.device)[:, None]) & finite).float()
        self.levels += inside @ torch.stack([torch.where(finite, losses.detach(), 0), torch.ones_like(losses)], dim=1)

    def flops(self, start: int, stop: int) -> int:
        """What training from one image of the run to another costs."""
        return sum(max(0, min(stop, last) - max(start, first)) * flops for first, last, flops in self.spans)

    def row(self, state: State, rate: float) -> dict[str, Any]:
        """The log's row; waits for the device. Means are None where every step was skipped, or no level was drawn."""
        loss, norm, steps, *levels = torch.cat([self.sums, self.levels.flatten()]).tolist()
        skipped, now = int(state.skipped), time.monotonic()
        elapsed = now - self.since
        speed = self.flops(state.images - self.images, state.images) / elapsed
        return {
            "images": state.images,
            "stage": self.recipe.stages[state.stage].name,
            "loss": loss / steps if steps else None,
            "grad_norm": norm / steps if steps else None,
            "learning_rate": rate,
            "skipped": skipped,
            "images_per_second": self.images / elapsed,
            "utilisation": speed / (self.peak * device_count()) if self.peak else None,
            "seconds": now - self.started,
            "seconds_left": self.flops(state.images, self.recipe.images) / speed,
            **{f"loss/level_{i}": levels[2 * i] / n if (n := levels[2 * i + 1]) else None for i in range(LEVELS)},
        }
