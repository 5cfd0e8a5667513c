"""What the paper's run takes on 1, 2, 4, 8 GPUs of one host: `python -m benchmarks.scaling --out scaling.json`.

Each case is a run of the package's own loop (`training.loop.train`) in one process a GPU: a stage of paper-37m with 256
images a GPU, on DDP, FSDP2 or hybrid sharding (in groups of half the ranks, as if the host were two). Latents and
captions are random and come from a store through the loop's feed and its workers. Nothing is left out but the first
checkpoint, the end of the stage, samples and validation: what the loop does at a row of the log (it waits, reads the
guard, looks at activations) and what a checkpoint costs are told apart from plain steps by their time, and enter the
hours of the whole run as often as paper-37m asks for them. Stages at 512 px average weights, as in most of their
length. A step is timed by events on the GPU, without a wait.

Two checkpoints are written in cases of --checkpoints stages, on one GPU and on all: the first takes pinned memory on
the host, the second finds it there, and is the one that counts. Time that it waited for the first to be on the disk is
taken off.

Compiling is most of the time, so blocks are compiled one by one in every case, one GPU too (`whole` compiles the model
as `train` does on one GPU), and each process sees its own GPU alone, as the first: a graph's name in Inductor's cache
has the number of its GPU. All cases of a stage then share graphs (DDP's not with --split, which lets Dynamo cut them
where gradients fill a bucket; the package does not, since blocks are compiled one by one). Graphs are compiled first,
by one process a stage, side by side on as many GPUs (--warm); each row has `first_step_seconds` and the hits and misses
of the cache.

The JSON is rewritten after each case. The same command goes on where it was: cases that the file has are not measured
again. None begins after --seconds, and none goes on for longer than --case-seconds; the others are listed as left out.
With --side-by-side, cases without checkpoints run at the same time on different GPUs of the machine.

`whole_run` has hours and dollars of paper-37m by number of GPUs and mode, where all its stages were measured, beside
what the planner says (`micro-diffusion plan paper-37m --count N`). Its batches of 2,048 images are 256 a GPU on eight;
on fewer GPUs they are more, and communication then costs less than was measured.
"""

import argparse
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

from benchmarks.loader import write_store
from benchmarks.step import machine
from micro_diffusion.cli.plan import works_of
from micro_diffusion.data.loader import Loader
from micro_diffusion.data.store import Store
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.planning.cost import Machine
from micro_diffusion.recipes.paper import paper_37m
from micro_diffusion.runtime.device import pick_device
from micro_diffusion.runtime.distributed import World, join
from micro_diffusion.runtime.hardware import GPUS, Gpu, gpu_of
from micro_diffusion.training import loop
from micro_diffusion.training.checkpoint import Saver
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.optim import Step, guarded_step
from micro_diffusion.training.options import Options
from micro_diffusion.training.parallel import Parallel
from micro_diffusion.training.stages import State

TEXT_LENGTH, TEXT_WIDTH, DOWNSCALE = 77, 1024, 8
PAPER = {f"{stage.resolution}:{stage.mask_ratio:g}": stage for stage in paper_37m().stages}
MODES = ("ddp", "fsdp", "hybrid", "whole")
ROW_STEPS = 6  # steps between two rows of the log
LENGTH = 20_000  # steps of a stage, which none sees the end of
LEAST = 45  # seconds; a case that has less left is not begun


@dataclass(frozen=True)
class Case:
    """A stage on so many GPUs; one GPU's modes are `single`, compiled by block, and `whole`."""

    stage: str
    ranks: int
    mode: str

    @property
    def name(self) -> str:
        return f"{self.stage} x{self.ranks} {self.mode}"

    @property
    def file(self) -> str:
        return self.name.replace(" ", "-").replace(":", "-")

    @classmethod
    def named(cls, name: str) -> "Case":
        stage, ranks, mode = name.split()
        return cls(stage, int(ranks[1:]), mode)


