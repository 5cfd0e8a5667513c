"""An official checkpoint fine-tuned on own pictures: prepare, train --start-from, resume without it, generate."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from integration.command_line import make_pictures, tiny_recipe
from real_formats import tiny_preset, write_official, write_openclip, write_vae

from micro_diffusion.cli.main import main
from micro_diffusion.models.checkpoints import hash_tensors, load_checkpoint
from micro_diffusion.models.presets import PRESETS


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of `train`, with an official file at 64 px (scale 2, so 32 px at scale 1) and a store in the paper's way."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "tiny", tiny_preset)
    write_official(Path("dit.pt"), tiny_preset(input_size=8, pos_interp_scale=2.0))
    write_vae(Path("vae"))
    write_openclip(Path("clip"), own_tokenizer=True)
    make_pictures(Path("pictures"), 20)
    parts = ["--autoencoder", "vae", "--text-encoder", "openclip:clip"]
    assert main(["prepare", "pictures", "--out", "store", "--resolutions", "32", "64", *parts, "--device", "cpu"]) == 0
    recipe = json.loads(tiny_recipe(Path("vae")).to_json())
    for stage in recipe["stages"]:
        stage |= {"images": 16, "warmup_images": 8, "learning_rate": 1e-12, "ema_halflife_images": 0}
    recipe |= {"checkpoint_every": 8, "validate_every": 0, "sample_every": 0, "text_length": 20, "weight_decay": 0.0}
    Path("recipe.json").write_text(json.dumps(recipe))
    return [
        "train", "recipe.json", "--store", "store", "--run", "run", "--device", "cpu", "--start-from", "dit.pt",
        "--set", "autoencoder=vae", "text_encoder=openclip:clip",
    ]  # fmt: skip


def test_it_starts_from_the_checkpoint_and_goes_on_without_it(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0, capsys.readouterr().err
    official, _ = load_checkpoint("dit.pt", autoencoder="vae", text_encoder="openclip:clip")
    tuned, card = load_checkpoint("run")
    assert card.dit == official.config and card.resolution == 64 and card.text_encoder.name == "openclip:clip"
    for name, tensor in official.state_dict().items():  # the learning rate is next to nothing
        torch.testing.assert_close(tuned.state_dict()[name], tensor, atol=1e-6, rtol=0)
    first, _ = load_checkpoint("run/model-stage-1")
    assert first.config.latent_size == (4, 4) and first.config.pos_interp_scale == 1.0
    recipe = json.loads(Path("run/recipe.json").read_text())
    assert recipe["start_from"] == "dit.pt" and recipe["start_from_sha256"] == hash_tensors(official.state_dict())

    assert main(["generate", "--model", "run", "a cat", "--steps", "1", "--out", "out", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main([*arguments, "text_length=21"]) == 2  # the run was begun with 20
    assert "text_length: 21 here, 20 there" in capsys.readouterr().err
    arguments[arguments.index("dit.pt")] = "run"
    assert main([*arguments, "text_length=21", "--run", "second"]) == 2  # the checkpoint was trained with 20
    assert "--set text_length does nothing with --start-from" in capsys.readouterr().err


def test_killed_in_its_first_step_it_goes_on_without_the_file(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--run", "undisturbed"]) == 0

    def power_cut(*arguments: object, **settings: object) -> None:
        raise MemoryError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("micro_diffusion.training.loop.guarded_step", power_cut)
        with pytest.raises(MemoryError, match="power cut"):
            main(arguments)
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["000000000000"]
    Path("dit.pt").unlink()
    assert main(arguments) == 0, capsys.readouterr().err
    ours, theirs = (load_checkpoint(run)[0].state_dict() for run in ("run", "undisturbed"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--set", "model.dim=64"], "--set model.dim does nothing with --start-from"),
        (["--set", "stages.0.pos_interp_scale=2"], "does nothing with --start-from"),
        (["--start-from", "nothing.pt"], "no file or folder nothing.pt"),
    ],
)
def test_what_does_not_fit_gets_one_sentence(
    arguments: list[str], changes: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *changes]) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1
    assert not Path("run").exists()


def test_a_recipe_that_starts_from_a_checkpoint_is_not_trained_without_it(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    shutil.copy("run/recipe.json", "again.json")
    capsys.readouterr()
    assert main(["train", "again.json", "--store", "store", "--run", "other", "--device", "cpu"]) == 2
    assert "starts from dit.pt: name that with --start-from" in capsys.readouterr().err
