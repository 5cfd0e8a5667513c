"""What the log says of the steps between two rows: loss, gradient norm, speed, time left."""

import time
from typing import Any

import torch
from torch import Tensor

from micro_diffusion.models.flops import forward_flops
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.optim import Step
from micro_diffusion.training.stages import State


class Meter:
    """Loss, gradient norm and speed between two rows of the log; summed on the device, read once a row."""

    def __init__(self, recipe: Recipe, *, downscale: int, device: torch.device) -> None:
        self.recipe = recipe
        models = [recipe.stage_model(stage, downscale=downscale) for stage in recipe.stages]
        self.costs = [
            forward_flops(model, mask_ratio=stage.mask_ratio, text_length=recipe.text_length or 16)
            for model, stage in zip(models, recipe.stages, strict=True)
        ]
        self.device, self.started = device, time.monotonic()
        self.restart()

    def restart(self) -> None:
        """Begin a new row."""
        self.sums = torch.zeros(3, device=self.device)
        self.images, self.since = 0, time.monotonic()

    def add(self, loss: Tensor, step: Step, *, images: int) -> None:
        """Count a step; one that the guard skipped stays out of the means."""
        values = torch.stack([loss, step.grad_norm, torch.ones_like(loss)])
        self.sums += torch.where(step.taken, values, 0)
        self.images += images

    def row(self, state: State, rate: float) -> dict[str, Any]:
        """The log's row; waits for the device. Means are None where every step was skipped."""
        loss, norm, steps, skipped = [*self.sums.tolist(), int(state.skipped)]
        now = time.monotonic()
        speed = self.images / (now - self.since)
        rest = [max(0, end - max(state.images, end - stage.images))
                for stage, end in zip(self.recipe.stages, self.recipe.ends, strict=True)]  # fmt: skip
        cost = sum(images * flops for images, flops in zip(rest, self.costs, strict=True))
        return {
            "images": state.images,
            "stage": self.recipe.stages[state.stage].name,
            "loss": loss / steps if steps else None,
            "grad_norm": norm / steps if steps else None,
            "learning_rate": rate,
            "skipped": skipped,
            "images_per_second": speed,
            "seconds": now - self.started,
            "seconds_left": cost / self.costs[state.stage] / speed,
        }