def ordered(stages: Sequence[str], ranks: Iterable[int], modes: Sequence[str]) -> list[Case]:
    """All cases, those first that tell most: the first stage by number of GPUs, then the whole run, then the rest."""
    counts = sorted(set(ranks))
    most = counts[-1]

    def worth(case: Case) -> tuple[int, ...]:
        first, whole_run = case.stage == stages[0], case.ranks in (1, most)
        plain, shard = case.mode in ("single", "ddp"), case.mode in ("fsdp", "hybrid")
        tiers = (
            first and whole_run and (plain or case.mode == "fsdp"),
            first and plain,
            whole_run and plain,
            whole_run and case.mode == "fsdp",
            whole_run and case.mode == "hybrid",
            plain,
            shard,
            True,
        )
        return tiers.index(True), stages.index(case.stage), ("single", *modes).index(case.mode), case.ranks

    cases = [Case(stage, 1, "single") for stage in stages if 1 in counts]
    cases += [Case(stage, 1, "whole") for stage in stages if 1 in counts and "whole" in modes]
    several = [mode for mode in modes if mode != "whole"]
    cases += [Case(stage, count, mode) for stage in stages for count in counts if count > 1 for mode in several]
    return sorted(cases, key=worth)


def rounds(cases: Sequence[Case], gpus: int, *, alone: Callable[[Case], bool]) -> Iterator[list[Case]]:
    """Cases that run at the same time: as they come, with later ones that fit beside them."""
    left = list(cases)
    while left:
        chosen = [left[0]]
        for case in left[1:]:
            free = gpus - sum(each.ranks for each in chosen)
            if case.ranks <= free and not alone(case) and not alone(chosen[0]):
                chosen.append(case)
        left = [case for case in left if case not in chosen]
        yield chosen


def analysed(
    seconds: Sequence[float], *, every: int, saves: Sequence[tuple[int, int, float]] = ()
) -> dict[str, float | list[float]]:
    """Mean seconds of a plain step, and what a row of the log and each checkpoint take beside.

    `seconds[k]` lies between the ends of step k and of the next, counted from 1 (`seconds[0]` ends with the first).
    Rows follow steps that `every` divides. A save is (step after which it began, last step that it held up, seconds
    that it waited for the one before). Steps up to the first row, and the one after it, are not counted.
    """
    saving = {step for start, last, _ in saves for step in range(start, last)}
    steps = range(every + 1, len(seconds))
    plain = [seconds[step] for step in steps if step % every and step not in saving]
    rows = [seconds[step] for step in steps if step % every == 0 and step not in saving]
    mean = statistics.mean(plain)
    row = max(0.0, statistics.mean(rows) - mean) if rows else 0.0

    def lost(start: int, last: int, waited: float) -> float:
        held = range(start, min(last, len(seconds)))
        return sum(seconds[step] - mean - row * (step % every == 0) for step in held) - waited

    return {
        "step_seconds": mean,
        "median_step_seconds": statistics.median(plain),
        "row_seconds": row,
        "lost_seconds": [round(lost(*save), 3) for save in saves],
    }


def seconds_an_image(row: Mapping[str, Any], checkpoint: float, recipe: Recipe) -> float:
    """With rows of the log and checkpoints as often as the recipe has them."""
    return (
        1 / row["images_per_second"] + row["row_seconds"] / recipe.log_every + checkpoint / recipe.checkpoint_every
    )  # fmt: skip


def bill(hours: Mapping[str, float], gpus: int, price: float | None) -> dict[str, Any]:
    """Hours of the stages, altogether, in hours of one GPU and in dollars."""
    total = sum(hours.values())
    return {
        "stage_hours": {stage: round(each, 3) for stage, each in hours.items()},
        "hours": total,
        "gpu_hours": total * gpus,
        "dollars": None if price is None else total * gpus * price,
    }


