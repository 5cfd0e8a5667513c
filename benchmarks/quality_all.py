"""The whole comparison of recipes on a machine with several GPUs, in one command that plans its own time.

    python -m benchmarks.quality_all --out OUT/quality.jsonl --data DATA --save SAVED --gpus 4 --until 1500

One process a GPU runs jobs of benchmarks/quality.py, and this one hands them out: the baseline at several learning
rates, the ablations at the best of them, second seeds of what is close, long runs of what may ship, and those in other
ways of sampling. The long runs have their time set aside (benchmarks/quality_plan.py); what does not fit before
`--until` is left out and named. Runs that are in the file are not run again, so the command can be repeated.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

# The name `torch` stays unbound here: torch writes the first module that has it into the keys of its compile cache, and
# a worker's is its copy of this one, so that it would find nothing of what benchmarks/quality.py compiled.
from torch import _dynamo, cuda, ones

from benchmarks.quality import Bench, Job, add_data_options, append, data_of, interval, name_of, summary
from benchmarks.quality_data import prepare_data
from benchmarks.quality_plan import COMBINED, Plan, Score, Settings, choose_mode, graphs, job_of, slice_loss
from benchmarks.quality_score import Sampling
from benchmarks.quality_train import MODES
from micro_diffusion.evaluation.judges import FOLDER
from micro_diffusion.recipes.ablations import ABLATIONS
from micro_diffusion.recipes.recipe import RECIPES
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.log import read_log

RATES = (4e-4, 8e-4, 1.2e-3, 1.6e-3, 2.4e-3, 3.2e-3)
ORDER = ("muon", "less-decay", "no-experts", "less-noise", "no-mixer", "no-unmasked", "mask-0", "mask-50", "mask-87",
         "constant-widths", "smaller", "averages")  # fmt: skip
START, TRIAL, MORE = 300.0, 300.0, 60.0  # seconds at most: to load, to try a mode, and then for the other modes
STARTS = 3  # of a GPU's process
OVERTIME = 60.0  # seconds after --until at which everything is ended


@dataclass(frozen=True)
class Trial:
    """Time the stages of the baseline in a mode of torch.compile."""

    mode: str
    job: Job


@dataclass(frozen=True)
class Order:
    """What a worker is told."""

    task: Trial | Job | Score
    mode: str
    save: Path | None = None


def work(args: argparse.Namespace, pipe: Connection) -> None:
    """A worker: does what it is told until the other end is closed; ends if its device is broken."""
    bench = Bench(args, args.samplings[:1])
    pipe.send(("ready", None))
    for order in received(pipe):
        try:
            reply: tuple[str, Any] = "done", carry_out(bench, order)
        except Exception:  # noqa: BLE001  whatever it is, the other jobs go on
            reply = "failed", traceback.format_exc(limit=-3)
        if reply[0] == "failed":
            use_mode(bench, order.mode, anew=True)  # nothing of it is kept on the device
            ones(8, device=bench.device).sum().item()
        pipe.send(reply)


def received(pipe: Connection) -> Iterator[Order]:
    with contextlib.suppress(EOFError):
        while True:
            yield pipe.recv()


def carry_out(bench: Bench, order: Order) -> dict[str, Any]:
    task = order.task
    use_mode(bench, order.mode)
    bench.args.save = order.save
    if isinstance(task, Trial):
        recipe, stages = task.job.make(), list(bench.probe(task.job))
        seconds = [stage.images / row["images_per_second"] for stage, row in zip(recipe.stages, stages, strict=True)]
        losses = [bench.trainer.trial(recipe, stage) for stage in recipe.stages]
        return {"mode": task.mode, "seconds": sum(seconds), "losses": losses, "stages": stages}
    if isinstance(task, Job):
        return bench.do(task)
    assert order.save
    bench.sampling, before = [task.sampling], bench.sampling
    try:
        (row,) = bench.rescore(order.save / task.model)
    finally:
        bench.sampling = before
    return row


def use_mode(bench: Bench, mode: str, *, anew: bool = False) -> None:
    """Compile in this mode from now on; what was compiled in another is forgotten."""
    if anew or bench.trainer.mode != mode:
        bench.trainer = bench.fresh_trainer(mode)
        _dynamo.reset()
        gc.collect()
        if bench.device.type == "cuda":
            cuda.empty_cache()


@dataclass
class Worker:
    """A process, since when it is busy, for how long as planned and at most."""

    process: SpawnProcess
    pipe: Connection
    began: float
    planned: float
    most: float
    idle: bool = False


class Crew:
    """The workers, one on each GPU."""

    def __init__(self, args: argparse.Namespace, now: Callable[[], float]) -> None:
        self.args, self.now, self.workers, self.starts = args, now, dict[int, Worker](), dict[int, int]()
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.devices = seen.split(",") if seen else [str(number) for number in range(args.gpus)]
        cores = max(1, (os.cpu_count() or 1) // args.gpus)
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(16, cores)))
        os.environ.setdefault("OMP_NUM_THREADS", str(min(8, cores)))

    def start(self, number: int) -> None:
        """Begin a worker, or begin it again."""
        os.environ["CUDA_VISIBLE_DEVICES"] = self.devices[number]  # this process uses none
        ours, its = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=work, args=(self.args, its))
        process.start()
        its.close()
        self.starts[number] = self.starts.get(number, 0) + 1
        self.workers[number] = Worker(process, ours, self.now(), 40.0, START)

    def tell(self, number: int, order: Order, *, planned: float, most: float) -> None:
        worker = self.workers[number]
        worker.idle, worker.began, worker.planned, worker.most = False, self.now(), planned, most
        with contextlib.suppress(OSError):  # it has just died, as its pipe will say
            worker.pipe.send(order)

    def free(self) -> dict[int, float]:
        """When each worker will have nothing to do."""
        now = self.now()
        return {number: now if worker.idle else max(now + 1, worker.began + worker.planned)
                for number, worker in self.workers.items()}  # fmt: skip

    def news(self) -> Iterator[tuple[int, str, Any]]:
        """(worker, ready | done | failed | dead, what it says); waits a second at most."""
        wait([worker.pipe for worker in self.workers.values()], timeout=1.0)
        for number, worker in list(self.workers.items()):
            late = not worker.idle and self.now() - worker.began > worker.most
            try:
                if worker.pipe.poll():
                    yield number, *worker.pipe.recv()
                    continue
                said = f"it took more than {worker.most:.0f} s" if late else ""
            except (EOFError, OSError):
                worker.process.join(5)
                said = f"its process ended with {worker.process.exitcode}"
            if said or not worker.process.is_alive():
                self.end(number)
                yield number, "dead", said or f"its process ended with {worker.process.exitcode}"

    def end(self, number: int) -> None:
        """End a worker's process."""
        worker = self.workers.pop(number)
        worker.pipe.close()
        worker.process.terminate()
        worker.process.join(3)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(3)

    def close(self) -> None:
        for number in list(self.workers):
            self.end(number)


