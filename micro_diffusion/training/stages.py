"""The state of a run, and what one stage hands to the next."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.optim import AdamW

from micro_diffusion.models.dit import DiT, rebuilt, resized
from micro_diffusion.runtime.random import derive_seed
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.ema import Ema
from micro_diffusion.training.guard import Guard
from micro_diffusion.training.optim import make_optimizer, whole

First = Callable[..., "State"]  # `first_state` of a run, to be called with a stage or with weights


@dataclass
class State:
    """Everything that the next step depends on, the recipe apart."""

    dit: DiT
    optimizer: AdamW
    ema: Ema | None
    skipped: Tensor  # steps that the guard skipped, counted on the device
    stage: int
    images: int
    guard: Guard = field(default_factory=Guard)

    @property
    def shown(self) -> DiT:
        """The weights that are sampled, validated and released: the average where there is one."""
        return self.ema.dit if self.ema else self.dit

    def gathered(self, average: int = 0) -> "State":
        """The state with one average as its weights, whole and in a plain model; called on every rank at once."""
        return replace(self, dit=_whole(self.ema.dits[average] if self.ema else self.dit), ema=None)


def _whole(dit: DiT) -> DiT:
    return rebuilt(dit, {name: whole(value) for name, value in dit.state_dict().items()})


def first_state(
    recipe: Recipe, *, stage: int = 0, downscale: int, device: torch.device,
    weights: Mapping[str, Tensor] | None = None, shard: Callable[[DiT], DiT] | None = None,
) -> State:  # fmt: skip
    """A new model in the shape of the given stage: random, the same for the same seed, or with `weights`.

    The positions are the stage's own in any case. `shard` spreads the model over the ranks; None leaves it whole.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "init"))
        dit = DiT(recipe.stage_model(recipe.stages[stage], downscale=downscale)).to(device)
    if weights is not None:
        dit.load_state_dict({**weights, "pos_embed": dit.pos_embed})
    dit = shard(dit) if shard else dit
    optimizer = make_optimizer(dit, recipe)
    return State(dit, optimizer, ema=None, skipped=torch.zeros((), device=device), stage=stage, images=0)


def next_state(recipe: Recipe, state: State, *, downscale: int, shard: Callable[[DiT], DiT] | None = None) -> State:
    """The state in which the stage after `state.stage` begins.

    `weights` takes over the trained weights alone (not their average: the optimizer left off there), regenerates the
    positions for the new resolution and starts optimizer and average anew. `all_but_schedule` keeps the optimizer too,
    and the average, unless the stage names the image at which a new one starts.
    """
    stage = recipe.stages[state.stage + 1]
    dit, optimizer, ema = state.dit, state.optimizer, state.ema
    if stage.start == "weights":
        config = recipe.stage_model(stage, downscale=downscale)
        dit = resized(_whole(dit), config.input_size, config.pos_interp_scale)
        dit = shard(dit) if shard else dit
        optimizer = make_optimizer(dit, recipe)
    if stage.start == "weights" or stage.ema_start_images or not stage.ema_halflife_images:
        ema = None
    guard = Guard(state.guard.windows, state.guard.rollbacks)  # losses of another stage tell nothing
    return replace(state, dit=dit, optimizer=optimizer, ema=ema, stage=state.stage + 1, guard=guard)
