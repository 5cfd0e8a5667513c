"""Cases of benchmarks/scaling.py, what their steps tell, and the hours and dollars of the paper's whole run."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from micro_diffusion.cli.plan import works_of
from micro_diffusion.planning.cost import Machine
from micro_diffusion.recipes.paper import paper_37m
from micro_diffusion.runtime.hardware import GPUS, Gpu
from micro_diffusion.training.config import Recipe

PAPER = {f"{stage.resolution}:{stage.mask_ratio:g}": stage for stage in paper_37m().stages}


@dataclass(frozen=True)
class Case:
    """A stage on so many GPUs; one GPU's mode is `single`."""

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
    cases += [Case(stage, count, mode) for stage in stages for count in counts if count > 1 for mode in modes]
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
    seconds: Sequence[float], *, every: int, lead: int = 0, saves: Sequence[tuple[int, int, float]] = ()
) -> dict[str, float | list[float]]:
    """Mean seconds of a plain step, and what a row of the log and each checkpoint take beside.

    `seconds[k]` lies between the ends of step k and of the next, counted from 1 (`seconds[0]` ends with the first).
    Rows follow steps that `every` divides. A save is (step after which it began, last step that it held up, seconds
    that it waited for the one before); it is held to account up to the next. Steps up to the first row, or the first
    `lead`, and the one after are not counted.
    """
    saving = {step for start, last, _ in saves for step in range(start, last)}
    steps = range(max(every, lead) + 1, len(seconds))
    plain = [seconds[step] for step in steps if step % every and step not in saving]
    rows = [seconds[step] for step in steps if step % every == 0 and step not in saving]
    mean = statistics.mean(plain)
    row = max(0.0, statistics.mean(rows) - mean) if rows else 0.0

    def lost(start: int, last: int, waited: float) -> float:
        next_one = min((other for other, _, _ in saves if other > start), default=len(seconds))
        held = range(start, min(last, next_one, len(seconds)))
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


def whole_runs(
    rows: Mapping[str, Mapping[str, Any]], gpu: Gpu | None, price: float | None, share: int = 0
) -> list[dict[str, Any]]:
    """The paper's run by number of GPUs and mode, where all stages were measured, beside the planner's forecast.

    That is for steps of `share` images on each GPU, as they were measured; of the recipe's batches if it is 0.
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
            works = [work._replace(batch_size=share * ranks or work.batch_size) for work in works_of(recipe)]
            expected = [planned.seconds(work) / 3600 for work in works]
            run["planner"] = bill(dict(zip(PAPER, expected, strict=True)), ranks, price)
        found.append(run)
    return found


def completed(result: dict[str, Any], price: float | None) -> dict[str, Any]:
    """The result with what follows from its rows: efficiencies, hours, dollars."""
    rows = result["cases"]
    for name, row in rows.items():
        case = Case.named(name)
        alone = rows.get(Case(case.stage, 1, "single").name, {}).get("images_per_second")
        if alone and case.ranks > 1 and "images_per_second" in row:
            row["efficiency_against_single"] = round(row["images_per_second"] / case.ranks / alone, 4)
    name = result.get("machine", {}).get("device", "").removeprefix("NVIDIA ")
    gpu = next((gpu for gpu in GPUS.values() if name in gpu.names), None)
    return result | {"whole_run": whole_runs(rows, gpu, price, result.get("images_a_gpu", 0))}
