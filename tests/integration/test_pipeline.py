"""prepare -> train -> Ctrl-C -> resume -> SIGKILL -> resume -> generate, as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from integration.command_line import ROOT, make_autoencoder, make_pictures, run, start, tiny_recipe
from PIL import Image
from safetensors.torch import load_file

from micro_diffusion.cli.main import main


class World:
    """A folder with all that the tests of this file share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store, self.autoencoder = folder, folder / "store", folder / "autoencoder"
        self.recipe = folder / "tiny.json"
        make_pictures(folder / "pictures", 40)
        make_autoencoder(self.autoencoder)
        self.recipe.write_text(tiny_recipe(self.autoencoder).to_json())
        self.prepare = (
            "prepare", folder / "pictures", "--out", self.store, "--resolutions", "32", "64",
            "--autoencoder", self.autoencoder, "--validation", "0.2",
        )  # fmt: skip
        self.printed = run(*self.prepare)

    def train(self, name: str) -> tuple[str | Path, ...]:
        return "train", self.recipe, "--store", self.store, "--run", self.folder / name, "--device", "cpu"

    def stop(self, name: str, number: signal.Signals, *, images: int) -> int:
        """Train until the log has seen so many images, then send the signal; return the exit code."""
        process = start(*self.train(name))
        log, deadline = self.folder / name / "log.jsonl", time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and any(row["images"] >= images for row in read(log)):
                process.send_signal(number)
                break
            time.sleep(0.005)
        process.communicate(timeout=60)
        return process.returncode


def read(log: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_stopped_and_killed_it_ends_as_if_undisturbed(world: World, tmp_path: Path) -> None:
    assert "40 pictures in 1 parts" in world.printed
    assert world.stop("stopped", signal.SIGINT, images=16) == 130
    assert world.stop("stopped", signal.SIGKILL, images=280) == -signal.SIGKILL
    run(*world.train("stopped"))
    run(*world.train("undisturbed"))
    stopped, undisturbed = world.folder / "stopped", world.folder / "undisturbed"
    for model in ("model-stage-1", "model"):
        ours, theirs = (load_file(each / model / "model.safetensors") for each in (stopped, undisturbed))
        assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    assert [row["loss"] for row in read(stopped / "log.jsonl")] == [
        row["loss"] for row in read(undisturbed / "log.jsonl")
    ]
    assert any("validation" in row for row in read(stopped / "log.jsonl"))
    assert sorted(path.name for path in (stopped / "samples").glob("*.png")) == ["000000240.png", "000000480.png"]
    assert list((stopped / "tensorboard").iterdir())

    out = tmp_path / "out"
    run(
        "generate", "--model", stopped, "a red circle", "a blue square", "--steps", "2", "--out", out, "--device", "cpu"
    )
    assert sorted(path.name for path in out.iterdir()) == ["001-a-red-circle.png", "002-a-blue-square.png", "grid.png"]
    with Image.open(out / "001-a-red-circle.png") as picture:
        assert picture.size == (64, 64) and picture.info["prompt"] == "a red circle"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--set", "stages.0.resolution=48"], "lacks 48 px"),
        (["--set", "sead=1"], "did you mean 'seed'"),
        (["--set", "autoencoder=OTHER"], "was made with the autoencoder"),
        (["--set", "model.in_channels=16"], "--set model.in_channels=4"),
        (["--store", "nowhere"], "no latent store"),
    ],
)
def test_what_does_not_fit_gets_one_sentence(
    world: World, changes: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_autoencoder(tmp_path / "other", seed=1)
    changes = [change.replace("OTHER", str(tmp_path / "other")) for change in changes]
    assert main([*map(str, world.train(str(tmp_path / "run"))), *changes]) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_store_made_with_another_autoencoder_stays_as_it_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_autoencoder(tmp_path / "other", seed=1)
    before = {path: path.read_bytes() for path in world.store.rglob("*") if path.is_file()}
    assert main([*map(str, world.prepare), "--autoencoder", str(tmp_path / "other")]) == 2
    assert "another autoencoder" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in world.store.rglob("*") if path.is_file()}


def test_a_full_disk_gets_one_sentence_and_leaves_nothing_half_written(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno
    import os

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    arguments = [str(tmp_path / "store") if part == world.store else str(part) for part in world.prepare]
    assert main(arguments) == 2
    assert "disk is full" in capsys.readouterr().err
    assert not any(path.name in ("store.json", "part.json") for path in tmp_path.rglob("*"))


def test_a_damaged_model_is_refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (world.folder / "undisturbed").exists():
        run(*world.train("undisturbed"))
    subprocess.run(["cp", "-r", world.folder / "undisturbed" / "model", tmp_path / "model"], check=True)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["generate", "--model", str(tmp_path / "model"), "a cat", "--out", str(tmp_path / "out")]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_ranks_by_the_same_command(world: World) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
    command = [*launch, "micro_diffusion", *map(str, world.train("ranks")), "--parallel", "fsdp", "--micro-batch", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The model is in") == 1
    ranks, alone = world.folder / "ranks", world.folder / "alone"
    run(*world.train("alone"))
    found, expected = ([(row["images"], row["loss"]) for row in read(each / "log.jsonl")] for each in (ranks, alone))
    assert dict(found) == pytest.approx(dict(expected), rel=1e-3)
    assert "validation" in read(ranks / "log.jsonl")[-1]
    assert sorted(path.name for path in (ranks / "samples").iterdir()) == ["000000240.png", "000000480.png"]
    assert (
        load_file(ranks / "model" / "model.safetensors").keys()
        == load_file(alone / "model" / "model.safetensors").keys()
    )