class Comparison:
    """All of it: trials of the modes, then what the plan says, until there is nothing left."""

    def __init__(self, args: argparse.Namespace, plan: Plan, now: Callable[[], float], mode: str) -> None:
        self.args, self.plan, self.now, self.crew, self.mode = args, plan, now, Crew(args, now), mode
        self.baseline = Job("baseline", None, 0, args.seconds, args.scenes, tuple(args.set))
        self.untried = deque(() if mode else args.modes)
        self.trials: list[dict[str, Any]] = []

    def log(self, text: str) -> None:
        print(f"[{self.now():5.0f} s] {text}", flush=True)

    def run(self) -> None:
        """Until nothing is left, or no worker, or no time."""
        crew = self.crew
        try:
            for number in range(self.args.gpus):
                crew.start(number)
            if self.mode:
                self.begin()
            while crew.workers and self.now() < self.args.until + OVERTIME:
                for number, kind, said in crew.news():
                    self.hear(number, kind, said)
                for number in sorted(crew.workers):
                    if crew.workers[number].idle:
                        self.instruct(number)
                if all(worker.idle for worker in crew.workers.values()):
                    break
        finally:
            for number, task in self.plan.running.items():
                self.log(f"worker {number} is ended in the middle of {title(task)}")
            crew.close()

    def begin(self) -> None:
        """The mode is known."""
        self.log(f"all runs in the mode {self.mode}")
        if self.plan.drop_long(self.now()):
            self.log("no long runs: there is no time for them after the rates (--long, --until)")

    def hear(self, number: int, kind: str, said: Any) -> None:
        """Take in what a worker says."""
        task, took = self.plan.running.get(number), 0.0
        if worker := self.crew.workers.get(number):
            worker.idle, took = True, self.now() - worker.began
        if kind == "ready":
            self.log(f"worker {number} is ready after {took:.0f} s")
        elif kind == "done":
            self.keep(number, task, said, took)
        else:
            self.log(f"worker {number} {kind} at {title(task)}: {said}")
            self.plan.compiled.pop(number, None)
            if isinstance(task, Job | Score):
                self.plan.lose(task, died=kind == "dead")
        self.plan.running.pop(number, None)
        if kind == "dead" and self.crew.starts[number] < STARTS:
            self.crew.start(number)
        if isinstance(task, Trial):
            self.tried()

    def keep(self, number: int, task: object, row: dict[str, Any], took: float) -> None:
        """A result."""
        plan = self.plan
        if isinstance(task, Trial):
            self.trials.append(row | {"worker": number})
            append(self.args.out.with_suffix(".trials.jsonl"), row)
            self.log(f"worker {number}, {took:.0f} s, {title(task)}: {json.dumps(row)}")
            return
        append(self.args.out, row)
        plan.take(row)
        if isinstance(task, Job):
            plan.learn(task, number, took)
            self.log(f"worker {number}, {took:.0f} s: {summary(row)}")
        else:
            plan.costs.score = took
            self.log(f"worker {number}, {took:.0f} s, {row['model']}, {row['sampling']}: {shares(row)}")

    def tried(self) -> None:
        """Choose the mode when all have been tried; while one still is, it gets little more time."""
        trying = [number for number, task in self.plan.running.items() if isinstance(task, Trial)]
        for number in trying if self.trials else ():
            worker = self.crew.workers[number]
            worker.most = min(worker.most, self.now() - worker.began + MORE)
        if trying or self.untried:
            return
        self.mode = choose_mode(sorted(self.trials, key=lambda row: self.args.modes.index(row["mode"]))) or ""
        if not self.mode:
            raise UserError("no mode of torch.compile works here, see above; --modes none goes without")
        for row in self.trials:
            if row["mode"] == self.mode and row["worker"] in self.crew.workers:
                self.plan.compiled[row["worker"]] = set(graphs(self.baseline))
        self.begin()

    def instruct(self, number: int) -> None:
        """Give an idle worker something to do, if there is something."""
        plan, crew = self.plan, self.crew
        if not self.mode:
            if self.untried:
                trial = Trial(self.untried.popleft(), self.baseline)
                self.tell(number, Order(trial, trial.mode), planned=120.0, most=TRIAL)
        elif isinstance(task := plan.next(number, self.now(), crew.free()), Job):
            planned, long = plan.cost(task, number), task.seconds > self.args.seconds
            order = Order(task, self.mode, self.args.save if long else None)
            self.tell(number, order, planned=planned, most=2 * planned + 180)
        elif task:
            self.tell(number, Order(task, self.mode, self.args.save), planned=plan.costs.score, most=180.0)

    def tell(self, number: int, order: Order, *, planned: float, most: float) -> None:
        self.plan.running[number] = order.task
        self.log(f"worker {number} begins {title(order.task)}, {planned:.0f} s")
        self.crew.tell(number, order, planned=planned, most=most)

    def report(self) -> None:
        """All that is known, in short."""
        self.log("left out: " + (", ".join(self.plan.left_out()) or "nothing"))
        rows = self.plan.finished.values()
        for row in sorted(rows, key=lambda row: (row["asked"]["seconds"], slice_loss(row))):
            print(f"{slice_loss(row):.4f}  {name_of(job_of(row)):50}  {shares(row['scores'][0])}")


