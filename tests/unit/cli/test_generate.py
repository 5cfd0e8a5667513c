"""Prompts, names and files; where it says painter, the model is a stand-in that paints each prompt's seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from real_formats import tiny_preset, write_official, write_vae
from tiny_parts import TEXT_WIDTH, write_text_encoder

from micro_diffusion.cli.generate import Generate, file_name
from micro_diffusion.cli.main import main
from micro_diffusion.models.model import LatentDiffusion
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.runtime.files import UserError


class Painter:
    """Paints every picture in the grey of its seed."""

    def __init__(self) -> None:
        self.calls: list[Sequence[str]] = []

    def generate(self, prompt: Sequence[str], *, seed: Sequence[int], **settings: Any) -> torch.Tensor:
        self.calls.append(prompt)
        if "stop" in prompt:
            raise KeyboardInterrupt
        return torch.stack([torch.full((3, 16, 16), s / 255) for s in seed])


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    made = Painter()
    monkeypatch.setattr(LatentDiffusion, "from_checkpoint", lambda name, **settings: made)
    return made


def test_prompts_come_from_the_line_the_file_and_the_template(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n\n  a fish  \n", encoding="utf-8")
    asked = Generate(
        Path("m"), ("a cat", " "), prompts_file=tmp_path / "prompts.txt", template="{} in {}", fill=("x|y", "1|2")
    )
    fills = [["x", "y"], ["1", "2"]]
    assert asked.all_prompts(fills) == ["a cat", "a dog", "a fish", "x in 1", "x in 2", "y in 1", "y in 2"]


def test_a_template_takes_words_with_braces() -> None:
    assert Generate(Path("m"), template="{}!", fill=("{}",)).all_prompts([["{}"]]) == ["{}!"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "nothing to draw"),
        ({"prompts": ("", "  ")}, "nothing to draw"),
        ({"prompts_file": Path("none.txt")}, "no file of prompts"),
        ({"template": "{} and {}", "fill": ("a",)}, "2 gaps"),
        ({"prompts": ("a",), "fill": ("a",)}, "0 gaps"),
        ({"prompts": ("a",), "steps": 0}, "at least 1"),
        ({"prompts": ("a",)}, "no file or folder"),
    ],
)
def test_what_cannot_be_drawn_gets_one_sentence(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        Generate(tmp_path / "model", out=tmp_path / "out", **settings)()
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_model_says_when_there_will_be_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="end of the first stage"):
        Generate(tmp_path, ("a",))()


def test_file_names_are_safe_and_in_order() -> None:
    assert file_name(1, "a red apple, in twemoji style") == "001-a-red-apple-in-twemoji-style.png"
    assert file_name(2, "../../etc/passwd") == "002-etc-passwd.png"
    assert file_name(3, "猫") == "003.png"
    assert len(file_name(4, "word " * 100)) < 80


def test_a_picture_a_file_with_its_prompt_and_seed_in_it(painter: Painter, tmp_path: Path) -> None:
    Generate(Path("m"), ("a cat", "a dog"), out=tmp_path / "o", per_prompt=2, seed=10, batch_size=3)()
    names = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert names == ["001-a-cat.png", "002-a-cat.png", "003-a-dog.png", "004-a-dog.png", "grid.png"]
    assert [len(call) for call in painter.calls] == [3, 1]
    with Image.open(tmp_path / "o" / "004-a-dog.png") as picture:
        assert (picture.info["prompt"], picture.info["seed"]) == ("a dog", "11")
        assert "heun, 30 steps, guidance 3" in picture.info["settings"]
        assert picture.getpixel((0, 0)) == (11, 11, 11)


@pytest.mark.parametrize(("count", "at_once"), [(2, 2), (5, 3)])
def test_no_more_are_drawn_at_once_than_there_are(
    count: int, at_once: int, painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled model draws as many as its `batch_size` says, whatever there is."""
    asked = list[int]()
    generate = painter.generate
    monkeypatch.setattr(painter, "generate", lambda *a, **k: asked.append(k["batch_size"]) or generate(*a, **k))
    Generate(Path("m"), ("a cat",) * count, out=tmp_path, batch_size=3)()
    assert set(asked) == {at_once}


def test_two_fills_make_a_table(painter: Painter, tmp_path: Path) -> None:
    Generate(Path("m"), template="{}, in {} style", fill=("a cat|a dog", "noto|twemoji|x"), out=tmp_path)()
    with Image.open(tmp_path / "grid.png") as table:
        assert table.width > table.height  # two rows, three columns, labels
    assert len(list(tmp_path.glob("0*.png"))) == 6


def test_stopping_leaves_whole_pictures_only(painter: Painter, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Generate(Path("m"), ("a cat", "stop"), out=tmp_path, batch_size=1)()
    assert [path.name for path in tmp_path.iterdir()] == ["001-a-cat.png"]
    with Image.open(tmp_path / "001-a-cat.png") as picture:
        picture.load()


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for an official file with local encoders."""
    monkeypatch.setitem(PRESETS, "tiny", tiny_preset)
    write_official(tmp_path / "dit.pt", tiny_preset(caption_channels=TEXT_WIDTH))
    parts = write_vae(tmp_path / "vae") and tmp_path / "vae", write_text_encoder(tmp_path / "text")
    return [
        "generate", "--checkpoint", str(tmp_path / "dit.pt"), "--autoencoder", str(parts[0]),
        "--text-encoder", str(parts[1]), "--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "2",
    ]  # fmt: skip


def test_an_official_file_on_the_command_line(checkpoint: list[str], tmp_path: Path) -> None:
    def draw(*options: str) -> Image.Image:
        assert main([*checkpoint, "a cat", *options]) == 0
        with Image.open(tmp_path / "out" / "001-a-cat.png") as picture:
            return picture.copy()

    plain, narrow = draw(), draw("--guidance-interval", "0.001", "0.01")
    assert plain.size == narrow.size == (64, 64) and plain.tobytes() != narrow.tobytes()
    assert "guidance 3 from 0.001 to 0.01" in narrow.info["settings"]
    assert draw("--precision", "float32").tobytes() == plain.tobytes()  # the CPU has no other


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--guidance-interval", "5", "1"], "guidance interval (5.0, 1.0) is empty"),
        (["--sampler", "ddim"], "no sampler 'ddim'"),
        (["--autoencoder", "no/such"], "check the name and the network"),
    ],
)
def test_bad_options_get_one_sentence(
    checkpoint: list[str], options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*checkpoint, "a cat", *options]) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1


def test_too_many_pictures_for_the_memory(painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **settings: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(painter, "generate", full)
    with pytest.raises(UserError, match="2 pictures at once .* lower --batch-size"):
        Generate(Path("m"), ("a cat", "a dog"), out=tmp_path)()
