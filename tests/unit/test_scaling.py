"""The benchmark of several GPUs: which cases come first, what steps tell, and hours and dollars of the paper's run."""

import json
from pathlib import Path

import pytest

from benchmarks import scaling_plan as scaling
from benchmarks.scaling_plan import Case
from micro_diffusion.cli.plan import works_of
from micro_diffusion.planning.cost import Machine
from micro_diffusion.recipes.paper import BATCH, paper_37m
from micro_diffusion.runtime.hardware import GPUS
from scripts import results

STAGES = list(scaling.PAPER)


def test_stages_are_the_papers() -> None:
    assert STAGES == ["256:0.75", "256:0", "512:0.75", "512:0"]


def test_cases_that_tell_most_come_first() -> None:
    cases = scaling.ordered(STAGES, [1, 2, 4], ["ddp", "fsdp", "hybrid"])
    assert len(cases) == len(set(cases)) == 4 * (1 + 2 * 3)
    assert [case.name for case in cases[:4]] == ["256:0.75 x1 single", "256:0.75 x4 ddp", "256:0.75 x4 fsdp",
                                                 "256:0.75 x2 ddp"]  # fmt: skip
    assert [case.name for case in cases[4:10]] == [
        f"{stage} {how}" for stage in STAGES[1:] for how in ("x1 single", "x4 ddp")
    ]  # fmt: skip
    assert [(case.ranks, case.mode) for case in cases[10:17]] == [(4, "fsdp")] * 3 + [(4, "hybrid")] * 4
    assert all(Case.named(case.name) == case for case in cases)
    assert [case.name for case in scaling.ordered(["512:0"], [4], ["fsdp"])] == ["512:0 x4 fsdp"]


def test_cases_run_beside_others_where_they_fit() -> None:
    cases = [Case("a", ranks, "ddp") for ranks in (4, 2, 1, 4, 3, 1)]
    # the same case twice would be left out twice
    cases = [Case(str(index), case.ranks, "ddp") for index, case in enumerate(cases)]
    one_by_one = list(scaling.rounds(cases, 4, alone=lambda case: True))
    assert one_by_one == [[case] for case in cases]
    beside = list(scaling.rounds(cases, 4, alone=lambda case: case.stage == "2"))
    assert [[case.ranks for case in some] for some in beside] == [[4], [2, 1], [1], [4], [3]]
    assert [case.stage for case in beside[1]] == ["1", "5"]


def test_rows_of_the_log_and_checkpoints_are_told_from_plain_steps() -> None:
    """A row takes 0.5 s, the checkpoint after step 9 3 s at once and 0.1 s a step; it waited 1 s for another."""
    seconds = [9.0] * 4 + [1.0] * 16
    for step in range(6, 20, 3):
        seconds[step] += 0.5
    seconds[9] += 3.0
    for step in range(9, 13):
        seconds[step] += 0.1
    found = scaling.analysed(seconds, every=3, saves=[(9, 13, 1.0)])
    assert found["step_seconds"] == found["median_step_seconds"] == pytest.approx(1)
    assert found["row_seconds"] == pytest.approx(0.5)
    assert found["lost_seconds"] == pytest.approx([3 + 0.4 - 1])
    # the next one, after step 12, waits 2 s for it
    seconds[12] += 2.0
    found = scaling.analysed(seconds, every=3, saves=[(9, 13, 1.0), (12, 14, 2.0)])
    assert found["lost_seconds"] == pytest.approx([3 + 0.3 - 1, 0.1])
    assert scaling.analysed(seconds[:9], every=3)["lost_seconds"] == []
    assert scaling.analysed([9.0] * 5 + [1.0, 2.0, 1.0, 1.0], every=3, lead=4)["step_seconds"] == 1.0


def rows(speed: float, **more: object) -> dict[str, dict[str, object]]:
    row: dict[str, object] = {"images_per_second": speed, "row_seconds": 0.0, "lost_seconds": []}
    return {Case(stage, 4, "ddp").name: row | more for stage in STAGES}


