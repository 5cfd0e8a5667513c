"""Which records a command line asks for."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from PIL import Image

from micro_diffusion.cli.prepare import SourceOptions
from micro_diffusion.data.captions import CAPTION_RULES
from micro_diffusion.runtime.files import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"picture {name}")
    return tmp_path


def test_a_folder_with_captions_beside_the_pictures(folder: Path) -> None:
    records = list(SourceOptions().open(str(folder)))
    assert [record.key for record in records] == ["a.png", "b.png", "c.png"]


def test_a_folder_with_a_table(folder: Path) -> None:
    (folder / "table.csv").write_text("file_name,caption\nb.png,the second\n")
    (record,) = SourceOptions(table=str(folder / "table.csv")).open(str(folder))
    assert record.key == "b.png"


def test_validation_is_a_share_of_the_folder(folder: Path) -> None:
    assert {record.split for record in SourceOptions(validation=0.999999).open(str(folder))} == {"validation"}
    assert {record.split for record in SourceOptions(validation=0.0).open(str(folder))} == {"train"}


def test_a_missing_folder_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder .*missing.*emoji"):
        SourceOptions().open(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ("emoji", {"table": "x.csv"}, "--table does nothing"),
        ("emoji", {"validation": 0.1}, "--validation does nothing"),
        ("pictures", {"subset": "quickstart"}, "--subset does nothing"),
        ("pictures", {"augment": 2}, "--augment does nothing"),
    ],
)
def test_a_setting_that_does_nothing_is_an_error(source: str, settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SourceOptions(**settings).open(source)


def test_every_caption_rule_can_be_chosen() -> None:
    assert set(get_args(get_type_hints(SourceOptions)["caption_rule"])) == set(CAPTION_RULES)


def test_options_are_those_that_were_changed() -> None:
    options = SourceOptions(min_size=3, validation=0.0, caption_rule="light")
    assert options.chosen == {"min_size": 3, "validation": 0.0}
