"""What quality_all runs next: which rate, in which order, on which worker, and that the long runs get their time."""

import math
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import quality_all
from benchmarks.quality import Job
from benchmarks.quality_all import ORDER, RATES, arguments, make_plan
from benchmarks.quality_plan import (
    CHANGES,
    MARGIN,
    Plan,
    Score,
    Settings,
    assigned,
    beyond,
    choose_mode,
    fitting,
    graphs,
    middle_first,
    slice_loss,
)  # fmt: skip
from benchmarks.quality_score import Sampling
from micro_diffusion.cli.train import override

WORTH = ("no-mixer", "no-unmasked", "mask-0", "mask-50", "mask-87", "no-experts", "constant-widths", "smaller",
         "less-noise", "averages", "muon", "less-decay")  # fmt: skip
SETTINGS = Settings(
    rates=RATES, ablations=WORTH, seconds=60.0, long=480.0, until=1500.0, workers=4,
    samplings=(Sampling(3.0), Sampling(2.0)),
)  # fmt: skip
LOSSES = {name: 0.30 + 0.01 * index for index, name in enumerate(WORTH)} | {"baseline": 0.345, "candidate": 0.28}


def row(job: Job, loss: float, right: float = 0.5) -> dict[str, Any]:
    return {
        "asked": job.asked(), "validation": {"average": {"slice": loss}, "weights": {"slice": 9.0}},
        "scores": [{"sampling": str(Sampling(3.0)), "both, slice": right}], "images": 100,
    }  # fmt: skip


def loss_of(job: Job, best: float = 1.6e-3) -> float:
    return LOSSES[job.recipe] + abs(math.log(job.rate / best)) + 0.001 * job.seed  # type: ignore[operator]


def simulated(plan: Plan, *, start: float, best: float = 1.6e-3) -> list[tuple[float, float, int, Job | Score]]:
    """Every worker does what the plan says, in exactly the time that it expects: (from, to, worker, task)."""
    ends, done = dict.fromkeys(range(plan.settings.workers), start), list[tuple[float, float, int, Job | Score]]()
    now = start
    while True:
        for worker, task in list(plan.running.items()):
            if ends[worker] <= now:
                plan.running.pop(worker)
                if isinstance(task, Job):
                    plan.compiled.setdefault(worker, set()).update(graphs(task))
                    plan.take(row(task, loss_of(task, best)))
                else:
                    plan.take({"model": task.model, "sampling": str(task.sampling)})
        for worker in ends:
            if worker not in plan.running:
                free = {other: max(now, end) for other, end in ends.items()}
                if task := plan.next(worker, now, free):
                    takes = plan.cost(task, worker) if isinstance(task, Job) else plan.costs.score
                    done.append((now, now + takes, worker, task))
                    plan.running[worker], ends[worker] = task, now + takes
        if not plan.running:
            return done
        now = min(ends[worker] for worker in plan.running)


def test_the_middle_is_tried_first() -> None:
    assert middle_first([1, 2, 3, 4, 5, 6]) == [3, 4, 2, 5, 1, 6]
    assert middle_first([3, 1, 2]) == [2, 1, 3] and middle_first([7]) == [7]


def test_one_rate_beyond_the_edge_alone() -> None:
    assert beyond(RATES, 1.2e-3) is None and beyond([1e-3], 1e-3) is None
    assert beyond(RATES, 4e-4) == 2e-4 and beyond(RATES, 3.2e-3) == 4.3e-3


def test_a_run_that_diverged_is_the_worst() -> None:
    job = Job("baseline", 1e-3, 0, 60.0, 0.5, ())
    assert slice_loss(row(job, math.nan)) == math.inf and slice_loss(row(job, 0.3)) == 0.3


def test_the_model_whose_pictures_are_right_is_scored_first() -> None:
    plan, some = Plan(SETTINGS), [Job("baseline", 1e-3, seed, 480.0, 0.5, ()) for seed in range(3)]
    for job, loss, right in zip(some, (0.2, 0.3, 0.4), (0.5, 0.7, 0.6), strict=True):
        plan.finished[job] = row(job, loss, right)
    assert [score.model for score in plan.scores()[:3]] == [
        f"baseline-0.001-seed-{seed}-480s-scenes-0.5" for seed in (1, 2, 0)
    ]