def test_hours_and_dollars_of_the_papers_run() -> None:
    images = (250_000 + 30_000 + 50_000 + 5_000) * BATCH
    (run,) = scaling.whole_runs(rows(4000.0), GPUS["h100"], None)
    assert (run["gpus"], run["mode"], run["price"]) == (4, "ddp", GPUS["h100"].price)
    assert run["hours"] == pytest.approx(images / 4000 / 3600)
    assert run["gpu_hours"] == pytest.approx(4 * run["hours"])
    assert run["dollars"] == pytest.approx(4 * run["hours"] * 2.90)
    assert list(run["stage_hours"]) == STAGES
    works = works_of(paper_37m())
    assert run["planner"]["hours"] == pytest.approx(sum(map(Machine(GPUS["h100"], 4).seconds, works)) / 3600)
    (shares,) = scaling.whole_runs(rows(4000.0), GPUS["h100"], None, 256)
    works = [work._replace(batch_size=1024) for work in works]
    assert shares["planner"]["hours"] == pytest.approx(sum(map(Machine(GPUS["h100"], 4).seconds, works)) / 3600)
    assert shares["hours"] == run["hours"]
    (cheap,) = scaling.whole_runs(rows(4000.0), GPUS["h100"], 1.0)
    assert cheap["dollars"] == pytest.approx(cheap["gpu_hours"])


def test_rows_and_checkpoints_enter_the_hours_as_often_as_the_recipe_has_them() -> None:
    """A row after 50 steps of 2,048 images, a checkpoint after 1,000; one measured stage tells for the others."""
    measured = rows(4000.0, row_seconds=2.0)
    measured[Case(STAGES[0], 4, "ddp").name] |= {"checkpoint_lost_seconds": 10.0}
    (run,) = scaling.whole_runs(measured, None, None)
    steps = 335_000
    assert run["hours"] * 3600 == pytest.approx(steps * BATCH / 4000 + steps / 50 * 2 + steps / 1000 * 10)
    assert run["dollars"] is None and "planner" not in run


def test_a_run_without_one_of_its_stages_has_no_hours() -> None:
    measured = rows(4000.0)
    del measured[Case("512:0", 4, "ddp").name]
    assert scaling.whole_runs(measured, GPUS["h100"], None) == []


def test_scaling_is_a_table_of_cases_and_one_of_whole_runs(tmp_path: Path) -> None:
    alone = {Case(stage, 1, "single").name: {"images_per_second": 1040.0, "row_seconds": 0.25} for stage in STAGES}
    several = rows(4000.0, peak_gb=[70.0, 76.02], micro_batch=256, row_seconds=0.25, first_step_seconds=14.2)
    several[Case(STAGES[0], 4, "ddp").name] |= {
        "checkpoint_gb": 13.99, "lost_seconds": [15.1, 2.04], "checkpoint_lost_seconds": 2.04,
        "checkpoint_percent_at_one_in_600_s": 0.34,
    }  # fmt: skip
    failed = {"512:0 x4 fsdp": {"failed": "stopped after 300 s"}}
    machine = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "commit": "abc"}
    data = scaling.completed({"machine": machine, "cases": alone | several | failed}, None)
    (tmp_path / "scaling-gpu.json").write_text(json.dumps(data))
    page = results.rendered("<!-- table: scaling-gpu.json -->\n<!-- end -->\n", tmp_path)
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert "| 256 px, mask 0.75 | 1 | single | 1,040 |" in page
    ours = (
        "| 256 px, mask 0.75 | 4 | ddp | 4,000 | 96.2% | 256 | 76 GB | 250 ms "
        "| 14 GB | 15.1 s, 2.04 s | 0.34 % | 14.2 s |"
    )
    assert any(line.startswith(ours) for line in lines)
    assert any(line.startswith("| 512 px, mask 0 | 4 | fsdp |") and "stopped after 300 s" in line for line in lines)
    runs = [line for line in lines if line.startswith(("| 1 | single |", "| 4 | ddp |"))]
    assert len(runs) == 2 and "$2.90" in runs[1]
