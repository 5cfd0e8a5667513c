"""Plans against sums made by hand, budgets, and one sentence for what cannot be planned."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from micro_diffusion.cli import plan as module
from micro_diffusion.cli.plan import Bench, Plan, affordable, works_of
from micro_diffusion.planning import measure
from micro_diffusion.planning.cost import Machine, Speed, Work
from micro_diffusion.recipes.recipe import RECIPES
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.hardware import GPUS
from micro_diffusion.training.config import Recipe

EIGHT = {"gpu": "h100", "count": 8, "price": 3.75}


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "BENCH", tmp_path / "bench.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def cells(shown: str) -> dict[str, list[str]]:
    """Numbers of each row of a printed table."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.count("│") > 5]
    return {name: numbers for name, *numbers in rows}


@pytest.mark.slow
def test_the_papers_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    Plan("paper-37m", **EIGHT)()  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    rows = cells(shown)
    assert list(rows) == [stage.name for stage in RECIPES["paper-37m"]().stages] + ["total"]
    total = rows["total"]
    assert total[0] == "686,080,000" and total[1] == "328.7"  # the paper counts 3.45e20
    assert float(total[4]) == pytest.approx(float(total[3]) * 8 * 3.75, abs=0.5)
    assert float(total[4]) == pytest.approx(sum(float(row[4]) for row in list(rows.values())[:-1]), abs=0.05)
    assert [row[6] for row in list(rows.values())[:-1]] == ["256", "64", "32", "16"]
    said = " ".join(shown.split())  # however the lines were broken
    assert "198,656 bytes" in said and "a guess" in said


@pytest.mark.slow
@pytest.mark.parametrize("budget", [500.0, 31.5])
def test_a_budget_shortens_all_stages_alike(budget: float, tmp_path: Path) -> None:
    Plan("paper-37m", **EIGHT, budget=budget, out=tmp_path / "r.json")()  # type: ignore[arg-type]
    short, whole = Recipe.from_json((tmp_path / "r.json").read_text()), RECIPES["paper-37m"]()
    parts = [a.images / b.images for a, b in zip(short.stages, whole.stages, strict=True)]
    assert max(parts) - min(parts) < 2 * 2048 / whole.stages[-1].images
    seconds = sum(map(Machine(GPUS["h100"], 8).seconds, works_of(short)))
    assert 0.99 * budget < seconds / 3600 * 8 * 3.75 <= budget


@pytest.mark.parametrize(
    ("autoencoder", "downscale"),
    [("embedded", 8), ("stabilityai/sdxl-vae", 8), ("models/snapshots/0bf32c41", 8),
     ("mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", 32),
     ("mit-han-lab/dc-ae-f64c128-in-1.0-diffusers", 64)],
)  # fmt: skip
def test_latents_are_as_large_as_the_autoencoder_makes_them(autoencoder: str, downscale: int) -> None:
    recipe = replace(RECIPES["paper-37m"](), autoencoder=autoencoder)
    sizes = [work.model.input_size for work in works_of(recipe)]
    assert sizes == [stage.resolution // downscale for stage in recipe.stages]


def test_more_than_enough_money_changes_nothing() -> None:
    recipe = RECIPES["emoji"]()
    assert affordable(recipe, 10.0, dollars=3.0) == recipe


def test_mask_schedules_are_shortened_too() -> None:
    recipe = RECIPES["quickstart"]()
    data = json.loads(recipe.to_json())
    data["stages"][0]["mask_schedule"] = [[64 * 100, 0.25], [64 * 200, 0.0]]
    short = affordable(Recipe.from_json(json.dumps(data)), 1.0, dollars=2.0)
    assert short.stages[0].mask_spans == ((0, 3200, 0.5), (3200, 6400, 0.25), (6400, 9600, 0.0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gpu": "h10"}, "did you mean 'h100'"),
        ({"count": 0}, "at least 1"),
        ({"count": 7}, "do not divide among 7"),
        ({"price": -1.0}, "not negative"),
        ({"budget": 0.01}, "too little for two batches of every stage: give \\$"),
        ({"price": 0.0, "budget": 5.0}, "needs the --price"),
        ({"recipe": "paper-37"}, "did you mean 'paper-37m'"),
        ({"gpu": None}, "micro-diffusion bench"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(
    settings: dict[str, object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Plan(**({"recipe": "paper-37m"} | EIGHT | settings))()  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and not capsys.readouterr().out


@pytest.mark.slow
def test_what_does_not_fit_comes_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    Plan("paper-37m", gpu="rtx-4090", count=8)()
    shown = capsys.readouterr().out
    assert "does not fit" in shown and "--parallel fsdp" in shown


def test_a_bench_of_this_machine_is_used_and_of_another_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every pass at 1 TFLOP/s and a free optimizer: hours are FLOPs in teraflops by 3,600."""

    def instant(work: Work, mask_ratio: float, device: torch.device, optimizer: object) -> Speed:
        return (1e12, 0.0)

    monkeypatch.setattr(measure, "measure", instant)
    Bench(out=module.BENCH)()
    Plan("quickstart", price=1.0)()
    total = cells(capsys.readouterr().out)["total"]
    assert float(total[3]) == pytest.approx(float(total[1]) * 1e6 / 3600, abs=1e-4)
    found = json.loads(module.BENCH.read_text())
    module.BENCH.write_text(json.dumps(found | {"device": "mps"}))
    with pytest.raises(UserError, match="micro-diffusion bench"):
        Plan("quickstart")()
    module.BENCH.write_text(json.dumps(found | {"device": "H100 80GB HBM3"}))
    Plan("quickstart", gpu="h100")()
    assert float(cells(capsys.readouterr().out)["total"][3]) == float(total[3])


def test_a_bench_that_was_stopped_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[str] = []

    def once(work: Work, mask_ratio: float, device: torch.device, optimizer: object) -> Speed:
        if len(measured) == 1:
            measured.append("stopped")
            raise KeyboardInterrupt
        measured.append(work.name)
        return (1e12, 0.0)

    monkeypatch.setattr(measure, "measure", once)
    bench = Bench(out=tmp_path / "bench.json")
    with pytest.raises(KeyboardInterrupt):
        bench()
    names = [stage.name for stage in RECIPES["quickstart"]().stages]
    assert len(json.loads(bench.out.read_text())["speeds"]) == 1
    bench()
    assert measured == [names[0], "stopped", *names[1:]] and len(json.loads(bench.out.read_text())["speeds"]) == 4
    bench()  # a whole one is measured anew
    assert measured[5:] == names
