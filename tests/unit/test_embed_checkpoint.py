"""From a run folder to the checkpoint in the package, and to what draws with it; the model is tiny."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from micro_diffusion.cli.main import main
from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.export.pipeline import MicroDiffusionPipeline
from micro_diffusion.models import checkpoints
from micro_diffusion.models.autoencoders import load_autoencoder
from micro_diffusion.models.checkpoints import ModelCard, Part, read_checkpoint, write_folder
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.models.text_encoders import EMBEDDED_SHA256
from micro_diffusion.runtime.files import UserError

FILE = Path(__file__).parents[2] / "scripts" / "embed_checkpoint.py"


def script() -> Any:
    """scripts/embed_checkpoint.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("embed_checkpoint", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training leaves it, its model 1 block deep."""
    config = replace(
        PRESETS["MicroDiT_Nano_4"](input_size=16), dim=32, depth=1, qkv_multipliers=(1.0,), ffn_multipliers=(1.0,),
        patch_mixer_dim=32,
    )  # fmt: skip
    parts = Part("embedded", load_autoencoder().sha256), Part("embedded", EMBEDDED_SHA256)
    card = ModelCard(config, EDM(), *parts, resolution=128, images_seen=64, recipe="tiny")
    write_folder(tmp_path / "run" / "model", DiT(config).state_dict(), card=card)
    (tmp_path / "run" / "recipe.json").write_text("{}\n")
    (tmp_path / "run" / "log.jsonl").write_text('{"images": 64}\n')
    return tmp_path / "run"


def test_half_the_size_with_recipe_and_log(run: Path, tmp_path: Path) -> None:
    size = script().embed(run, tmp_path / "shipped")
    (wanted, card), (found, same) = read_checkpoint(str(run)), read_checkpoint(str(tmp_path / "shipped"))
    assert same == card and found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].half()) for name in wanted)
    names = {path.name for path in (tmp_path / "shipped").iterdir()}
    assert names == {"model.safetensors", "config.json", "recipe.json", "log.jsonl"}
    assert size == sum(path.stat().st_size for path in (tmp_path / "shipped").iterdir())


@pytest.mark.parametrize(
    ("what", "words"), [("log", "no log.jsonl"), ("encoder", "needs elsewhere"), ("weights", "fit into float16")]
)
def test_what_cannot_ship_says_why_and_leaves_nothing(run: Path, tmp_path: Path, what: str, words: str) -> None:
    weights, card = read_checkpoint(str(run))
    if what == "log":
        (run / "log.jsonl").unlink()
    elif what == "encoder":
        write_folder(run / "model", weights, card=replace(card, autoencoder=Part("elsewhere", None)))
    else:
        write_folder(run / "model", weights | {"mask_token": weights["mask_token"] + 1e5}, card=card)
    with pytest.raises(UserError, match=words):
        script().embed(run, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


def test_too_large_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script()
    monkeypatch.setattr(module, "MOST", 1000)
    with pytest.raises(UserError, match="room for"):
        module.embed(run, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


def test_a_prompt_alone_draws_with_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script().embed(run, tmp_path / "shipped")
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path / "shipped")
    assert main(["generate", "a red apple", "--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "2"]) == 0
    with Image.open(tmp_path / "out" / "001-a-red-apple.png") as picture:
        assert picture.size == (128, 128) and "model embedded" in picture.info["settings"]

    pipeline = MicroDiffusionPipeline.from_embedded()
    pipeline.set_progress_bar_config(disable=True)
    wanted = {name: tensor.float() for name, tensor in read_checkpoint("embedded")[0].items()}
    found = pipeline.transformer.dit.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert pipeline("a red apple", num_inference_steps=2).images[0].size == (128, 128)


def test_without_one_a_sentence_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path / "none")
    assert main(["generate", "a cat", "--out", str(tmp_path / "out")]) == 2
    assert "This package has no checkpoint in it; name one with --model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not checkpoints.SHIPPED.is_dir(), reason="no checkpoint in the package")
def test_the_shipped_one_is_small_and_tells_where_it_comes_from() -> None:
    assert sum(path.stat().st_size for path in checkpoints.SHIPPED.iterdir()) < 18e6
    _, card = read_checkpoint("embedded")
    assert card.recipe == json.loads((checkpoints.SHIPPED / "recipe.json").read_text())["name"]
    assert (checkpoints.SHIPPED / "log.jsonl").read_text().count("\n") > 1
