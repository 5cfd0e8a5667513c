"""The measuring stick from data to a line of results and a model, in small and on a CPU; its judges are random."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from micro_diffusion.data.sources.emoji import emoji_table
from micro_diffusion.data.sources.emoji_scenes import COLOURS, CONCEPTS
from micro_diffusion.evaluation.judges import Detector, Judge
from micro_diffusion.models.checkpoints import load_checkpoint
from micro_diffusion.runtime.log import read_log

ROOT = Path(__file__).parents[2]


def write_judges(folder: Path) -> Path:
    """Untrained networks that know all names."""
    rows = list(emoji_table())
    names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("concept", "style"))
    judge, detector = Judge(*names), Detector(CONCEPTS, ["own", *COLOURS])
    folder.mkdir()
    for name, network in (("judge", judge), ("second", judge), ("detector", detector)):
        save_file(network.state_dict(), folder / f"{name}.safetensors", metadata={"names": json.dumps(network.names)})
    return folder


SMALL = [
    "--limit", "200", "--augment", "1", "--count", "80", "--processes", "2", "--device", "cpu", "--per-task", "1",
    "--steps", "1", "--set", "precision=float32", "stages.0.batch_size=16", "stages.1.batch_size=16",
]  # fmt: skip


@pytest.mark.slow
def test_from_drawings_to_a_line_and_a_model(tmp_path: Path) -> None:
    out, data, saved = tmp_path / "quality.jsonl", tmp_path / "data", tmp_path / "saved"
    judges = write_judges(tmp_path / "judges")

    def run(*options: str) -> str:
        command = [
            sys.executable, "-m", "benchmarks.quality", "--out", str(out), "--data", str(data), "--judges", str(judges),
            "--mode", "none", "--seconds", "2", *SMALL, *options,
        ]  # fmt: skip
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run("--recipes", "baseline", "averages", "--save", str(saved))
    first, second = read_log(out)
    assert [row["asked"]["recipe"] for row in (first, second)] == ["baseline", "averages"]
    for row in (first, second):
        assert 0.2 < row["seconds_used"] < 20 and row["images"] == sum(stage["images"] for stage in row["stages"])
        assert all(speed["images_per_second"] > 0 for speed in row["stages"])
        losses = row["validation"]["weights"]
        assert losses.keys() == {"slice", "held-out pairs", "held-out scenes"} and min(losses.values()) > 0
        assert row["rows"][-1]["images"] == row["images"]
    assert [score["weights"] for score in first["scores"]] == ["average"]
    assert [score["weights"] for score in second["scores"]] == ["0.05", "0.1", "0.15", "0.2", "0.25"]
    assert {"concept top-1, held-out pairs", "style, seen pairs (second judge)", "overall"} <= first["scores"][0].keys()

    model, *_ = (path for path in saved.iterdir() if path.name.startswith("baseline") and "best" not in path.name)
    dit, card = load_checkpoint(str(model))
    assert (card.recipe, card.images_seen) == ("baseline", first["images"])
    assert all(torch.equal(value, value.half().float()) for value in dit.state_dict().values())

    assert "nothing is left" in run("--recipes", "baseline", "averages")
    assert "left for another time" in run("--recipes", "baseline", "--seeds", "1", "--until", "1")
    run("--rescore", str(model), "--guidance", "1", "3")
    again = read_log(out)[2:]
    assert [row["sampling"] for row in again] == ["1 Heun steps, guidance 1", "1 Heun steps, guidance 3"]


@pytest.mark.slow
def test_all_of_it_in_two_processes(tmp_path: Path) -> None:
    out, saved = tmp_path / "quality.jsonl", tmp_path / "saved"
    command = [
        sys.executable, "-m", "benchmarks.quality_all", "--out", str(out), "--data", str(tmp_path / "data"), "--save",
        str(saved), "--gpus", "2", "--judges", str(write_judges(tmp_path / "judges")), "--rates", "1e-3", "--modes",
        "none", "--ablations", "mask-0", "--seconds", "1", "--long", "2", "--until", "1500", "--guidance", "3",
        "--interval", "all", "0.2:5", *SMALL, "model.dim=32", "model.patch_mixer_dim=32",
    ]  # fmt: skip

    def run() -> str:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    said = run()
    assert "failed" not in said and "dead" not in said and "left out: nothing" in said
    rows = read_log(out)
    jobs = {(row["asked"]["recipe"], row["asked"]["seed"], row["asked"]["seconds"]) for row in rows if "asked" in row}
    assert jobs >= {("baseline", 0, 1.0), ("mask-0", 0, 1.0), ("baseline", 1, 1.0), ("candidate", 0, 2.0)}
    models = {row["model"] for row in rows if "model" in row}
    assert len(models) == 2 and all((saved / name / "model").is_dir() for name in models)
    run()
    assert read_log(out) == rows
