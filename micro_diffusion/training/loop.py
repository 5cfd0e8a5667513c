"""The training loop: batch, loss, backward, guard, step, clock, hooks."""

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import torch
from jaxtyping import Float
from torch import Tensor

from micro_diffusion.data.loader import Batches, Loader
from micro_diffusion.diffusion.objectives import EDM, Flow
from micro_diffusion.models.dit import DiT
from micro_diffusion.runtime.distributed import ALONE, World
from micro_diffusion.runtime.files import remove_leftovers, write_atomic
from micro_diffusion.runtime.log import RunLog
from micro_diffusion.training import checkpoint
from micro_diffusion.training.checkpoint import Saver
from micro_diffusion.training.config import Recipe, Stage, require
from micro_diffusion.training.ema import follow
from micro_diffusion.training.feed import Examples, feed
from micro_diffusion.training.guard import stretches, watch
from micro_diffusion.training.hooks import Hook, Moment, Validation
from micro_diffusion.training.meter import Meter
from micro_diffusion.training.optim import Step, guarded_step, learning_rate
from micro_diffusion.training.options import DEFAULTS, Options
from micro_diffusion.training.parallel import Parallel
from micro_diffusion.training.stages import First, State, first_state, next_state

logger = logging.getLogger(__name__)
TOGETHER = 1.0  # seconds: under torchrun Ctrl-C reaches a rank twice, from the terminal and passed on


class Interrupted(Exception):
    """A signal ended the run; the checkpoint is written, and the same command resumes. Exit code: 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command resumes")
        self.signal = number


def train(
    recipe: Recipe, *, run: Path, loaders: Mapping[int, Batches], downscale: int, device: torch.device,
    release: Callable[[Path, State], None], validation: Mapping[int, Loader] | None = None, hooks: Sequence[Hook] = (),
    weights: Mapping[str, Tensor] | None = None, options: Options = DEFAULTS, world: World = ALONE,
) -> DiT:  # fmt: skip
    """Train through all stages in the folder `run`, going on from its newest checkpoint; return the released weights.

    `loaders` and `validation` are by resolution, `downscale` is pixels to a latent, and `release(folder, state)` writes
    a model folder, at the end of each stage. `weights` are those of `recipe.start_from`, for a run that begins with it.
    Under torchrun every rank calls this with its `world`; log, hooks and `release` are rank 0's alone.
    Raises UserError for a recipe that cannot run, Interrupted on a signal, Stuck for a rank or loader that is.
    """
    recipe.validate()
    _check_loaders(recipe, loaders, validation)
    parallel = Parallel(options, world, recipe, device)
    saver = Saver(run / "checkpoints", recipe, world=world, keep=options.keep, keep_every=options.keep_every)
    first = functools.partial(first_state, recipe, downscale=downscale, device=device, shard=parallel.shard)
    state = _open_run(run, saver, first, weights)
    log = RunLog(run / "log.jsonl", images=state.images) if world.rank == 0 else None
    release = release if log is not None else lambda folder, state: None
    if validation is not None:
        hooks = (Validation(validation, recipe), *hooks)
    meter = Meter(recipe, downscale=downscale, device=device)
    with contextlib.ExitStack() as stack:
        for close in (saver.close, *([log.close] if log else []), *(hook.close for hook in hooks)):
            stack.callback(close)
        received = stack.enter_context(_signals(options.deadline))
        while True:
            stage, end = recipe.stages[state.stage], recipe.ends[state.stage]
            objective, patches = recipe.make_objective(stage), state.dit.num_patches
            network, loader, trouble = parallel.network(state.dit, stage), loaders[stage.resolution], None
            micro_batch, work, work_ratio, share = 0, None, -1.0, stage.batch_size // world.size
            data = stretches(state.images, end, state.guard.windows, size=stage.batch_size)
            batches = feed(loader, recipe, stage, patches=patches, data=data, device=device, world=world)
            meter.restart()
            with contextlib.closing(batches):
                for batch in batches:
                    before, state.images = state.images, state.images + stage.batch_size
                    into_stage = state.images - (end - stage.images)
                    mask_ratio = stage.mask_ratio_at(into_stage - stage.batch_size)
                    rate = learning_rate(stage, into_stage)
                    if work is None or mask_ratio != work_ratio:
                        backward = functools.partial(add_gradient, network, objective, recipe, mask_ratio, share)
                        micro_batch = micro_batch or parallel.fit(network, batch, stage, backward)
                        step_of = functools.partial(whole_step, parallel, network, state, stage, backward, micro_batch)
                        work, work_ratio = parallel.captured(network, step_of), mask_ratio

                    # loss, backward, guard, clip, step
                    losses, loss, step = work(batch, rate)
                    for part, each in zip(batch.split(micro_batch), losses, strict=True):
                        meter.add_levels(part.sigma_normal, each)
                    state.ema = follow(state.ema, state.dit, stage, images=into_stage)
                    state.guard.add(before, loss, step)
                    meter.add(loss, step, images=stage.batch_size)

                    # hooks, log, checkpoint
                    moment = Moment(stage, before=before, after=state.images, stage_ends=state.images == end)
                    signalled = world.agree(received[0] if received else 0)
                    if moment.due(*recipe.intervals) or signalled:
                        saver.check()
                        parallel.wait()
                        if trouble := state.guard.read(recipe, stage, loader, log=run / "guard.jsonl" if log else None):
                            break
                        watched = watch(state.dit, part, recipe=recipe, stage=stage, mask_ratio=mask_ratio)
                        if state.ema and moment.due(recipe.snapshot_every):
                            for index, width in enumerate(stage.ema_sigma_rel):
                                release(run / "averages" / f"{state.images:012d}-{width}", state.gathered(index))
                        whole = moment.due(recipe.sample_every, recipe.validate_every, recipe.evaluate_every)
                        seen = state.gathered() if whole else state
                        if log is not None:
                            row = meter.row(state, rate) | watched
                            for hook in hooks:
                                row |= hook.after_step(seen, moment)
                            log.write(row)
                            for hook in hooks:
                                hook.on_row(row)
                        if moment.due(recipe.checkpoint_every) or signalled:
                            saver.save(state)
                        meter.restart()
                    if signalled:
                        saver.wait()
                        raise Interrupted(signalled)
            work = None  # the memory of a graph goes before another state comes
            if trouble:
                saver.wait()  # first: a run that ends here leaves no checkpoint half-written
                after = state.guard.after(trouble, limit=recipe.guard_rollbacks)
                if log is not None:
                    checkpoint.rewind(saver.folder, after, trouble)
                world.agree()  # the others are gone
                state = _open_run(run, saver, first, None)
                if log is not None:
                    log.rewind(state.images)
                continue
            seen = state.gathered()
            release(run / f"model-stage-{state.stage + 1}", seen)
            release(run / "model", seen)
            if state.stage + 1 == len(recipe.stages):
                saver.wait()
                return seen.dit
            state = next_state(recipe, state, downscale=downscale, shard=parallel.shard)


def whole_step(
    parallel: Parallel, network: DiT, state: State, stage: Stage, backward: Callable[[Examples], Tensor],
    micro_batch: int, batch: Examples, rate: float | Tensor,
) -> tuple[list[Tensor], Tensor, Step]:  # fmt: skip
    """Train on a batch: losses of the images of each micro-batch, their mean over all ranks, and the step taken."""
    losses, loss = list[Tensor](), torch.zeros((), device=batch.latents.device)
    for part in parallel.split(network, batch, micro_batch):
        losses.append(backward(part))
        loss += losses[-1].sum() / len(batch.latents)
    loss = parallel.world.mean(loss)
    step = guarded_step(state.optimizer, loss, lr=rate, clip_norm=stage.clip_norm)
    state.skipped += ~step.taken
    return losses, loss, step


def add_gradient(
    network: DiT, objective: EDM | Flow, recipe: Recipe, mask_ratio: float, images: int, part: Examples
) -> Float[Tensor, " b"]:
    """Add the gradient of a micro-batch's share of the mean over `images`, and return its losses."""
    losses = part.losses(network, objective, recipe, mask_ratio)
    (losses.sum() / images).backward()
    return losses.detach()