def whole_runs(rows: Mapping[str, Mapping[str, Any]], gpu: Gpu | None, price: float | None) -> list[dict[str, Any]]:
    """The paper's run by number of GPUs and mode, where all stages were measured, beside the planner's forecast.

    A stage without checkpoints of its own takes the cost of another's in that mode, or else the largest that is known.
    """
    recipe, found = paper_37m(), list[dict[str, Any]]()
    price = gpu.price if price is None and gpu else price
    costs = {name: row["checkpoint_lost_seconds"] for name, row in rows.items() if "checkpoint_lost_seconds" in row}
    done = {Case.named(name): row for name, row in rows.items() if "images_per_second" in row}
    for ranks, mode in dict.fromkeys((case.ranks, case.mode) for case in done):
        cases = {stage: Case(stage, ranks, mode) for stage in PAPER}
        if not all(case in done for case in cases.values()):
            continue
        here = [costs[case.name] for case in cases.values() if case.name in costs]
        lost = max(here or costs.values(), default=0.0)
        hours = {
            stage: PAPER[stage].images * seconds_an_image(done[case], costs.get(case.name, lost), recipe) / 3600
            for stage, case in cases.items()
        }
        run = {"gpus": ranks, "mode": mode, "price": price} | bill(hours, ranks, price)
        if gpu:
            planned = Machine(gpu, ranks, ranks if mode == "fsdp" else max(1, ranks // 2) if mode == "hybrid" else 1)
            expected = [planned.seconds(work) / 3600 for work in works_of(recipe)]
            run["planner"] = bill(dict(zip(PAPER, expected, strict=True)), ranks, price)
        found.append(run)
    return found


def completed(result: dict[str, Any], price: float | None) -> dict[str, Any]:
    """The result with what follows from its rows: efficiencies, hours, dollars."""
    rows = result["cases"]
    for name, row in rows.items():
        case = Case.named(name)
        for base in ("single", "whole"):
            alone = rows.get(Case(case.stage, 1, base).name, {}).get("images_per_second")
            if alone and case.ranks > 1 and "images_per_second" in row:
                row[f"efficiency_against_{base}"] = round(row["images_per_second"] / case.ranks / alone, 4)
    name = result.get("machine", {}).get("device", "").removeprefix("NVIDIA ")
    gpu = next((gpu for gpu in GPUS.values() if name in gpu.names), None)
    return result | {"whole_run": whole_runs(rows, gpu, price)}


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
    """What is seen of a run of the loop; its `step`, `saver` and `parallel` take the place of the loop's own."""

    world: World
    gpu: bool
    window: float
    checkpoints: int
    warm: bool
    by_block: bool
    split: bool | None
    tell: Callable[["Seen"], None]
    begun: float = field(default_factory=time.perf_counter)
    ready: float = 0.0
    first: float = 0.0
    ends: list[Any] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)

    def step(self, *args: Any, **settings: Any) -> Step:
        """The loop's, and the time at which it ends."""
        if not self.ends:
            self.note()
        taken = guarded_step(*args, **settings)
        self.note()
        steps = len(self.ends) - 1
        if steps == 1:
            if self.gpu:
                torch.cuda.synchronize()
            self.first = time.perf_counter() - self.ready
        if steps % 2 == 0 and not self.world.agree(not self.enough(steps)):
            raise Done
        return taken

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
        if steps < 2 * ROW_STEPS + 2:
            return False
        if self.checkpoints:
            written = self.saves[-1].written if len(self.saves) == self.checkpoints else None
            return written is not None and self.host[-3] > written
        return self.host[-1] - self.host[ROW_STEPS + 1] > self.window

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
        self.seen, self.by_block = seen, self.compile and seen.by_block

    def network(self, dit: Any) -> Any:
        self.seen.ready = time.perf_counter()
        network = super().network(dit)
        if self.seen.split is not None:
            torch._dynamo.config.optimize_ddp = self.seen.split
        return network


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
        found = analysed(seen.seconds(), every=ROW_STEPS, saves=seen.spans())
        row = {
            "images_per_second": batch / float(found["step_seconds"]),  # type: ignore[arg-type]
            "micro_batch": size,
            "start_seconds": round(seen.ready - seen.begun, 1),
            "first_step_seconds": round(seen.first, 1),
            "steps": len(seen.ends) - 1,
            "cache": cache(),
            **({"split_for_ddp": torch._dynamo.config.optimize_ddp} if case.mode == "ddp" and args.compile else {}),
        }
        write_row(case, args, row | found | more)

    mode = case.mode if case.mode in ("ddp", "fsdp", "hybrid") else "auto"
    options = Options(parallel=mode, micro_batch=size, keep=1, timeout=world.timeout)  # type: ignore[arg-type]
    seen = Seen(
        world, args.gpu, args.window, 2 * checkpoints(case, args), args.warming, case.mode != "whole", args.split, tell
    )
    run = scratch / f"run-{case.file}"
    try:
        with mock.patch.multiple(loop, guarded_step=seen.step, Saver=seen.saver, Parallel=seen.parallel):
            loop.train(recipe, run=run, loaders={recipe.stages[0].resolution: loader}, downscale=DOWNSCALE,
                       device=device, release=lambda folder, state: None, options=options, world=world)  # fmt: skip
    except Done:
        pass
    if args.gpu:
        torch.cuda.synchronize()
    peaks = [world.agree(peak_bytes(device) if world.rank == rank else 0) for rank in range(world.size)]
    more: dict[str, Any] = {"peak_gb": [round(peak / 1e9, 2) for peak in peaks]}
    if seen.saves:
        folder, last = run / "checkpoints", seen.saves[-1]
        found = analysed(seen.seconds(), every=ROW_STEPS, saves=seen.spans())
        cost = found["lost_seconds"][-1]  # type: ignore[index]
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


def launch(case: Case, args: argparse.Namespace, gpus: Sequence[str], seconds: float) -> dict[str, Any]:
    """The row of a case, from one process a rank; what there was of it if it fails or takes too long."""
    path, run = row_path(case, args), Path(args.scratch) / f"run-{case.file}"
    path.unlink(missing_ok=True)
    shutil.rmtree(run, ignore_errors=True)  # of a benchmark that was killed: it would go on from there
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # what torchrun would tell; a rank's own GPU is the only one that it sees, and so the first
    local = max(1, case.ranks // 2) if case.mode == "hybrid" else case.ranks
    shared = os.environ | {
        "WORLD_SIZE": str(case.ranks), "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "8"),
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:], "--case", case.name]
    command += ["--ranks", *map(str, args.ranks)]
    command += ["--warming"] if args.warming else []
    begun, ranks, trouble = time.monotonic(), list[subprocess.Popen[bytes]](), ""
    for rank in range(case.ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": "0" if args.own_gpu else str(rank)}
        if args.gpu:
            own["CUDA_VISIBLE_DEVICES"] = gpus[rank] if args.own_gpu else ",".join(gpus)
        ranks.append(subprocess.Popen(command, env=shared | own))
    while any(each.poll() is None for each in ranks) and not trouble:
        time.sleep(0.2)
        if time.monotonic() - begun > seconds:
            trouble = f"stopped after {seconds:.0f} s"
        elif codes := [each.returncode for each in ranks if each.returncode]:
            trouble = f"exit code {codes[0]}"
    trouble = trouble or next((f"exit code {each.returncode}" for each in ranks if each.returncode), "")
    for each in ranks:
        if each.poll() is None:  # its loader's workers see that, and end
            each.kill()
            each.wait()
    shutil.rmtree(run, ignore_errors=True)
    row: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if trouble and not (args.warming and row):
        row["failed"] = trouble
        path.unlink(missing_ok=True)
    row["case_seconds"] = round(time.monotonic() - begun, 1)
    told = {key: value for key, value in row.items() if key not in ("all_step_seconds", "machine")}
    print(f"{'warming ' * args.warming}{case.name}: {json.dumps(told)}", flush=True)
    return row


def measure_all(args: argparse.Namespace) -> None:
    begun, gpus = time.monotonic(), args.gpus
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"cases": {}}
    result |= {"preset": args.preset, "images_a_gpu": args.batch, "rows": args.rows, "row_steps": ROW_STEPS}
    cases = ordered(args.stages, args.ranks, args.modes)
    Path(args.scratch).mkdir(parents=True, exist_ok=True)
    if not (store := Path(args.scratch) / "store").exists():
        unfinished = store.with_name("store-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_store(unfinished, rows=args.rows, tokens=TEXT_LENGTH, resolutions=(256, 512), dtype="float16")
        unfinished.rename(store)
        print(f"store: {time.monotonic() - begun:.0f} s", flush=True)

    def left() -> float:
        return args.seconds - (time.monotonic() - begun)

    def missing() -> list[Case]:
        rows = result["cases"]
        return [case for case in cases if case.name not in rows or "failed" in rows[case.name]]

    def together(some: Sequence[Case], asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
        free, starts = list(gpus), []
        with ThreadPoolExecutor(len(some)) as pool:
            for case in some:
                starts.append(pool.submit(launch, case, asked, free[: case.ranks], min(args.case_seconds, left())))
                free = free[case.ranks :]
            return {case.name: start.result() for case, start in zip(some, starts, strict=True)}

    def write() -> None:
        result["left_out"] = [case.name for case in missing()]
        args.out.write_text(json.dumps(completed(result, args.price), indent=2) + "\n")

    if args.warm and args.compile:
        asked = argparse.Namespace(**vars(args) | {"warming": True})
        cold = [Case(stage, 1, "single") for stage in dict.fromkeys(case.stage for case in missing())]
        cold = [case for case in cold if not row_path(case, asked).exists()]
        for some in rounds(cold, len(gpus), alone=lambda case: False):
            if left() > LEAST:
                for name, row in together(some, asked).items():
                    result.setdefault("warming", {})[name] = row
                write()
    for some in rounds(missing(), len(gpus), alone=lambda case: not args.side_by_side or checkpoints(case, args)):
        if left() < LEAST:
            break
        for name, row in together(some, args).items():
            result["machine"] = row.pop("machine", result.get("machine", {}))
            result["cases"][name] = row | ({"beside": len(some) - 1} if len(some) > 1 else {})
        write()
        print(f"{time.monotonic() - begun:.0f} s since the start", flush=True)
    write()
    print(f"left out: {', '.join(result['left_out']) or 'nothing'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rewritten after each case")
    parser.add_argument("--stages", nargs="+", default=list(PAPER), choices=PAPER, metavar="PIXELS:MASK")
    parser.add_argument("--ranks", nargs="+", type=int, help="default: 1, 2, 4, 8, as far as there are GPUs")
    parser.add_argument("--modes", nargs="+", default=["ddp", "fsdp", "hybrid"], choices=MODES)
    parser.add_argument("--checkpoints", nargs="*", choices=PAPER, help="stages that write two; default: the first one")
    parser.add_argument("--preset", choices=PRESETS, help="default: MicroDiT_XL_2, or MicroDiT_Nano_4 without a GPU")
    parser.add_argument("--batch", type=int, help="images of a step on each GPU; default: 256, or 8 without a GPU")
    parser.add_argument("--micro-batch", type=int, help="default: the recipe's, by stage")
    parser.add_argument("--window", type=float, default=12, help="seconds of steps to measure")
    parser.add_argument("--seconds", type=float, default=540, help="all of it; cases that do not fit are left out")
    parser.add_argument("--case-seconds", type=float, default=300, help="of one case")
    parser.add_argument("--price", type=float, help="dollars for an hour of a GPU; default: typical of it")
    parser.add_argument("--rows", type=int, default=4096, help="of the store")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--warm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--own-gpu", action=argparse.BooleanOptionalAction, default=True,
                        help="each process sees its GPU alone, and shares what others compiled")  # fmt: skip
    parser.add_argument("--side-by-side", action="store_true")
    parser.add_argument("--split", action=argparse.BooleanOptionalAction, help="DDPOptimizer; default: as the package")
    parser.add_argument(
        "--scratch", default="/tmp/scaling-benchmark", help="store, rows and checkpoints; the store stays"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--warming", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    # counted without a context on a GPU, whose memory the ranks need
    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    args.gpu = count > 0
    args.gpus = (visible.split(",") if visible else list(map(str, range(count)))) if count else ["cpu"] * 8
    args.ranks = args.ranks or [ranks for ranks in (1, 2, 4, 8) if ranks <= count] or [1, 2]
    if not args.case and max(args.ranks) > len(args.gpus):
        parser.error(f"there are {len(args.gpus)} GPUs")
    args.preset = args.preset or ("MicroDiT_XL_2" if args.gpu else "MicroDiT_Nano_4")
    args.batch = args.batch or (256 if args.gpu else 8)
    args.compile = args.gpu if args.compile is None else args.compile
    args.checkpoints = args.stages[:1] if args.checkpoints is None else args.checkpoints
    if not args.case:
        measure_all(args)
        return
    with join("auto", timeout=max(60.0, args.case_seconds)) as world:
        work(Case.named(args.case), args, world)


if __name__ == "__main__":
    main()
