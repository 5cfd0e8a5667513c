"""Folders of pictures: order, captions, and what is wrong with a file."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from micro_diffusion.evaluation.pictures import PROMPTS, PictureFolder, Prompt, file_name, prompts_text, read_prompts
from micro_diffusion.runtime.files import UserError


def paint(file: Path, grey: int, size: tuple[int, int] = (8, 6)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(file)
    return file


def greys(pictures: list[Image.Image]) -> list[int]:
    return [round(float(np.asarray(picture).mean())) for picture in pictures]


def test_any_folder_is_read_by_name_and_only_when_asked(tmp_path: Path) -> None:
    for name, grey in (("b.png", 20), ("a.png", 10), ("c/d.jpg", 30)):
        paint(tmp_path / name, grey)
    paint(tmp_path / ".tmp-000000.png", 99)  # of a killed run
    folder = PictureFolder(tmp_path)
    assert [file.name for file in folder.files] == ["a.png", "b.png", "d.jpg"] and folder.prompts is None
    assert greys(list(folder)) == [10, 20, 30] and greys([folder[-1]]) == [30]
    assert [greys(batch) for batch in folder.batches(2)] == [[10, 20], [30]]
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert greys([folder[0]]) == [10]  # the damaged one was not asked for


def test_pictures_are_rgb_whatever_the_file_is(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "b.png")
    pictures = list(PictureFolder(tmp_path))
    assert [picture.mode for picture in pictures] == ["RGB", "RGB"] and greys(pictures) == [255, 7]


def test_captions_lie_beside_all_pictures_or_there_are_none(tmp_path: Path) -> None:
    for name in ("a", "b"):
        paint(tmp_path / f"{name}.png", 0)
        (tmp_path / f"{name}.txt").write_text(f"caption {name}\n", encoding="utf-8")
    prompts = PictureFolder(tmp_path).prompts
    assert prompts is not None and [prompt.text for prompt in prompts] == ["caption a", "caption b"]
    (tmp_path / "a.txt").unlink()
    assert PictureFolder(tmp_path).prompts is None


def test_a_drawn_folder_keeps_the_order_and_the_truth_of_its_prompts(tmp_path: Path) -> None:
    prompts = [Prompt("a cat", 7, {"boxes": [[1, 2, 3, 4]]}), Prompt("café \u2028 猫", 2**62)]
    (tmp_path / PROMPTS).write_text(prompts_text(prompts), encoding="utf-8")
    paint(tmp_path / file_name(1), 1), paint(tmp_path / file_name(0), 0), paint(tmp_path / "other.png", 9)
    folder = PictureFolder(tmp_path)
    assert folder.prompts == prompts == read_prompts(tmp_path) and greys(list(folder)) == [0, 1]


def test_an_unfinished_folder_is_not_scored(tmp_path: Path) -> None:
    (tmp_path / PROMPTS).write_text(prompts_text([Prompt("a", 0), Prompt("b", 1), Prompt("c", 2)]), encoding="utf-8")
    paint(tmp_path / file_name(1), 1)
    with pytest.raises(UserError, match="2 of 3 pictures .* not drawn"):
        PictureFolder(tmp_path)


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_pictures(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match="no picture in .*pictures"):
        PictureFolder(tmp_path / "pictures")


@pytest.mark.parametrize("content", [b"", b"no picture", b"half"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    whole = paint(tmp_path / "a.png", 5, (64, 64)).read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    with pytest.raises(UserError, match="b.png is no picture"):
        list(PictureFolder(tmp_path).batches(2))


def test_mixed_sizes_are_found_without_decoding(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 0, (8, 6)), paint(tmp_path / "b.png", 0, (8, 6))
    assert PictureFolder(tmp_path).one_size() == (8, 6)
    paint(tmp_path / "c.png", 0, (6, 8))
    with pytest.raises(UserError, match="c.png is 6 x 8, those before it are 8 x 6"):
        PictureFolder(tmp_path).one_size()
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match="b.png is no picture"):
        PictureFolder(tmp_path).one_size()


def test_prompts_are_one_line_of_json_each(tmp_path: Path) -> None:
    text = prompts_text([Prompt("two\nlines", 1, {"n": 2})])
    assert text.count("\n") == 1 and json.loads(text) == {"text": "two\nlines", "seed": 1, "truth": {"n": 2}}
