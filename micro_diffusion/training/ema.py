"""The exponential moving average of the weights, in images seen."""

import torch

from micro_diffusion.models.dit import DiT, rebuilt
from micro_diffusion.training.config import Stage


class Ema:
    """A second copy of the model that follows the first."""

    def __init__(self, dit: DiT) -> None:
        self.dit = rebuilt(dit, {name: value.clone() for name, value in dit.state_dict().items()}).requires_grad_(False)

    @torch.no_grad()
    def update(self, dit: DiT, *, images: int, halflife: int) -> None:
        """Move towards `dit`: what is left of the difference after `images` is 2^(-images/halflife) of it."""
        weight = 1 - 0.5 ** (images / halflife)
        torch._foreach_lerp_(list(self.dit.parameters()), list(dit.parameters()), weight)


def follow(ema: Ema | None, dit: DiT, stage: Stage, *, images: int) -> Ema | None:
    """The average after a step that ended `images` into the stage; it starts at the first one past ema_start_images."""
    if not stage.ema_halflife_images or images <= stage.ema_start_images:
        return ema
    if ema is None:
        return Ema(dit)
    ema.update(dit, images=stage.batch_size, halflife=stage.ema_halflife_images)
    return ema
