"""What benchmarks/quality_all.py runs next, by what is known so far: rates, ablations, second seeds, long runs, scores.

Pure: it sees jobs, rows of results and clocks, and starts nothing.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from benchmarks.quality import Job, name_of
from benchmarks.quality_score import Sampling

Row = Mapping[str, Any]
Graph = tuple[Any, float]  # a shape of model at a mask ratio: what is compiled
MARGIN = 20.0  # seconds that are left free before the end
CLOSEST = 3  # ablations that get a second seed
COMBINED = "combined"  # the role of the recipe `candidate` with every change that was BETTER, as a part of the loss
BETTER = 0.005
CHANGES = {
    "muon": ("optimizer=muon",), "less-decay": ("weight_decay=0.01",), "no-experts": ("model.num_experts=0",),
    "no-mixer": ("model.use_patch_mixer=false",), "less-noise": ("stages.0.p_mean=-1.2", "stages.1.p_mean=-1.2"),
}  # fmt: skip
FACTORS = {"muon": (1.0, 2.0, 4.0, 8.0)}  # of the best rate at which a recipe is tried; the others at that rate alone
SAME, FASTER = 0.01, 0.98  # losses of two modes of torch.compile at most so far apart; worth changing from this time on


@dataclass(frozen=True)
class Score:
    """A saved model and a way of sampling."""

    model: str
    sampling: Sampling


@dataclass(frozen=True)
class Settings:
    """What the command was asked for."""

    rates: tuple[float, ...]
    ablations: tuple[str, ...]  # in the order of their worth
    seconds: float
    long: float  # 0: no long runs
    until: float
    workers: int
    candidates: tuple[tuple[str, float], ...] = ()  # recipes with shares of scenes; none: as `roles` says
    samplings: tuple[Sampling, ...] = ()
    scenes: float = 0.5
    other_scenes: float = 0.35
    settings: tuple[str, ...] = ()


@dataclass
class Costs:
    """Seconds beyond training, guessed first, then as seen."""

    run: float = 35.0  # to validate, score, save
    graph: float = 60.0  # to compile one
    again: float = 20.0  # the same in another process, which finds the kernels
    score: float = 15.0  # to draw for one way of sampling, and judge

    def learn(self, besides: float, new: int, again: int) -> None:
        """From the seconds of a run beyond its training, in which so many graphs were compiled."""
        if new:
            self.graph = max(1.0, (besides - self.run - again * self.again) / new)
        elif again:
            self.again = max(1.0, (besides - self.run) / again)
        else:
            self.run = max(1.0, besides)


@cache
def graphs(job: Job) -> frozenset[Graph]:
    """What must be compiled for a job."""
    return frozenset((stage.mask_ratio, repr(job.make().model)) for stage in job.make().stages)  # type: ignore[misc]


@cache
def averages(job: Job) -> int:
    """How many averages of a job are scored."""
    return max(1, len(job.make().stages[-1].ema_sigma_rel))


def slice_loss(row: Row) -> float:
    """Of the weights that are shown: the (first) average, else the weights. A run that diverged has the worst."""
    loss = float(next(iter(row["validation"].values()))["slice"])
    return loss if math.isfinite(loss) else math.inf


def middle_first(values: Sequence[float]) -> list[float]:
    """From the middle outwards: what is known early is near the best."""
    order, centre = sorted(values), (len(values) - 1) / 2
    return [order[index] for index in sorted(range(len(order)), key=lambda index: abs(index - centre))]


def beyond(rates: Sequence[float], best: float) -> float | None:
    """One rate more beyond the best, if that is the first or last of several."""
    order = sorted(rates)
    if len(order) < 2 or best not in (order[0], order[-1]):
        return None
    near = order[1] if best == order[0] else order[-2]
    return float(f"{best * best / near:.2g}")


def assigned(
    jobs: Iterable[Job], cost: Callable[[Job, int], float], free: Mapping[int, float]
) -> tuple[dict[int, list[Job]], float]:
    """The longest first, each to the worker that ends it first; and when all have ended. `free`: when a worker is."""
    ends, plan = dict(free), dict[int, list[Job]]()
    for job in sorted(jobs, key=lambda job: -max(cost(job, worker) for worker in free)):
        worker = min(ends, key=lambda worker: ends[worker] + cost(job, worker))
        ends[worker] += cost(job, worker)
        plan.setdefault(worker, []).append(job)
    return plan, max((ends[worker] for worker in plan), default=0.0)


def fitting(
    jobs: Iterable[Job], cost: Callable[[Job, int], float], free: Mapping[int, float], deadline: float
) -> dict[int, list[Job]]:
    """As many of the jobs as end before the deadline, taken in their order, spread over the workers."""
    chosen, plan = list[Job](), dict[int, list[Job]]()
    for job in jobs:
        trial, end = assigned([*chosen, job], cost, free)
        if end <= deadline:
            chosen, plan = [*chosen, job], trial
    return plan


def choose_mode(trials: Sequence[Row]) -> str | None:
    """The fastest mode of torch.compile whose losses are those of the first that works; None if none does."""
    if not trials:
        return None
    first = trials[0]
    same = [
        trial for trial in trials
        if all(abs(loss / true - 1) <= SAME for loss, true in zip(trial["losses"], first["losses"], strict=True))
    ]  # fmt: skip
    fastest = min(same, key=lambda trial: trial["seconds"], default=first)
    return str(fastest["mode"] if fastest["seconds"] < FASTER * first["seconds"] else first["mode"])


@dataclass
class Plan:
    """The state of the comparison; `next` says what a worker that has nothing to do should."""

    settings: Settings
    finished: dict[Job, Row] = field(default_factory=dict)
    scored: set[tuple[str, str]] = field(default_factory=set)  # model, sampling
    failed: set[Job | Score] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)  # models of earlier calls that are not here
    running: dict[int, object] = field(default_factory=dict)  # by worker
    compiled: dict[int, set[Graph]] = field(default_factory=dict)
    costs: Costs = field(default_factory=Costs)
    roles: list[tuple[str | int, float]] = field(init=False)

    def __post_init__(self) -> None:
        """Long runs, in the order in which they are started: a recipe, or a rank in the short runs, and its scenes."""
        some = self.settings
        self.roles = [*some.candidates]
        if not self.roles:
            self.roles += [(COMBINED, some.scenes), (COMBINED, some.other_scenes), ("candidate", some.scenes)]
            for rank in range(some.workers):
                self.roles += [(rank, some.scenes), (rank, some.other_scenes)]
            del self.roles[some.workers :]
        if not some.long:
            self.roles.clear()

    def short(self, recipe: str, rate: float | None, seed: int = 0) -> Job:
        some = self.settings
        return Job(recipe, rate, seed, some.seconds, some.scenes, some.settings)

    def loss(self, job: Job) -> float | None:
        return slice_loss(self.finished[job]) if job in self.finished else None

    def settled(self, jobs: Iterable[Job]) -> bool:
        return all(job in self.finished or job in self.failed for job in jobs)

    def rates(self) -> list[Job]:
        """Phase 1; once all are known, with one more if the best is at the edge."""
        jobs = [self.short("baseline", rate) for rate in middle_first(self.settings.rates)]
        losses = {rate: loss for rate, job in zip(map(_rate, jobs), jobs, strict=True)
                  if (loss := self.loss(job)) is not None}  # fmt: skip
        if losses and self.settled(jobs):
            more = beyond(self.settings.rates, min(losses, key=losses.__getitem__))
            jobs += [self.short("baseline", more)] if more else []
        return jobs

    def rate(self) -> float | None:
        """The best so far; None while there is none."""
        found = {_rate(job): loss for job in self.rates() if (loss := self.loss(job)) is not None}
        return min(found, key=found.__getitem__) if found else None

    def ablations(self) -> list[Job]:
        """Phase 2, at the best rate so far."""
        known = self.rate() is not None or self.settled(self.rates())
        return [job for name in self.settings.ablations for job in self.tried(name)] if known else []

    def tried(self, recipe: str) -> list[Job]:
        """The short runs of a recipe, seed 0."""
        rate, factors = self.rate(), FACTORS.get(recipe, (1.0,))
        rates = [float(f"{rate * factor:.6g}") for factor in factors] if rate else [None]
        return [self.short(recipe, each) for each in rates]

    def best(self, recipe: str) -> Job | None:
        """Of these, the one with the lowest loss on the slice; None while there is none."""
        losses = {job: loss for job in self.tried(recipe) if (loss := self.loss(job)) is not None}
        return min(losses, key=losses.__getitem__, default=None)

    def seeds(self) -> list[Job]:
        """Phase 3: the baseline and the ablations closest to it so far, but for one that only averages otherwise."""
        losses = {
            job: slice_loss(self.finished[job]) for name in ("baseline", *self.settings.ablations)
            if (job := self.best(name)) and averages(job) == 1
        }  # fmt: skip
        base = self.best("baseline")
        if base is None:
            return []
        apart = {job: abs(loss - losses[base]) for job, loss in losses.items() if job != base}
        return [replace(job, seed=1) for job in (base, *sorted(apart, key=apart.__getitem__)[:CLOSEST])]

    def ranking(self) -> list[str]:
        """Recipes by their mean loss on the slice at their best rate, over seeds."""
        losses: dict[str, list[float]] = {}
        for job, row in self.finished.items():
            if (best := self.best(job.recipe)) and job == replace(best, seed=job.seed):
                losses.setdefault(job.recipe, []).append(slice_loss(row))
        return sorted(losses, key=lambda name: statistics.fmean(losses[name]))

    def to_compile(self, job: Job, worker: int) -> tuple[int, int]:
        """Graphs that no process has compiled yet, and that only others have."""
        missing = graphs(job) - self.compiled.get(worker, set())
        new = len(missing.difference(*self.compiled.values()))
        return new, len(missing) - new

    def cost(self, job: Job, worker: int) -> float:
        """Seconds that a job takes on a worker."""
        new, again = self.to_compile(job, worker)
        compiling = new * self.costs.graph + again * self.costs.again
        return job.seconds + self.costs.run + compiling + (averages(job) - 1) * self.costs.score

    def after_long(self) -> float:
        """Seconds besides the training of a long run: to compile, to score as every run, to score in all other ways."""
        return self.costs.run + self.costs.graph + self.costs.score * max(0, len(self.settings.samplings) - 1)

    def deadline(self) -> float:
        """When short runs must have ended."""
        long = self.settings.long * 1.02 + self.after_long() if self.roles else 0.0
        return self.settings.until - MARGIN - long

    def drop_long(self, now: float) -> bool:
        """Forget the long runs that are done, and all if there is no time for them after the rates: True then."""
        self.roles = [role for role in self.roles if self.long_run(*role, self.settings.long) not in self.finished]
        impossible = bool(self.roles) and self.deadline() < now and not self.settled(self.rates())
        if impossible:
            self.roles.clear()
        return impossible

    def learn(self, job: Job, worker: int, wall: float) -> None:
        """From the seconds that a run took, before its graphs count as compiled."""
        besides = wall - job.seconds - (averages(job) - 1) * self.costs.score
        self.costs.learn(besides, *self.to_compile(job, worker))
        self.compiled.setdefault(worker, set()).update(graphs(job))

    def take(self, row: Row) -> None:
        """A row of the results: of a run, or of a saved model."""
        if "asked" in row:
            job = job_of(row)
            self.finished[job] = row
            self.scored |= {(name_of(job), score["sampling"]) for score in row["scores"]}
        elif "model" in row:
            self.scored.add((row["model"], row["sampling"]))

    def lose(self, task: Job | Score, *, died: bool) -> None:
        """What failed is not tried again; a long run whose process died is, if it can be shortened to what is left."""
        self.failed.add(task)
        if died and isinstance(task, Job) and task.seconds > self.settings.seconds:
            self.roles.insert(0, (task.recipe, task.scenes))

    def open(self, jobs: Iterable[Job]) -> list[Job]:
        """What is neither done nor running."""
        others = self.running.values()
        return [job for job in jobs if job not in self.finished and job not in self.failed and job not in others]

    def next(self, worker: int, now: float, free: Mapping[int, float]) -> Job | Score | None:
        """What this idle worker does; `free` says when each worker will be. None: wait, or end if nothing runs.

        Once the long runs have begun, what is saved is scored first; what short runs are left come after it.
        """
        if not self.roles and (score := self.next_score(now)):
            return score
        free = {worker: now, **free}  # the first of those that are free at once
        for phase in (self.rates, self.ablations, self.seeds):
            mine = fitting(self.open(phase()), self.cost, free, self.deadline()).get(worker)
            if mine:
                return mine[0]
        return self.next_long(worker, now) or self.next_score(now)

    def next_long(self, worker: int, now: float) -> Job | None:
        """The next long run, shortened to what is left, to a half at most. It waits for rates that run, if it can."""
        if now < self.deadline() and any(job in self.running.values() for job in self.rates()):
            return None
        while self.roles:
            seconds = min(self.settings.long, self.left_for_long(worker, now))
            if seconds < self.settings.long / 2:
                self.roles.clear()
                break
            job = self.long_run(*self.roles.pop(0), seconds)
            if self.open([job]):
                return job
        return None

    def long_run(self, role: str | int, share: float, seconds: float) -> Job:
        """At the recipe's best rate, or the baseline's, or its own; a rank is the recipe that has it now."""
        ranked = [*self.ranking(), "baseline"]
        recipe = role if isinstance(role, str) else ranked[min(role, len(ranked) - 1)]
        settings, same = self.settings.settings, self.best(recipe)
        if recipe == COMBINED:
            better = self.better()
            settings += tuple(setting for name in better for setting in CHANGES[name])
            recipe, same = "candidate", self.best("muon") if "muon" in better else None
        rate = same.rate if same else self.rate()
        if recipe == "candidate" and not same:  # Muon's, of which the baseline's says nothing
            rate = self.short(recipe, None).make().stages[0].learning_rate
        return Job(recipe, rate, 0, seconds, share, settings)

    def better(self) -> list[str]:
        """The changes with which the short baseline was better."""
        base, found = self.best("baseline"), {name: self.best(name) for name in CHANGES}
        losses = {name: slice_loss(self.finished[job]) for name, job in found.items() if job}
        return [name for name, loss in losses.items() if base and loss < (1 - BETTER) * slice_loss(self.finished[base])]

    def left_for_long(self, worker: int, now: float) -> float:
        """Seconds of training, in whole tens, that end before the time is up, without other ways of sampling."""
        role, share = self.roles[0]
        recipe = role if isinstance(role, str) and role != COMBINED else "baseline"
        besides = self.cost(Job(recipe, None, 0, 0.0, share, self.settings.settings), worker)
        left = (self.settings.until - MARGIN - now - besides) / 1.02
        return math.inf if math.isinf(left) else 10 * math.floor(left / 10)

    def next_score(self, now: float) -> Score | None:
        """A saved long model in another way of sampling: the first way for all, the best model first."""
        if now + self.costs.score > self.settings.until - MARGIN / 2:
            return None
        for score in self.scores():
            known = (score.model, str(score.sampling)) in self.scored or score in self.failed
            if not known and score not in self.running.values():
                return score
        return None

    def scores(self) -> list[Score]:
        """All that could be scored, of models that are saved."""
        long = [job for job in self.finished if job.seconds > self.settings.seconds]
        rows = sorted(map(self.finished.__getitem__, long), key=slice_right, reverse=True)
        models = [name for name in map(name_of, map(job_of, rows)) if name not in self.missing]
        return [Score(model, sampling) for sampling in self.settings.samplings for model in models]

    def left_out(self) -> list[str]:
        """Names of the short runs and sampling that there was no time for."""
        jobs = self.open([*self.rates(), *self.ablations(), *self.seeds()])
        scores = [score for score in self.scores() if (score.model, str(score.sampling)) not in self.scored]
        roles = [f"a long run of {role if isinstance(role, str) else f'number {role + 1}'}" for role, _ in self.roles]
        return [*map(name_of, jobs), *roles, *([f"{len(scores)} scores of saved models"] if scores else [])]


def _rate(job: Job) -> float:
    return job.rate or 0.0


def slice_right(row: Row) -> float:
    """Share of the slice's captions whose picture shows concept and style, drawn in the first way of sampling."""
    return float(row["scores"][0].get("both, slice", 0.0))


def job_of(row: Row) -> Job:
    """The job of a run's row."""
    return Job(**{**row["asked"], "settings": tuple(row["asked"]["settings"])})