def title(task: object) -> str:
    """What a task is called."""
    if isinstance(task, Job):
        return name_of(task)
    if isinstance(task, Score):
        return f"scoring {task.model}, {task.sampling}"
    return f"a trial of the mode {task.mode}" if isinstance(task, Trial) else "its start"


def shares(score: Mapping[str, Any]) -> str:
    """The numbers that there are targets for."""
    names = {
        "top-1": "concept top-1, held-out pairs", "top-5": "concept top-5, held-out pairs",
        "style": "style, held-out pairs", "seen, both": "both, seen pairs", "slice, both": "both, slice",
        "scenes": "overall",
    }  # fmt: skip
    return ", ".join(f"{short} {score[name]:.3f}" for short, name in names.items() if name in score)


def candidate(text: str) -> tuple[str, float]:
    """`mask-50:0.35` as a recipe and its share of scenes."""
    recipe, _, part = text.partition(":")
    return recipe, float(part or 0.5)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared data; made if it is not there")
    parser.add_argument("--save", type=Path, required=True, help="keep the models of the long runs here, as float16")
    parser.add_argument("--gpus", type=int, default=max(1, cuda.device_count()), help="processes, one on each")
    parser.add_argument("--until", type=float, default=1500.0, help="seconds that all may take")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for all that is compared")
    parser.add_argument("--long", type=float, default=480.0, help="of training, for what may ship; 0: no such runs")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates of the baseline")
    parser.add_argument("--ablations", nargs="*", default=ORDER, choices=ABLATIONS, metavar="RECIPE",
                        help="at the best rate, in the order of their worth")  # fmt: skip
    parser.add_argument("--candidates", nargs="*", type=candidate, default=(), metavar="RECIPE:SCENES",
                        help="long runs, or `combined`; default: it twice, candidate, the best, ...")  # fmt: skip
    parser.add_argument("--scenes", type=float, default=0.5, help="share of the images that are scenes")
    parser.add_argument("--other-scenes", type=float, default=0.35, help="the same, of one long run")
    parser.add_argument("--guidance", nargs="+", type=float, default=[3.0, 2.0, 4.0, 1.5, 5.0],
                        help="scales: the first for every run, all for the long ones")  # fmt: skip
    parser.add_argument("--interval", nargs="+", type=interval, default=[None, (0.2, 5.0)],
                        help="noise levels to guide at, likewise: all, or LOW:HIGH")  # fmt: skip
    parser.add_argument("--steps", type=int, default=30, help="sampling steps, of Heun's method")
    parser.add_argument("--per-task", type=int, default=64, help="scenes of each task")
    parser.add_argument("--set", nargs="*", default=[], help="changes of the recipes, as in micro-diffusion train")
    parser.add_argument("--modes", nargs="+", default=[MODES[0]], metavar="MODE", choices=MODES,
                        help="of a step; of several the fastest with the losses of the first")  # fmt: skip
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True,
                        help="measure the GPU's idle time")  # fmt: skip
    parser.add_argument("--judges", type=Path, default=FOLDER, help="folder of the judges")
    parser.add_argument("--device", default="cuda" if cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add_data_options(parser)
    args = parser.parse_args()
    args.mode, args.watch = args.modes[0], False
    args.samplings = [Sampling(scale, where, args.steps) for scale in args.guidance for where in args.interval]
    if args.long and args.long <= args.seconds:
        parser.error("--long is more than --seconds, or 0")
    return args


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan, with all that is in the file; UserError for a recipe that cannot be run."""
    plan = Plan(Settings(
        rates=tuple(args.rates), ablations=tuple(args.ablations), seconds=args.seconds, long=args.long,
        until=args.until, workers=args.gpus, candidates=tuple(args.candidates), samplings=tuple(args.samplings),
        scenes=args.scenes, other_scenes=args.other_scenes, settings=tuple(args.set),
    ))  # fmt: skip
    named = [role for role, _ in plan.roles if isinstance(role, str) and role != COMBINED]
    for recipe in ("baseline", *args.ablations, *named):
        if recipe not in RECIPES:
            raise UserError(f"there is no recipe {recipe!r}")
        plan.short(recipe, None).make()
    for row in read_log(args.out):
        plan.take(row)
    plan.missing = {name for name in map(name_of, plan.finished) if not (args.save / name).exists()}
    return plan


def main() -> None:
    began, args = time.perf_counter(), arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the workers are ended
    data = data_of(args)
    plan = make_plan(args)
    prepare_data(args.data, data, args.device)
    used = [str(row["mode"]) for row in plan.finished.values()]
    mode = used[-1] if used else args.modes[0] if len(args.modes) == 1 else ""  # all runs alike
    comparison = Comparison(args, plan, lambda: time.perf_counter() - began, mode)
    comparison.log("data are ready")
    comparison.run()
    comparison.report()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"quality_all: {error}") from None
