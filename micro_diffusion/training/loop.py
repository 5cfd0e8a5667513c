"""The training loop: batch, loss, backward, guard, step, clock, hooks."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import cast

import torch
from torch import Tensor

from micro_diffusion.data.loader import Loader
from micro_diffusion.models.dit import DiT, conditioned
from micro_diffusion.runtime.files import UserError, remove_leftovers, write_atomic
from micro_diffusion.runtime.log import RunLog
from micro_diffusion.training import checkpoint
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.ema import follow
from micro_diffusion.training.feed import feed
from micro_diffusion.training.guard import stretches, watch
from micro_diffusion.training.hooks import Hook, Moment, Validation
from micro_diffusion.training.meter import Meter
from micro_diffusion.training.optim import guarded_step, learning_rate
from micro_diffusion.training.stages import State, first_state, next_state

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """A signal ended the run; the checkpoint is written, and the same command resumes. Exit code: 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command resumes")
        self.signal = number


def train(
    recipe: Recipe,
    *,
    run: Path,
    loaders: Mapping[int, Loader],
    downscale: int,
    device: torch.device,
    release: Callable[[Path, State], None],
    validation: Mapping[int, Loader] | None = None,
    hooks: Sequence[Hook] = (),
    weights: Mapping[str, Tensor] | None = None,
) -> DiT:
    """Train through all stages in the folder `run`, going on from its newest checkpoint; return the released weights.

    `loaders` and `validation` are by resolution, `downscale` is pixels to a latent, and `release(folder, state)` writes
    a model folder, at the end of each stage. `weights` are those of `recipe.start_from`, for a run that begins with it.
    Raises UserError for a recipe that cannot run and Interrupted on a signal.
    """
    recipe.validate()
    _check_loaders(recipe, loaders, validation)
    state = _open_run(run, recipe, downscale=downscale, device=device, weights=weights)
    log = RunLog(run / "log.jsonl", images=state.images)
    if validation is not None:
        hooks = (Validation(validation, recipe), *hooks)
    meter = Meter(recipe, downscale=downscale, device=device)
    with contextlib.ExitStack() as stack:
        for close in (log.close, *(hook.close for hook in hooks)):
            stack.callback(close)
        received = stack.enter_context(_signals())
        while True:
            stage, end = recipe.stages[state.stage], recipe.ends[state.stage]
            objective, patch_size = recipe.make_objective(stage), recipe.model.patch_size
            dit = cast(DiT, torch.compile(state.dit, dynamic=False)) if recipe.compile else state.dit
            data = stretches(state.images, end, state.guard.windows, size=stage.batch_size)
            loader, trouble = loaders[stage.resolution], None
            batches = feed(loader, recipe, stage, patches=state.dit.num_patches, data=data, device=device)
            meter.restart()
            with contextlib.closing(batches):
                for batch in batches:
                    # loss, backward
                    loss = torch.zeros((), device=device)
                    for part in batch.split(stage.micro_batch):
                        network = conditioned(
                            dit, part.text, part.text_mask,
                            precision=recipe.precision, mask_ratio=stage.mask_ratio, mask_noise=part.mask_noise,
                        )  # fmt: skip
                        level = objective.noise_level(part.sigma_normal)
                        terms = objective.loss(network, part.latents, level, part.noise, patch_size=patch_size)
                        share = terms.per_image.sum() / stage.batch_size
                        share.backward()
                        loss += share.detach()

                    # guard, clip, step, clock
                    before, state.images = state.images, state.images + stage.batch_size
                    into_stage = state.images - (end - stage.images)
                    rate = learning_rate(stage, into_stage)
                    step = guarded_step(state.optimizer, loss, lr=rate, clip_norm=stage.clip_norm)
                    state.skipped += ~step.taken
                    state.ema = follow(state.ema, state.dit, stage, images=into_stage)
                    meter.add(loss, step, images=stage.batch_size)
                    state.guard.add(before, loss, step)

                    # hooks, log, checkpoint
                    moment = Moment(stage, before=before, after=state.images, stage_ends=state.images == end)
                    signals = tuple(received)
                    if moment.due(*recipe.intervals) or signals:
                        if trouble := state.guard.read(recipe, stage, loader, log=run / "guard.jsonl"):
                            break
                        row = meter.row(state, rate) | watch(state.dit, part, recipe=recipe, stage=stage)
                        if state.ema and moment.due(recipe.snapshot_every):
                            for index, width in enumerate(stage.ema_sigma_rel):
                                alone = replace(state, ema=state.ema.alone(index))
                                release(run / "averages" / f"{state.images:012d}-{width}", alone)
                        for hook in hooks:
                            row |= hook.after_step(state, moment)
                        log.write(row)
                        for hook in hooks:
                            hook.on_row(row)
                        if moment.due(recipe.checkpoint_every) or signals:
                            checkpoint.save(run / "checkpoints", state, recipe)
                        meter.restart()
                    if signals:
                        raise Interrupted(signals[0])
            if trouble:
                good = checkpoint.rewind(run / "checkpoints", state.guard, trouble, limit=recipe.guard_rollbacks)
                state = checkpoint.load(good, recipe, downscale=downscale, device=device)
                log.rewind(state.images)
                continue
            release(run / f"model-stage-{state.stage + 1}", state)
            release(run / "model", state)
            if state.stage + 1 == len(recipe.stages):
                return state.shown
            state = next_state(recipe, state, downscale=downscale)


def _check_loaders(recipe: Recipe, loaders: Mapping[int, Loader], validation: Mapping[int, Loader] | None) -> None:
    for stage in recipe.stages:
        for kind, by_resolution in (("training", loaders), ("validation", validation)):
            if by_resolution is not None and stage.resolution not in by_resolution:
                raise UserError(f"stage {stage.name!r} needs {kind} latents at {stage.resolution} px: prepare them")
    if recipe.validate_every and validation is None:
        raise UserError("validate_every does nothing without held-out rows: set it to 0, or prepare some")


def _open_run(
    run: Path, recipe: Recipe, *, downscale: int, device: torch.device, weights: Mapping[str, Tensor] | None
) -> State:
    """The state to go on from; UserError if the folder holds a run with another recipe."""
    checkpoints, saved = run / "checkpoints", run / "recipe.json"
    checkpoints.mkdir(parents=True, exist_ok=True)
    if saved.exists():
        checkpoint.check_recipe(saved, recipe)
    else:
        write_atomic(saved, recipe.to_json())
    remove_leftovers(checkpoints)
    newest = checkpoint.latest(checkpoints)
    if newest is None:
        if recipe.start_from is not None and weights is None:
            raise UserError(f"the recipe starts from {recipe.start_from}: name that with --start-from")
        state = first_state(recipe, downscale=downscale, device=device, weights=weights)
        checkpoint.save(checkpoints, state, recipe)  # to go back to, and to go on from without the weights
        return state
    logger.info("resuming from %s", newest)
    return checkpoint.load(newest, recipe, downscale=downscale, device=device)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into; the second one acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    previous = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
