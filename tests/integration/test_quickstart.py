"""The first thing that a newcomer runs, as a newcomer runs it."""

import json
import re
from pathlib import Path

import pytest
from integration.command_line import run


def check(folder: Path) -> dict[str, float]:
    """All that the command promises is there; returns its results."""
    for name in ("grid.png", "stages.png", "loss.svg", "report.html", "results.json", "run/model/model.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    page = (folder / "report.html").read_text()
    assert "the model memorises" in page and page.count("data:image/png;base64,") == 2
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)  # nothing is fetched
    results: dict[str, float] = json.loads((folder / "results.json").read_text())
    return results


def test_a_short_quickstart_leaves_a_report_and_goes_on_when_run_again(tmp_path: Path) -> None:
    arguments = ("quickstart", "--out", tmp_path, "--length", "0.002", "--device", "cpu")
    assert "156 pictures in 1 parts, 1 of them written now" in run(*arguments)
    assert check(tmp_path)["pictures"] == 156
    assert "156 pictures in 1 parts, 0 of them written now" in run(*arguments)


@pytest.mark.slow
def test_quickstart_draws_what_it_learnt(tmp_path: Path) -> None:
    run("quickstart", "--out", tmp_path, "--device", "cpu", seconds=1700)
    results = check(tmp_path)
    assert results["nearest_is_own"] >= 0.95
    assert results["median_psnr_db"] >= 27
