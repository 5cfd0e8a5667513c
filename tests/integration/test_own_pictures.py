"""A folder of anyone's pictures, some of them broken: from `prepare` to a picture."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from integration.command_line import make_autoencoder, make_pictures, run, start, tiny_recipe
from PIL import Image
from safetensors.torch import load_file


@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_from_a_folder_to_a_picture(count: int, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    make_pictures(pictures, count)
    (pictures / "000" / "000010.jpg").write_bytes(b"not a picture")
    (pictures / "000" / "000011.txt").write_text("  \n")
    (pictures / "000" / "000012.txt").unlink()
    make_autoencoder(tmp_path / "autoencoder")
    (tmp_path / "tiny.json").write_text(tiny_recipe(tmp_path / "autoencoder").to_json())
    prepare = (
        "prepare", pictures, "--out", tmp_path / "store", "--resolutions", "32", "64",
        "--autoencoder", tmp_path / "autoencoder", "--validation", "0.1",
    )  # fmt: skip
    printed = run(*prepare)
    assert f"{count - 3:,} pictures" in printed
    assert all(reason in printed for reason in ("does not decode", "empty caption", "no caption"))
    rejects = [json.loads(line) for line in (tmp_path / "store" / "rejects.jsonl").read_text().splitlines()]
    assert {reject["key"] for reject in rejects} == {"000/000010.jpg", "000/000011.png", "000/000012.jpg"}
    assert "0 of them written now" in run(*prepare)

    run("train", tmp_path / "tiny.json", "--store", tmp_path / "store", "--run", tmp_path / "run")
    run("generate", "--model", tmp_path / "run", "a red circle", "--steps", "2", "--out", tmp_path / "out")
    with Image.open(tmp_path / "out" / "001-a-red-circle.png") as picture:
        assert picture.size == (64, 64)


def test_too_many_broken_pictures_stop_with_a_list(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 20)
    make_autoencoder(tmp_path / "autoencoder")
    for i in (0, 2):
        (tmp_path / "pictures" / "000" / f"{i:06d}.jpg").write_bytes(b"")
    printed = run(
        "prepare", tmp_path / "pictures", "--out", tmp_path / "store", "--resolutions", "32",
        "--autoencoder", tmp_path / "autoencoder", code=2,
    )  # fmt: skip
    assert "2 of 20 records were rejected (2 times empty file)" in printed and "rejects.jsonl" in printed
    assert len((tmp_path / "store" / "rejects.jsonl").read_text().splitlines()) == 2


def test_training_on_pictures_that_are_not_stored(tmp_path: Path) -> None:
    """Stopped and run again, it ends with the weights of an undisturbed run, and tells what it left out."""
    make_pictures(tmp_path / "pictures", 60)
    (tmp_path / "pictures" / "000" / "000010.jpg").write_bytes(b"not a picture")
    make_autoencoder(tmp_path / "autoencoder")
    recipe = replace(tiny_recipe(tmp_path / "autoencoder"), validate_every=0)
    (tmp_path / "tiny.json").write_text(recipe.to_json())
    command = ("train", tmp_path / "tiny.json", "--source", tmp_path / "pictures", "--min-size", "64", "--run")
    printed = run(*command, tmp_path / "one")
    assert "left out: 1 (image does not decode)" in printed
    process = start(*command, tmp_path / "two")
    while not list((tmp_path / "two" / "checkpoints").glob("0*/state.json")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    run(*command, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    printed = run(*command, tmp_path / "one", "--fraction", "0.5", code=2)
    assert "--fraction does nothing" in printed
    printed = run(*command[:2], "--store", "x", "--min-size", "64", "--run", tmp_path / "three", code=2)
    assert "--min-size does nothing without --source" in printed
