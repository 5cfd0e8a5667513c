"""Run folders side by side: table, differences, plots, and one sentence for a folder that is none."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from micro_diffusion.cli.runs import Runs
from micro_diffusion.recipes.recipe import RECIPES
from micro_diffusion.runtime.files import UserError
from micro_diffusion.training.config import Recipe


def write(folder: Path, recipe: Recipe, losses: list[float | None], *, images: int, model: bool = False) -> Path:
    """A run folder with one row a loss, evenly spread over `images`."""
    (folder / "model" if model else folder).mkdir(parents=True)
    (folder / "recipe.json").write_text(recipe.to_json())
    rows = [
        {
            "images": images * (i + 1) // len(losses), "stage": "64 px", "loss": loss, "images_per_second": 1234.5,
            "device_hours": 0.5 * i, "dollars": 1.25 * i, "validation": 0.5 if i == 0 else None,
        }
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> Path:
    recipe = RECIPES["quickstart"]()
    other = replace(recipe, seed=7, stages=(*recipe.stages[:3], replace(recipe.stages[3], clip_norm=0.5)))
    write(tmp_path / "runs" / "a", recipe, [1.0, 0.5, 0.25], images=recipe.images, model=True)
    write(tmp_path / "runs" / "b", other, [2.0, None], images=64_000)
    return tmp_path / "runs"


def table(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """What was printed, as cells."""
    lines = capsys.readouterr().out.splitlines()
    return [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines if line[0] in "│┃"
    ]


def test_a_folder_of_runs(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Runs((two,))()
    head, a, b, settings, *differing = table(capsys)
    assert dict(zip(head, a, strict=True)) == {
        "run": "a", "recipe": "quickstart", "stage": "64 px", "images": "128,000 of 128,000", "loss": "0.2500",
        "validation": "0.5000", "images per second": "1,234", "device hours": "1.00", "dollars": "2.50",
        "state": "finished",
    }  # fmt: skip
    assert b[3:5] == ["64,000 of 128,000", "2.0000"] and b[-1] == "unfinished"
    assert settings == ["setting", "a", "b"]
    assert differing == [["stages.3.clip_norm", "1.0", "0.5"], ["seed", "18", "7"]]


def test_equal_runs_of_the_same_name(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "elsewhere" / "a", RECIPES["quickstart"](), [], images=0)
    monkeypatch.chdir(tmp_path)
    Runs((Path("runs/a"), Path("elsewhere/a")))()
    rows = table(capsys)
    assert [row[0] for row in rows] == ["run", "runs/a", "elsewhere/a"]  # no table of settings
    assert rows[2][3:5] == ["0 of 128,000", ""] and rows[2][-1] == "unfinished"


@pytest.mark.parametrize("suffix", [".html", ".svg"])
def test_plots(two: Path, tmp_path: Path, suffix: str) -> None:
    plot = tmp_path / f"plot{suffix}"
    Runs((two,), plot=plot)()
    text = plot.read_text()
    assert len(re.findall("<path[^>]*clip-path", text)) == 2 and "> a</text>" in text and "> b</text>" in text
    assert text.startswith("<!DOCTYPE html>" if suffix == ".html" else "<svg")


def test_what_cannot_be_plotted(two: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ends in .html or .svg"):
        Runs((two,), plot=tmp_path / "plot.png")()
    empty = write(tmp_path / "empty", RECIPES["quickstart"](), [], images=0)
    with pytest.raises(UserError, match="nothing to plot yet"):
        Runs((empty,), plot=tmp_path / "plot.svg")()
    assert not (tmp_path / "plot.svg").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("recipe.json", "{"),
        ("recipe.json", '{"name": "of another program"}'),
        ("recipe.json", "[]"),
        ("log.jsonl", '{"images": 1}\nnot json\n{"images": 2}\n'),
        ("log.jsonl", '{"step": 1}\n'),
        ("log.jsonl", "\udcff"),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_shown(
    two: Path, file: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (two / "b" / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="b is damaged, or no run of this version") as error:
        Runs((two,))()
    assert "\n" not in str(error.value)
    assert [row[0] for row in table(capsys)] == ["run", "a"]


def test_a_folder_without_runs(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no run"):
            Runs((folder,))()
