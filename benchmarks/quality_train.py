"""How benchmarks/quality.py trains: stages fitted to a budget of seconds, models compiled once for all runs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.quality_data import Held, examples
from micro_diffusion.cli.quickstart import scaled
from micro_diffusion.models.dit import DiT, DiTConfig
from micro_diffusion.runtime.random import derive_seed
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.ema import follow
from micro_diffusion.training.graph import EAGER, Graphed
from micro_diffusion.training.loop import add_gradient
from micro_diffusion.training.optim import guarded_step, learning_rate, make_optimizer
from micro_diffusion.training.stages import State, first_state, next_state

CHECKS = 12  # validations of a run, evenly over its images
WARM, TIMED, PROFILED = {"cuda": EAGER + 2, "cpu": 1}, {"cuda": 30, "cpu": 2}, 5  # steps
MODES = ("graph", "reduce-overhead", "default", "none")
"""How a step runs: compiled and, whole, one CUDA graph (batch, draws, optimizer and all); or torch.compile's modes."""


class Speed(NamedTuple):
    """How fast a stage trains, compiled."""

    images_per_second: float
    gpu_idle: float | None  # share of the time in which no kernel runs
    compile_seconds: float  # and the first steps


def at_rate(recipe: Recipe, rate: float) -> Recipe:
    """The recipe with this learning rate in its first stage, the others in proportion."""
    factor = rate / recipe.stages[0].learning_rate
    stages = (replace(stage, learning_rate=stage.learning_rate * factor) for stage in recipe.stages)
    return replace(recipe, stages=tuple(stages))


def fitted(recipe: Recipe, speeds: Sequence[float], seconds: float) -> Recipe:
    """The recipe with all lengths scaled alike, so that it takes these seconds at these images a second by stage."""
    whole = sum(stage.images / speed for stage, speed in zip(recipe.stages, speeds, strict=True))
    fit = scaled(recipe, seconds / whole)
    fit.validate()
    return fit


