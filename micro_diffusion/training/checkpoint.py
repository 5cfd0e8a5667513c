"""Checkpoints: complete or absent, and exact. `checkpoints/000001024/` is the state after 1,024 images.

Names and shapes are the same for any number of ranks and any way of spreading the model over them, so each loads what
another saved. Ranks must share the file system.
"""

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from micro_diffusion.runtime.distributed import ALONE, World
from micro_diffusion.runtime.files import TEMPORARY_PREFIX, UserError, atomic_folder, write_atomic
from micro_diffusion.training.config import Recipe, differences
from micro_diffusion.training.ema import Ema
from micro_diffusion.training.guard import Guard, Trouble, record
from micro_diffusion.training.stages import First, State

logger = logging.getLogger(__name__)
# Without a process group torch warns that it takes the run for a single process, which it is.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class Saver:
    """Writes checkpoints in the background, one at a time, each rank its part; UserError if one could not be written.

    Keeps the newest `keep` and the first one past each multiple of `keep_every` images.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, world: World = ALONE,
                 keep: int = 2, keep_every: int = 0) -> None:  # fmt: skip
        self.folder, self.recipe, self.world, self.keep, self.keep_every = folder, recipe, world, keep, keep_every
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: State) -> None:
        """Copy this rank's part to the host and write it; waits for the checkpoint before this one only."""
        self.wait()
        tensors = _copy_part(_tensors(state), self.world)
        copied = torch.cuda.current_stream().record_event() if state.skipped.is_cuda else None
        averages, guard = len(state.ema.dits) if state.ema else 0, asdict(state.guard)
        clock = {"stage": state.stage, "images": state.images, "ema": averages, "guard": guard}
        self._pending = self._pool.submit(self._write, tensors, clock, copied)

    def check(self) -> None:
        """Raise what went wrong with a checkpoint, if that is known by now."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is in its place."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Begin no other; one that is being written is finished."""
        self._pool.shutdown(wait=False)

    def _write(self, tensors: dict[str, Any], clock: Mapping[str, Any], copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        final, writes_all = self.folder / f"{clock['images']:012d}", self.world.rank == 0
        aside = final.with_name(TEMPORARY_PREFIX + final.name)
        try:
            with atomic_folder(final) if writes_all else contextlib.nullcontext(aside) as temporary:
                if self.world.saving is not None:
                    dist.barrier(self.world.saving)  # the folder is there
                dcp.save(tensors, checkpoint_id=temporary, process_group=self.world.saving)
                if writes_all:
                    (temporary / "recipe.json").write_text(self.recipe.to_json())
                    sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
                    (temporary / "state.json").write_text(json.dumps({**clock, "files": sizes}))
            if writes_all:
                self._thin()
        except (CheckpointException, OSError) as error:
            what = f"the checkpoint at {clock['images']:,} images could not be written ({_reason(error)})"
            raise UserError(f"{what}; put that right, and the same command goes on from the one before") from error

    def _thin(self) -> None:
        paths = _all(self.folder)
        for before, path in zip([None, *paths], paths[: -self.keep], strict=False):
            images = [int(each.name) if each else 0 for each in (before, path)]
            if not self.keep_every or images[0] // self.keep_every == images[1] // self.keep_every:
                _remove(path)


def rewind(folder: Path, guard: Guard, trouble: Trouble) -> None:
    """Remove the checkpoints from after the trouble and give `guard` to the newest before it, or else to the oldest."""
    saved = _all(folder)
    good = max(1, sum(int(path.name) <= trouble.start for path in saved))
    path = saved[good - 1]
    clock = json.loads((path / "state.json").read_text())
    clock["guard"] = asdict(replace(guard, steps=[step for step in clock["guard"]["steps"] if step[1] is not None]))
    write_atomic(path / "state.json", json.dumps(clock))
    for later in saved[good:]:
        _remove(later)
    record(folder.parent / "guard.jsonl", f"back to {clock['images']} images: {trouble.why}", windows=guard.windows)


def _remove(path: Path) -> None:
    (path / "state.json").unlink()  # from here on it is no checkpoint, even if the removal is cut short
    shutil.rmtree(path)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    return max(_all(folder), default=None)


def load_newest(folder: Path, recipe: Recipe, first: First, *, world: World = ALONE) -> State | None:
    """The state of the newest checkpoint that can be read, None without checkpoints.

    Damaged ones are set aside under another name. UserError if all are damaged, or belong to another recipe.
    """
    damaged: list[Path] = []
    for path in reversed(_all(folder)):
        reason = ""
        try:
            state = load(path, recipe, first, world=world)
        except (CheckpointException, OSError, ValueError, KeyError) as error:
            reason = _reason(error)
            logger.error("the checkpoint %s is damaged (%s)", path, reason)
        if world.agree(bool(reason)):
            damaged.append(path)
            continue
        for each in damaged if world.rank == 0 else []:
            logger.error("%s is set aside; %d images more are trained again", each, int(each.name) - state.images)
            each.rename(each.with_name(f"damaged-{each.name}"))
        logger.info("going on from %s", path)
        return state
    if damaged:
        raise UserError(f"none of the checkpoints in {folder} can be read; the last reason was: {reason}")
    return None


def load(path: Path, recipe: Recipe, first: First, *, world: World = ALONE) -> State:
    """The state that `Saver` wrote, bit for bit, made and spread by `first`; UserError if the recipe is another."""
    clock = json.loads((path / "state.json").read_text())
    for name, size in clock["files"].items():
        if (found := (path / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found} bytes of {size}")
    check_recipe(path / "recipe.json", recipe)
    state = first(stage=clock["stage"])
    state.images, state.guard = clock["images"], Guard(**clock["guard"])
    state.ema = Ema(state.dit, clock["ema"]) if clock["ema"] else None
    dcp.load(_tensors(state), checkpoint_id=path, process_group=world.control)  # in place
    return state


def check_recipe(path: Path, recipe: Recipe) -> None:
    """Raise UserError naming every setting in which the recipe saved at `path` differs from this one."""
    if different := differences(recipe, Recipe.from_json(path.read_text())):
        raise UserError(
            f"the run in {path.parent} was started with another recipe; go on with the same settings or choose a new "
            f"folder ({'; '.join(different)})"
        )


def _all(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("[0-9]*/state.json"))


def _reason(error: BaseException) -> str:
    """The error, or the first that a rank of torch's checkpointing ran into."""
    for rank, (cause, _) in error.failures.items() if isinstance(error, CheckpointException) else ():
        return f"rank {rank}: {cause}"
    return str(error)


def _tensors(state: State) -> dict[str, Tensor]:
    """The state's own tensors under stable names, to be written, or to be read into."""
    moments = dict(state.optimizer.state)  # the optimizer's own makes up what it lacks
    parts = {f"optimizer.{name}": moments[parameter] for name, parameter in state.dit.named_parameters()}
    parts |= {f"ema{index or ''}": dit.state_dict() for index, dit in enumerate(state.ema.dits if state.ema else [])}
    parts |= {"weights": state.dit.state_dict(), "": {"skipped": state.skipped}}
    return {f"{part}.{name}".strip("."): tensor for part, some in parts.items() for name, tensor in some.items()}


def _copy_part(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """On the host, what this rank writes: its shards and, in turns by size, its part of what all ranks have.

    From a GPU it goes into pinned memory, and is complete when the stream gets there.
    """
    by_size = sorted(tensors, key=lambda name: tensors[name].nbytes)
    whole = [name for name in by_size if not isinstance(tensors[name], DTensor)]
    names = tensors.keys() - {*whole} | {*whole[world.rank :: world.size]}
    return {name: tensors[name].detach().to("cpu", non_blocking=True, copy=True) for name in by_size if name in names}