def _check_loaders(recipe: Recipe, loaders: Mapping[int, Batches], validation: Mapping[int, Loader] | None) -> None:
    for stage in recipe.stages:
        for kind, by_resolution in (("training", loaders), ("validation", validation)):
            there = by_resolution is None or stage.resolution in by_resolution
            require(there, f"stage {stage.name!r} needs {kind} latents at {stage.resolution} px: prepare them")
    held_out = validation is not None or not recipe.validate_every
    require(held_out, "validate_every does nothing without held-out rows: set it to 0, or prepare some")


def _open_run(run: Path, saver: Saver, first: First, weights: Mapping[str, Tensor] | None) -> State:
    """The state to go on from; UserError if the folder holds a run with another recipe."""
    recipe, world, saved = saver.recipe, saver.world, run / "recipe.json"
    if world.rank == 0:
        saver.folder.mkdir(parents=True, exist_ok=True)
        if not saved.exists():
            write_atomic(saved, recipe.to_json())
        remove_leftovers(saver.folder)
    world.agree()  # the folder is there
    checkpoint.check_recipe(saved, recipe)
    state = checkpoint.load_newest(saver.folder, recipe, first, world=world)
    if state is None:
        given = recipe.start_from is None or weights is not None
        require(given, f"the recipe starts from {recipe.start_from}: name that with --start-from")
        state = first(weights=weights)
        saver.save(state)  # to go back to, and to go on from without the weights
        saver.wait()
    return state


@contextlib.contextmanager
def _signals(deadline: float) -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into; one that comes `TOGETHER` seconds later acts at once.

    `deadline` seconds after the first one the process ends, whatever it waits for; the last checkpoint is whole.
    """
    received, first = list[int](), list[float]()
    watchdog = threading.Timer(deadline, lambda: give_up(received[0]))
    watchdog.daemon = True
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield received
        return

    def give_up(number: int) -> None:
        logger.error("nothing saved within %g s of %s", deadline, signal.Signals(number).name)
        os._exit(128 + number)

    def note(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            first.append(time.monotonic())
            watchdog.start()
        elif time.monotonic() - first[0] > TOGETHER:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for each, handler in previous.items():
            signal.signal(each, handler)

    previous = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        watchdog.cancel()
        restore()