class Trainer:
    """Trains on held data, one run after another; a shape of model is compiled once for all runs of the process."""

    def __init__(
        self, held: Sequence[Held], shares: Sequence[float], device: torch.device, *, mode: str, profiled: bool
    ) -> None:
        self.held, self.shares, self.device, self.mode, self.profiled = held, shares, device, mode, profiled
        self.models: dict[DiTConfig, tuple[DiT, DiT]] = {}
        self.speeds: dict[tuple[Any, ...], Speed] = {}
        torch._dynamo.config.recompile_limit = 64  # all models share their code

    def fresh(self, recipe: Recipe) -> tuple[State, DiT]:
        """The first state of a run, in the one model of its shape, and that model compiled."""
        state = first_state(recipe, downscale=8, device=self.device)
        config = state.dit.config
        if config not in self.models:
            compiled = recipe.compile and self.mode != "none"
            mode = "default" if self.mode == "graph" else self.mode
            network = torch.compile(state.dit, dynamic=False, mode=mode) if compiled else state.dit
            self.models[config] = state.dit, cast(DiT, network)
        dit, network = self.models[config]
        if dit is not state.dit:
            dit.load_state_dict(state.dit.state_dict())
        dit.zero_grad(set_to_none=True)
        return replace(state, dit=dit, optimizer=make_optimizer(dit, recipe)), network

    def now(self) -> float:
        """The time at which the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def speed(self, recipe: Recipe, stage: Stage) -> Speed:
        """Measured on throw-away weights; a stage of the same work is not measured again."""
        averages = len(stage.ema_sigma_rel) or stage.ema_halflife_images > 0
        key = recipe.model, stage.mask_ratio, stage.batch_size, recipe.optimizer, averages
        if key not in self.speeds:
            began = self.now()
            (state, network), kind = self.fresh(recipe), self.device.type
            step, into = Steps(self, recipe, stage, state, network, "probe"), stage.ema_start_images + stage.batch_size

            def steps(count: int) -> float:
                before = self.now()
                for _ in range(count):
                    step(into)
                return self.now() - before

            steps(WARM[kind])
            compiled = self.now() - began
            seconds, idle = steps(TIMED[kind]) / TIMED[kind], None
            if kind == "cuda" and self.profiled:
                with profile(activities=[ProfilerActivity.CUDA]) as watched:
                    steps(PROFILED)
                kernels = [event for event in watched.key_averages() if event.device_type == DeviceType.CUDA]
                busy = sum(event.self_device_time_total for event in kernels) / 1e6 / PROFILED
                idle = 1 - busy / seconds if busy else None  # no kernel at all: the profiler does not work here
            self.speeds[key] = Speed(stage.batch_size / seconds, idle, compiled)
        return self.speeds[key]

    def trial(self, recipe: Recipe, stage: Stage, count: int = 20) -> float:
        """Mean loss of the last five of so many steps from the start: another mode must come to the same."""
        state, network = self.fresh(recipe)
        step = Steps(self, recipe, stage, state, network, "trial")
        losses = [step(number * stage.batch_size) for number in range(1, count + 1)]
        return torch.stack(losses[-5:]).mean().item()

    def run(
        self, recipe: Recipe, check: Callable[[State], dict[str, float]]
    ) -> tuple[State, list[dict[str, Any]], float]:
        """Train all stages; the last state, a row for each check, and the seconds that training alone took."""
        state, network = self.fresh(recipe)
        rows, used, every = list[dict[str, Any]](), 0.0, max(1, recipe.images // CHECKS)
        for number, stage in enumerate(recipe.stages):
            if number:
                state = next_state(recipe, state, downscale=8)
            step = Steps(self, recipe, stage, state, network, "train")
            losses, since = list[torch.Tensor](), self.now()
            for into in range(stage.batch_size, stage.images + 1, stage.batch_size):
                losses.append(step(into))
                before, state.images = state.images, state.images + stage.batch_size
                if state.images // every != before // every or into == stage.images:
                    used += self.now() - since
                    row = {
                        "images": state.images, "stage": stage.name, "loss": torch.stack(losses).mean().item(),
                        "learning_rate": learning_rate(stage, into), "seconds": used, "skipped": int(state.skipped),
                    }  # fmt: skip
                    rows.append(row | check(state))
                    losses, since = [], self.now()
        return state, rows, used


class Steps:
    """The steps of one stage, one after the other; its batches are drawn by (seed, stage, purpose)."""

    def __init__(
        self, trainer: Trainer, recipe: Recipe, stage: Stage, state: State, network: DiT, purpose: str
    ) -> None:
        self.trainer, self.recipe, self.stage, self.state, self.network = trainer, recipe, stage, state, network
        self.draws = torch.Generator(trainer.device).manual_seed(derive_seed(recipe.seed, purpose, stage.name))
        self.counts = [round(stage.batch_size * share) for share in trainer.shares[:-1]]
        self.counts.append(stage.batch_size - sum(self.counts))
        graphed = trainer.mode == "graph" and trainer.device.type == "cuda"
        self.graph = Graphed(self.whole, [self.draws]) if graphed else None

    def __call__(self, into: int) -> torch.Tensor:
        """The step that ends `into` images into the stage; returns the loss."""
        rate = learning_rate(self.stage, into)
        if self.trainer.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.graph(torch.full((), rate, device=self.trainer.device)) if self.graph else self.whole(rate)
        self.state.ema = follow(self.state.ema, self.state.dit, self.stage, images=into)
        return loss.clone()

    def whole(self, rate: float | torch.Tensor) -> torch.Tensor:
        """Batch, loss, gradient, step, by the package's own functions."""
        recipe, stage, state = self.recipe, self.stage, self.state
        batch = examples(
            self.trainer.held, self.counts, recipe, stage, patches=state.dit.num_patches, draws=self.draws
        )  # fmt: skip
        losses = add_gradient(
            self.network, recipe.make_objective(stage), recipe, stage.mask_ratio, stage.batch_size, batch
        )  # fmt: skip
        loss = losses.sum() / stage.batch_size
        step = guarded_step(state.optimizer, loss, lr=rate, clip_norm=stage.clip_norm)
        state.skipped += ~step.taken
        return loss
