"""Official file -> model folder -> pipeline folder -> official file, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from real_formats import tiny_preset, write_official

from micro_diffusion.cli.export import Export
from micro_diffusion.cli.main import main
from micro_diffusion.diffusion.objectives import Flow
from micro_diffusion.export.formats import export
from micro_diffusion.models.checkpoints import ModelCard, Part, read_checkpoint, write_folder
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.runtime.files import UserError


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.dtype], Path]:
    monkeypatch.setitem(PRESETS, "tiny", tiny_preset)

    def write(dtype: torch.dtype) -> Path:
        path = tmp_path / "official" / "dit.pt"
        dit = write_official(path, tiny_preset(caption_channels=1024, pos_interp_scale=2.0))
        torch.save(dit.to(dtype).state_dict(), path)
        return path

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_identical(
    official: Callable[[torch.dtype], Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    first, last = official(dtype), tmp_path / "back" / "dit.pt"
    steps = [("safetensors", tmp_path / "folder"), ("diffusers", tmp_path / "pipeline"), ("official", last)]
    name, cards = str(first), []
    for to, out in steps:
        cards.append(export(name, out, to=to))
        name = str(out)
    before, after = torch.load(first), torch.load(last)
    assert list(before) == list(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == dtype and torch.equal(tensor, after[key]), key
    assert cards[0] == cards[1] == cards[2] == read_checkpoint(name)[1]
    assert sorted(path.name for path in last.parent.iterdir()) == ["dit.json", "dit.pt"]


def test_an_own_model_keeps_what_an_official_file_cannot_say(tmp_path: Path) -> None:
    dit = DiT(replace(tiny_preset(text_mask="padding"), input_size=(8, 12)))
    card = ModelCard(
        dit.config, Flow(shift=2.0), Part("embedded", "a" * 64), Part("embedded", "b" * 64),
        resolution=64, images_seen=5, recipe="mine", text_length=24,
    )  # fmt: skip
    write_folder(tmp_path / "run" / "model", dit.state_dict(), card=card)
    export(str(tmp_path / "run"), tmp_path / "mine.pt", to="official")
    weights, found = read_checkpoint(str(tmp_path / "mine.pt"))
    assert found == card and all(torch.equal(weights[name], tensor) for name, tensor in dit.state_dict().items())


def test_the_command(
    official: Callable[[torch.dtype], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(official(torch.float32))
    assert main(["export", path, "--to", "diffusers", "--autoencoder", "my/vae"]) == 0
    assert "dit-diffusers: dit, with the autoencoder my/vae" in capsys.readouterr().out
    assert "my/vae" in Path("dit-diffusers/README.md").read_text()
    assert main(["export", path, "--to", "diffusers"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["export", "nothing", "--to", "official"]) == 2
    assert "no file or folder nothing" in capsys.readouterr().err
    assert not Path("nothing-official.pt").exists()


def test_bad_folders_get_one_sentence(official: Callable[[torch.dtype], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no format 'onnx'; choose one of: safetensors, diffusers, official"):
        export("x", tmp_path / "out", to="onnx")
    export(str(official(torch.float32)), tmp_path / "pipeline", to="diffusers")
    (tmp_path / "pipeline" / "transformer" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no pipeline folder of this program"):
        Export(tmp_path / "pipeline", "official", out=tmp_path / "x.pt")()
    assert not (tmp_path / "x.pt").exists()


def test_a_file_beside_an_official_one_is_not_overwritten(
    official: Callable[[torch.dtype], Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.json").write_text("a recipe")
    with pytest.raises(UserError, match="mine.json is there already"):
        export(str(official(torch.float32)), tmp_path / "mine.pt", to="official")
    assert (tmp_path / "mine.json").read_text() == "a recipe" and not (tmp_path / "mine.pt").exists()
