"""When numbers go wrong: which batches were skipped, when a run goes back, when it gives up; and what is watched."""

import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from micro_diffusion.data.loader import Batches, Loader
from micro_diffusion.models.dit import Block, DiT, Stream
from micro_diffusion.models.moe import ExpertChoiceMoE
from micro_diffusion.runtime.files import UserError
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.feed import Examples
from micro_diffusion.training.optim import Step, total_norm

STEPS, ENOUGH, IN_A_ROW, WATCHED_IMAGES = 100, 16, 3, 16
Windows = Sequence[Sequence[int]]


class TrainingFailed(UserError):
    """The numbers went wrong again after all the rollbacks that the recipe allows; the message is the report."""

    exit_code = 3


class Trouble(NamedTuple):
    """Why a run must go back, and between which images seen it went wrong."""

    why: str
    start: int
    stop: int


@dataclass
class Guard:
    """A run's health in plain numbers, saved with it; those of `pending` steps still wait on the device."""

    windows: list[list[int]] = field(default_factory=list)  # sorted (start, stop) in the data that are left out
    rollbacks: list[str] = field(default_factory=list)
    steps: list[list[Any]] = field(default_factory=list)  # the last ones: [images before, loss or None if skipped]
    pending: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, before: int, loss: Tensor, step: Step) -> None:
        """Note a step that began at `before` images; nothing is read from the device."""
        self.pending.append((before, torch.where(step.taken, loss, torch.nan)))

    def read(self, recipe: Recipe, stage: Stage, loader: Batches, *, log: Path | None) -> Trouble | None:
        """Wait for the device; name what was skipped in `log`, if given, and say whether the run must go back."""
        losses, trouble = torch.stack([loss for _, loss in self.pending]).tolist(), None
        for (before, _), loss in zip(self.pending, losses, strict=True):
            self.steps = [*self.steps, [before, loss if loss == loss else None]][-STEPS:]
            if loss != loss and log:
                _name(before, data_position(before, self.windows), loader, stage.batch_size, log=log)
            trouble = trouble or judge(self.steps, skips=recipe.guard_skips, limit=recipe.guard_zscore)
        stop = self.pending[-1][0] + stage.batch_size
        self.pending.clear()
        return trouble and Trouble(*trouble, stop)

    def after(self, trouble: Trouble, *, limit: int) -> "Guard":
        """What a run remembers that goes back and leaves that data out; TrainingFailed after the last rollback."""
        rollbacks = [*self.rollbacks, f"images {trouble.start} to {trouble.stop}: {trouble.why}"]
        if len(rollbacks) > limit:
            raise TrainingFailed(
                f"training stopped: numbers went wrong {len(rollbacks)} times ({'; '.join(rollbacks)}). guard.jsonl in "
                "the run folder names the batches. Repair the store ('micro-diffusion data verify'), run this again, "
                "or start in a new folder with a lower learning rate"
            )
        start, stop = (data_position(images, self.windows) for images in (trouble.start, trouble.stop))
        apart = [window for window in self.windows if not start <= window[0] < stop]
        return Guard(sorted([*apart, [start, stop]]), rollbacks)


def judge(steps: Sequence[Sequence[Any]], *, skips: int, limit: float) -> tuple[str, int] | None:
    """Why the last steps are trouble, and from how many images on: `skips` of them skipped, or a jump of the loss.

    A jump: the last three losses all lie more than `limit` deviations above the median of those before, a deviation
    being estimated by the median one, and counted as 5% of the median at least. 0 switches either off.
    """
    skipped = [before for before, loss in steps if loss is None]
    if 0 < skips <= len(skipped):
        return f"{len(skipped)} of {len(steps)} steps were not finite", skipped[0]
    taken = [(before, loss) for before, loss in steps if loss is not None]
    earlier, last = [loss for _, loss in taken[:-IN_A_ROW]], taken[-IN_A_ROW:]
    if len(earlier) < ENOUGH or not limit:
        return None
    middle = statistics.median(earlier)
    most = middle + limit * max(1.4826 * statistics.median(abs(loss - middle) for loss in earlier), 0.05 * abs(middle))
    lowest = min(loss for _, loss in last)
    return (f"the loss jumped from {middle:.4g} to {lowest:.4g} and more", last[0][0]) if lowest > most else None


def data_position(images: int, windows: Windows) -> int:
    """Where in the data the run stands after `images`, the windows left out."""
    for start, stop in windows:
        images += stop - start if images >= start else 0
    return images


def stretches(start: int, stop: int, windows: Windows, *, size: int) -> list[tuple[int, int]]:
    """The data of the batches between two counts of images seen, as ranges of positions with no window in them."""
    firsts = [data_position(images, windows) for images in range(start, stop, size)]
    cuts = [index for index, (one, two) in enumerate(pairwise(firsts), 1) if two != one + size]
    return [(firsts[one], firsts[two - 1] + size) for one, two in pairwise([0, *cuts, len(firsts)])] if firsts else []


def _name(before: int, start: int, loader: Batches, size: int, *, log: Path) -> None:
    """Record a skipped batch; its keys, and which of its rows are broken, where it can be read again."""
    what, keys, broken = f"skipped the batch at {before} images, which was not finite", None, None
    if isinstance(loader, Loader):
        batch = loader.batch(start, size)
        good = batch.latents.isfinite().flatten(1).all(dim=1) & batch.text.isfinite().flatten(1).all(dim=1)
        keys, broken = batch.keys, [batch.keys[row] for row in (~good).nonzero().flatten().tolist()]
        what += f"; broken data: {broken or 'none'}"
    record(log, what, position=start, keys=keys, broken=broken)


def record(path: Path, what: str, **details: object) -> None:
    """Say what happened, on the terminal and as a line of a file that, unlike the log, never goes back."""
    logging.getLogger(__name__).warning(what)
    with path.open("a") as file:
        file.write(json.dumps({"what": what, **details}) + "\n")


@torch.no_grad()
def watch(dit: DiT, examples: Examples, *, recipe: Recipe, stage: Stage, mask_ratio: float) -> dict[str, float]:
    """Norm of the weights, largest activation, part of the tokens that no expert takes, most experts of one token.

    From an eager forward pass of a few images: the compiled model never meets the hooks. Waits for the device.
    """
    few, seen, takers = Examples(*(column[:WATCHED_IMAGES] for column in examples)), list[Tensor](), list[Tensor]()

    def look(module: Any, inputs: tuple[Any, ...], output: Stream | Tensor) -> None:
        values = output.x if isinstance(output, Stream) else output
        seen.append(values.abs().max().float())
        if isinstance(module, ExpertChoiceMoE):
            tokens, none = module.route(inputs[0]).tokens.flatten(1), values.new_zeros(values.shape[:2])
            takers.append(none.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=none.dtype)).flatten())

    watched = [module for module in dit.modules() if isinstance(module, Block | ExpertChoiceMoE)]
    hooks = [module.register_forward_hook(look) for module in watched]
    with torch.compiler.set_stance("force_eager"):
        few.losses(dit, recipe.make_objective(stage), recipe, mask_ratio)
    for hook in hooks:
        hook.remove()
    if isinstance(dit, FSDPModule):
        dit.reshard()  # until a backward pass the root's parameters would be gathered ones, not the optimizer's
    row = {"weight_norm": total_norm(list(dit.parameters())), "activation_max": torch.stack(seen).max()}
    if takers:
        load = torch.cat(takers)
        row |= {"experts/untaken": (load == 0).float().mean(), "experts/most": load.max().float()}
    return dict(zip(row, torch.stack(list(row.values())).tolist(), strict=True))