def jobs(*seconds: float) -> list[Job]:
    return [Job("baseline", 1e-3, index, each, 0.5, ()) for index, each in enumerate(seconds)]


def seconds(job: Job, worker: int) -> float:
    return job.seconds


def test_the_longest_begins_and_no_worker_is_left_behind() -> None:
    plan, end = assigned(jobs(10, 40, 20, 30), seconds, {0: 0.0, 1: 0.0})
    assert [[job.seconds for job in plan[worker]] for worker in (0, 1)] == [[40, 10], [30, 20]] and end == 50
    plan, end = assigned(jobs(10, 10), seconds, {0: 15.0, 1: 0.0})
    assert plan.keys() == {1} and end == 20


def test_what_does_not_fit_is_left_out_from_the_end() -> None:
    plan = fitting(jobs(30, 40, 50, 10), seconds, {0: 0.0, 1: 0.0}, 50.0)
    assert sorted(job.seconds for some in plan.values() for job in some) == [10, 30, 40]
    assert fitting(jobs(30), seconds, {0: 25.0}, 50.0) == {}


def test_the_fastest_mode_with_the_same_losses() -> None:
    slow = {"mode": "default", "seconds": 100.0, "losses": [0.5, 0.4]}
    fast = {"mode": "reduce-overhead", "seconds": 80.0, "losses": [0.503, 0.399]}
    assert choose_mode([slow, fast]) == "reduce-overhead" and choose_mode([fast]) == "reduce-overhead"
    assert choose_mode([slow, fast | {"losses": [0.5, 0.42]}]) == "default"
    assert choose_mode([slow, fast | {"losses": [0.5, math.nan]}]) == "default"
    assert choose_mode([slow, fast | {"seconds": 99.0}]) == "default" and choose_mode([]) is None


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("start", [200.0, 350.0])
def test_long_runs_get_their_time_and_all_ends_before_the_end(workers: int, start: float) -> None:
    plan = Plan(replace(SETTINGS, workers=workers))
    done = simulated(plan, start=start)
    assert max(end for _, end, _, _ in done) <= SETTINGS.until - MARGIN / 2
    long = [task for _, _, _, task in done if isinstance(task, Job) and task.seconds > 60]
    assert [task.seconds for task in long] == [480.0] * workers and long[0].recipe == "candidate"
    assert len({task for *_, task in done}) == len(done)


def test_all_of_it_on_four() -> None:
    plan = Plan(SETTINGS)
    done = simulated(plan, start=220.0)
    short = [task for *_, task in done if isinstance(task, Job) and task.seconds == 60]
    assert {task.rate for task in short if task.recipe == "baseline" and not task.seed} == set(RATES)
    assert {task.recipe for task in short} >= {"baseline", *WORTH[:8]}
    long = [task for *_, task in done if isinstance(task, Job) and task.seconds > 60]
    assert {(task.recipe, task.rate) for task in long} == {("candidate", 3.2e-3), ("no-mixer", 1.6e-3)}
    assert {task.scenes for task in long} == {0.5, 0.35}
    assert {(task.recipe, *task.settings) for task in long} == {
        ("candidate", "model.use_patch_mixer=false"), ("candidate",), ("no-mixer",),
    }  # fmt: skip
    scores = [task for *_, task in done if isinstance(task, Score)]
    assert {task.sampling.guidance for task in scores} == {2.0} and len(scores) == 4  # at 3 each run is scored


def test_without_an_end_everything_is_run_with_second_seeds_of_what_is_close() -> None:
    plan = Plan(replace(SETTINGS, until=math.inf))
    done = simulated(plan, start=220.0)
    assert plan.left_out() == []
    seeds = {task.recipe for *_, task in done if isinstance(task, Job) and task.seed}
    assert {"baseline", "mask-87", "no-experts"} <= seeds
    assert plan.ranking()[:3] == ["no-mixer", "no-unmasked", "mask-0"]
    again = Plan(plan.settings, finished=dict(plan.finished), scored=set(plan.scored))
    assert not again.drop_long(0.0) and not again.roles  # all are done
    assert simulated(again, start=0.0) == []


