"""Checkpoints: complete or absent, and exact. `checkpoints/000001024/` is the state after 1,024 images."""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from micro_diffusion.runtime.files import UserError, atomic_folder, write_atomic
from micro_diffusion.training.config import Recipe, differences
from micro_diffusion.training.ema import Ema
from micro_diffusion.training.guard import Guard, Trouble, record
from micro_diffusion.training.stages import State, first_state


def save(folder: Path, state: State, recipe: Recipe, *, keep: int = 2) -> Path:
    """Write the state aside, rename it into place, and remove all but the newest `keep` checkpoints."""
    final = folder / f"{state.images:012d}"
    with atomic_folder(final) as temporary:
        with _one_process():
            dcp.save(_tensors(state), checkpoint_id=temporary)
        clock = {"stage": state.stage, "images": state.images, "guard": asdict(state.guard)}
        clock["ema"] = len(state.ema.dits) if state.ema else 0
        (temporary / "state.json").write_text(json.dumps(clock))
        (temporary / "recipe.json").write_text(recipe.to_json())
    _remove(_all(folder)[:-keep])
    return final


def rewind(folder: Path, guard: Guard, trouble: Trouble, *, limit: int) -> Path:
    """The newest checkpoint from before the trouble, told to leave that data out; those after it are removed.

    Should none be that old, it is the oldest. TrainingFailed after `limit` rollbacks.
    """
    after, saved = guard.after(trouble, limit=limit), _all(folder)
    good = max(1, sum(int(path.name) <= trouble.start for path in saved))
    path = saved[good - 1]
    clock = json.loads((path / "state.json").read_text())
    clock["guard"]["steps"] = [step for step in clock["guard"]["steps"] if step[1] is not None]
    clock["guard"] |= {"windows": after.windows, "rollbacks": after.rollbacks}
    write_atomic(path / "state.json", json.dumps(clock))
    _remove(saved[good:])
    record(folder.parent / "guard.jsonl", f"back to {clock['images']} images: {trouble.why}", windows=after.windows)
    return path


def _remove(checkpoints: list[Path]) -> None:
    for old in checkpoints:
        (old / "state.json").unlink()  # from here on it is no checkpoint, even if the removal is cut short
        shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    return max(_all(folder), default=None)


def load(path: Path, recipe: Recipe, *, downscale: int, device: torch.device) -> State:
    """The state that `save` wrote, bit for bit; UserError if it belongs to another recipe."""
    check_recipe(path / "recipe.json", recipe)
    clock = json.loads((path / "state.json").read_text())
    state = first_state(recipe, stage=clock["stage"], downscale=downscale, device=device)
    state.images, state.ema = clock["images"], Ema(state.dit, clock["ema"]) if clock["ema"] else None
    state.guard = Guard(**clock["guard"])
    with _one_process():
        dcp.load(_tensors(state), checkpoint_id=path)  # in place
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


def _tensors(state: State) -> dict[str, Any]:
    """The state's own tensors under stable names, to be written, or to be read into."""
    optimizer = {name: state.optimizer.state[parameter] for name, parameter in state.dit.named_parameters()}
    tensors = {"weights": state.dit.state_dict(), "optimizer": optimizer, "skipped": state.skipped}
    averages = state.ema.dits if state.ema else []
    return tensors | {f"ema{index or ''}": dit.state_dict() for index, dit in enumerate(averages)}


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Without a process group torch warns that it takes the run for a single process, which it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
