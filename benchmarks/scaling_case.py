"""One case of benchmarks/scaling.py: the package's own loop, watched."""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch._dynamo.utils import counters

from benchmarks.scaling_plan import PAPER, Case, analysed
from benchmarks.step import machine
from micro_diffusion.cli.plan import works_of
from micro_diffusion.data.loader import Loader
from micro_diffusion.data.store import Store
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.planning.cost import Machine
from micro_diffusion.recipes.paper import paper_37m
from micro_diffusion.runtime.device import pick_device
from micro_diffusion.runtime.distributed import World
from micro_diffusion.runtime.hardware import gpu_of
from micro_diffusion.training import loop, parallel
from micro_diffusion.training.checkpoint import Saver
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.options import Options
from micro_diffusion.training.parallel import UNIT, Parallel
from micro_diffusion.training.stages import State

TEXT_LENGTH, TEXT_WIDTH, DOWNSCALE = 77, 1024, 8
ROW_STEPS = 6  # steps between two rows of the log
LENGTH = 20_000  # steps of a stage, which none sees the end of
CAPTURED = 14  # steps after which a CUDA graph is replayed, whatever the mode


class Done(Exception):
    """Enough was seen; raised on all ranks after the same step."""


@dataclass
class Save:
    """A checkpoint: the step after which it began, and by the host's clock what it waited for and when it was whole."""

    step: int
    waited: float
    copied: float = 0.0
    written: float | None = None