def test_a_best_rate_at_the_edge_gets_one_beyond() -> None:
    plan = Plan(replace(SETTINGS, until=math.inf, ablations=("mask-0",)))
    done = simulated(plan, start=0.0, best=9e-3)
    rates = {task.rate for *_, task in done if isinstance(task, Job) and task.recipe == "baseline"}
    assert rates == {*RATES, 4.3e-3} and plan.rate() == 4.3e-3
    assert plan.short("mask-0", 4.3e-3) in plan.finished


def test_short_runs_alone_where_long_ones_have_no_time() -> None:
    plan = Plan(replace(SETTINGS, until=580.0))
    assert plan.drop_long(220.0) and not plan.roles
    assert all(isinstance(task, Job) and task.seconds == 60 for *_, task in simulated(plan, start=220.0))
    known = Plan(replace(SETTINGS, until=580.0))
    for job in plan.rates():
        known.take(row(job, loss_of(job)))
    assert not known.drop_long(40.0)
    (first, *_) = simulated(known, start=40.0)
    assert isinstance(first[3], Job) and first[3].recipe == "candidate" and 240 <= first[3].seconds < 480


def test_what_failed_is_not_run_again_and_holds_nothing_up() -> None:
    plan = Plan(replace(SETTINGS, until=math.inf))
    plan.failed.update(plan.rates())
    done = simulated_recipes(plan)
    assert "candidate" in done and "mask-0" in done


def test_a_long_run_whose_process_died_is_run_again_in_short() -> None:
    plan = Plan(replace(SETTINGS, workers=1, rates=(1e-3,), ablations=()))
    plan.take(row(plan.short("baseline", 1e-3), 0.3))
    plan.take(row(plan.short("baseline", 1e-3, 1), 0.3))
    first = plan.next(0, 600.0, {0: 600.0})
    assert isinstance(first, Job) and first.seconds == 480
    plan.lose(first, died=True)
    again = plan.next(0, 1000.0, {0: 1000.0})
    assert isinstance(again, Job) and again.recipe == first.recipe and 240 <= again.seconds < 480
    plan.lose(again, died=False)
    assert plan.next(0, 1100.0, {0: 1100.0}) is None


def simulated_recipes(plan: Plan) -> list[str]:
    """Recipes that are begun where no rate is known, on one worker after the other."""
    found = []
    while isinstance(task := plan.next(0, 0.0, {0: 0.0}), Job):
        found.append(task.recipe)
        plan.failed.add(task)
    return found


def test_what_was_better_than_the_baseline_is_combined() -> None:
    plan = Plan(replace(SETTINGS, settings=("text_length=16",)))
    losses = {"baseline": 0.3, "muon": 0.29, "no-mixer": 0.4, "less-noise": 0.2989, "less-decay": 0.29}
    for name, loss in losses.items():
        plan.take(row(plan.short(name, 1.6e-3), loss))
    plan.take(row(plan.short("muon", 3.2e-3), 0.28))
    assert [job.rate for job in plan.tried("muon")] == [1.6e-3, 3.2e-3, 6.4e-3, 1.28e-2]
    job = plan.long_run("combined", 0.5, 480.0)
    assert (job.rate, job.settings) == (3.2e-3, ("text_length=16", "optimizer=muon", "weight_decay=0.01"))
    recipe = job.make()
    assert (recipe.name, recipe.optimizer, recipe.weight_decay) == ("candidate", "muon", 0.01)
    assert plan.ranking() == ["muon", "less-decay", "less-noise", "baseline", "no-mixer"]
    assert [plan.long_run(role, 0.5, 480.0).rate for role in (0, 1, "candidate")] == [3.2e-3, 1.6e-3, 3.2e-3]


def test_workers_find_what_other_commands_compiled() -> None:
    """torch's keys would have the name of the first module that binds `torch`, a worker's copy of this one."""
    assert not hasattr(quality_all, "torch")


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_what_its_ablation_changes(name: str) -> None:
    base, changed = (Job(recipe, 1e-3, 0, 60.0, 0.5, ()).make() for recipe in ("baseline", name))
    assert name in ORDER and override(base, CHANGES[name]) == replace(changed, name="baseline") != base


def test_candidates_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["quality_all", "--out", "a", "--data", "b", "--save", "c", "--candidates", "mask-50:0.4", "combined"]
    monkeypatch.setattr("sys.argv", words)
    assert make_plan(arguments()).roles == [("mask-50", 0.4), ("combined", 0.5)]