@dataclass
class Seen:
    """What is seen of a run of the loop; its `saver` and `parallel` take the place of the loop's own."""

    world: World
    gpu: bool
    window: float
    checkpoints: int
    warm: bool
    mode: str
    buckets: int
    lead: int
    units: bool
    unit: int
    tell: Callable[["Seen"], None]
    begun: float = field(default_factory=time.perf_counter)
    ready: float = 0.0
    first: float = 0.0
    ends: list[Any] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)

    def captured(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """A step of the loop, and the time at which it ends."""

        def step(*inputs: Any) -> Any:
            if not self.ends:
                self.note()
            taken = work(*inputs)
            self.note()
            steps = len(self.ends) - 1
            if steps == 1:
                if self.gpu:
                    torch.cuda.synchronize()
                self.first = time.perf_counter() - self.ready
            if steps % 2 == 0 and not self.world.agree(not self.enough(steps)):
                raise Done
            return taken

        return step

    def note(self) -> None:
        self.host.append(time.perf_counter())
        if self.gpu:
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        else:
            self.ends.append(self.host[-1])

    def enough(self, steps: int) -> bool:
        if self.warm:
            return True
        if steps < self.lead + ROW_STEPS + 2:
            return False
        if self.checkpoints:
            written = self.saves[self.checkpoints - 1].written if len(self.saves) >= self.checkpoints else None
            return written is not None and self.host[-3] > written
        return self.host[-1] - self.host[self.lead + 1] > self.window

    def seconds(self) -> list[float]:
        """Of each step; the device is through with all."""
        pairs = zip(self.ends, self.ends[1:], strict=False)
        return [one.elapsed_time(two) / 1e3 if self.gpu else two - one for one, two in pairs]

    def spans(self) -> list[tuple[int, int, float]]:
        """The saves as `analysed` has them; the device may be two steps behind the host."""
        never = float("inf")
        return [
            (save.step, 2 + sum(at <= (save.written or never) for at in self.host[1:]), save.waited)
            for save in self.saves
        ]

    def saver(self, *args: Any, **settings: Any) -> Saver:
        return _Saver(self, *args, **settings)

    def parallel(self, *args: Any) -> Parallel:
        return _Parallel(self, *args)


class _Saver(Saver):
    def __init__(self, seen: Seen, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.seen = seen

    def save(self, state: State) -> None:
        if not state.images:
            return  # what a run begins with
        before = time.perf_counter()
        self.wait()
        waited = time.perf_counter()
        if self.seen.saves:
            self.seen.tell(self.seen)
        self.seen.saves.append(Save(len(self.seen.ends) - 1, waited - before))
        super().save(state)
        self.seen.saves[-1].copied = time.perf_counter() - waited

    def _write(self, *args: Any) -> None:
        super()._write(*args)
        self.seen.saves[-1].written = time.perf_counter()


class _Parallel(Parallel):
    def __init__(self, seen: Seen, *args: Any) -> None:
        super().__init__(*args)
        self.seen = seen
        if seen.warm and seen.mode != "single":  # one rank that does as several would
            self.mode, self.by_block = cast(Any, seen.mode), self.compile and seen.mode != "ddp"
        if seen.units and seen.mode in ("ddp", "single"):
            self.by_block = self.compile

    def captured(self, network: Any, work: Any) -> Any:
        return self.seen.captured(super().captured(network, work))

    def shard(self, dit: DiT) -> DiT:
        with mock.patch.object(parallel, "UNIT", self.seen.unit):
            return super().shard(dit)

    def network(self, dit: Any, stage: Stage) -> Any:
        self.seen.ready = time.perf_counter()
        with mock.patch.object(parallel, "BUCKETS", self.seen.buckets):
            return super().network(dit, stage)


def recipe_of(case: Case, args: argparse.Namespace, step_seconds: float | None) -> Recipe:
    """The paper's, of one stage that never ends."""
    batch, paper = args.batch * case.ranks, paper_37m()
    between = 3  # rows of the log from one checkpoint to the next
    if step_seconds:
        between = max(between, math.ceil(args.window / step_seconds / ROW_STEPS))
    stage = replace(
        PAPER[case.stage], images=batch * LENGTH, batch_size=batch, micro_batch=0, start="scratch", warmup_images=0,
        learning_rate=1e-5, ema_start_images=0,
    )  # fmt: skip
    return replace(
        paper, name="scaling", model=PRESETS[args.preset](caption_channels=TEXT_WIDTH, text_mask="none"),
        stages=(stage,), text_length=TEXT_LENGTH, precision="bf16" if args.gpu else "float32", compile=args.compile,
        log_every=ROW_STEPS * batch, checkpoint_every=between * ROW_STEPS * batch if checkpoints(case, args) else 0,
        sample_every=0, validate_every=0,
    )  # fmt: skip


def checkpoints(case: Case, args: argparse.Namespace) -> bool:
    return not args.warming and case.stage in args.checkpoints and case.ranks in (1, max(args.ranks))


def work(case: Case, args: argparse.Namespace, world: World) -> None:
    """Train until enough was seen, and write the row."""
    device, scratch = pick_device("cuda" if args.gpu else "cpu"), Path(args.scratch)
    gpu, size = gpu_of(device), min(args.micro_batch or PAPER[case.stage].micro_batch, args.batch)
    recipe = recipe_of(case, args, None)
    expected = Machine(gpu, case.ranks).seconds(works_of(recipe)[0]) / LENGTH if gpu else None
    recipe = recipe_of(case, args, expected)
    batch, loader = recipe.stages[0].batch_size, Loader(
        [Store.open(scratch / "store")], resolution=recipe.stages[0].resolution, text_encoder="random",
        seed=recipe.seed, text_length=TEXT_LENGTH,
    )  # fmt: skip

    def tell(seen: Seen, **more: Any) -> None:
        if world.rank or seen.warm:
            return
        found = analysed(seen.seconds(), every=ROW_STEPS, lead=lead, saves=seen.spans())
        row = {
            "images_per_second": batch / float(found["step_seconds"]),  # type: ignore[arg-type]
            "micro_batch": size,
            "start_seconds": round(seen.ready - seen.begun, 1),
            "first_step_seconds": round(seen.first, 1),
            "steps": len(seen.ends) - 1,
            "cache": cache(),
            **({"buckets": args.buckets} if case.mode == "ddp" else {}),
            **({"cuda_graph": True} if args.cuda_graph else {}),
            **({"unit": args.unit} if args.unit != UNIT else {}),
            **({"units": True} if args.units and case.mode in ("ddp", "single") else {}),
        }
        write_row(case, args, row | found | more)

    mode = "auto" if case.mode == "single" else case.mode
    options = Options(parallel=mode, micro_batch=size, keep=1, timeout=world.timeout, cuda_graph=args.cuda_graph)  # type: ignore[arg-type]
    lead = CAPTURED if args.cuda_graph else ROW_STEPS
    seen = Seen(
        world, args.gpu, args.window, 2 * checkpoints(case, args), args.warming, case.mode, args.buckets, lead,
        args.units, args.unit, tell,
    )  # fmt: skip
    if args.warming and case.mode != "single":
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if args.gpu else "gloo")
    run = scratch / f"run-{case.file}"
    watched = mock.patch.multiple(loop, Saver=seen.saver, Parallel=seen.parallel)
    with contextlib.suppress(Done), watched:
        loop.train(recipe, run=run, loaders={recipe.stages[0].resolution: loader}, downscale=DOWNSCALE,
                   device=device, release=lambda folder, state: None, options=options, world=world)  # fmt: skip
    if args.gpu:
        torch.cuda.synchronize()
    peaks = [world.agree(peak_bytes(device) if world.rank == rank else 0) for rank in range(world.size)]
    more: dict[str, Any] = {"peak_gb": [round(peak / 1e9, 2) for peak in peaks]}
    if seen.saves:
        folder, last = run / "checkpoints", seen.saves[1]
        found = analysed(seen.seconds(), every=ROW_STEPS, lead=lead, saves=seen.spans())
        cost = found["lost_seconds"][1]  # type: ignore[index]
        assert last.written is not None
        more |= {
            "checkpoint_gb": round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9, 2),
            "checkpoint_lost_seconds": cost,
            "checkpoint_percent_at_one_in_600_s": round(100 * cost / 600, 3),
            "copy_seconds": [round(save.copied, 3) for save in seen.saves],
            "waited_seconds": [round(save.waited, 1) for save in seen.saves],
            "background_seconds": round(last.written - seen.host[last.step], 1),
        }
    more["machine"] = machine("cuda" if args.gpu else "cpu")
    tell(seen, **more, all_step_seconds=[round(each, 4) for each in seen.seconds()])
    if seen.warm:
        write_row(case, args, {"first_step_seconds": round(seen.first, 1), "cache": cache()})


def cache() -> dict[str, int]:
    """Hits and misses of Inductor's and AOTAutograd's caches."""
    return {
        name: count
        for kind in ("inductor", "aot_autograd")
        for name, count in counters[kind].items()
        if name.endswith(("cache_hit", "cache_miss", "cache_bypass"))
    }


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def row_path(case: Case, args: argparse.Namespace) -> Path:
    return Path(args.scratch) / f"{'warm' if args.warming else 'row'}-{case.file}.json"


def write_row(case: Case, args: argparse.Namespace, row: Mapping[str, Any]) -> None:
    path = row_path(case, args)
    path.with_suffix(".new").write_text(json.dumps(row))
    path.with_suffix(".new").rename(path)
