"""The embedded drawings: what the split promises, and copies that change nothing but place and size."""

import io
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageOps

from micro_diffusion.data.records import Record, decode_image
from micro_diffusion.data.sources.emoji import SPLITS, SUBSETS, emoji_records, emoji_table
from micro_diffusion.runtime.files import UserError


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    return list(emoji_table())


def test_the_table_is_the_one_that_the_documents_describe(table: list[dict[str, Any]]) -> None:
    assert 10_000 < len(table) < 10_600
    assert 1_600 < len({row["concept"] for row in table}) < 1_700
    assert {row["style"] for row in table} == {
        "noto", "noto-v1", "fluent-flat", "fluent-gradient", "fluent-3d", "twemoji", "emojione"
    }  # fmt: skip
    assert {row["split"] for row in table} == set(SPLITS)
    assert {row["licence"] for row in table} == {"Apache-2.0", "MIT", "CC-BY-4.0"}
    assert len({(row["style"], row["concept"]) for row in table}) == len(table)
    for row in table[::500]:
        picture = Image.open(io.BytesIO(row["image"]))
        assert picture.size == (128, 128) and picture.format == "WEBP"
        assert row["captions"][0] == row["caption"] and all(caption.isascii() for caption in row["captions"])


def test_training_never_sees_what_is_held_out(table: list[dict[str, Any]]) -> None:
    trained = [row for row in table if row["split"] == "train"]
    groups = {row["group"] for row in trained}
    pairs = {(row["concept"], row["family"]) for row in trained}
    styles_of = defaultdict(set)
    for row in trained:
        styles_of[row["concept"]].add(row["style"])
    held_out_pairs = [row for row in table if row["split"] == "held_out_pair"]
    held_out_concepts = [row for row in table if row["split"] == "held_out_concept"]
    assert not [row for row in held_out_pairs if (row["concept"], row["family"]) in pairs]
    assert not [row for row in held_out_pairs if not styles_of[row["concept"]]]  # the concept is known in another hand
    assert not [row for row in held_out_concepts if row["group"] in groups]
    concepts = {row["concept"] for row in table}
    assert len({row["concept"] for row in held_out_pairs}) / len(concepts) == pytest.approx(0.1, abs=0.01)
    every_group = {row["group"] for row in table}
    assert len({row["group"] for row in held_out_concepts}) / len(every_group) == pytest.approx(0.05, abs=0.005)


def test_records_of_a_split_and_of_a_subset(table: list[dict[str, Any]]) -> None:
    for split in SPLITS:
        records = list(emoji_records(split=split))
        assert len(records) == sum(row["split"] == split for row in table)
        assert {record.split for record in records} == {split}
    quick = list(emoji_records(subset="quickstart"))
    assert 140 <= len(quick) <= 160 and {record.split for record in quick} == {"train"}
    assert len({record.captions[0].text for record in quick}) == len(quick)


def drawing(record: Record) -> Image.Image:
    """What is not white, at a common size."""
    picture = decode_image(record)
    ink = ImageChops.invert(picture).convert("L").point(lambda level: 255 * (level > 8))
    return picture.crop(ink.getbbox()).resize((32, 32))


def distance(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, np.int64) - np.asarray(b, np.int64)).sum())


def ink(record: Record) -> float:
    return float((255 - np.asarray(decode_image(record), np.float64)).sum())


def copies_of(concept: str, style: str, monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """The drawing and twelve copies."""
    monkeypatch.setitem(SUBSETS, "one", (frozenset({concept}), frozenset({style})))
    return list(emoji_records(subset="one", augment=12))


def test_copies_are_moved_and_scaled_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    original, *copies = copies_of("fox", "noto", monkeypatch)
    again = copies_of("fox", "noto", monkeypatch)[1:]
    assert len({copy.key for copy in copies} | {original.key}) == 13
    for copy, same in zip(copies, again, strict=True):
        assert distance(decode_image(copy), decode_image(same)) == 0
        assert copy.captions[0] in original.captions and copy.key.startswith(original.key) and copy.split == "train"
        assert 0.8**2 * 0.98 < ink(copy) / ink(original) < 1.02  # nothing is cut off: only the area shrinks


def test_copies_are_mirrored_unless_that_would_make_them_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def mirrored(concept: str) -> set[bool]:
        own, *copies = map(drawing, copies_of(concept, "twemoji", monkeypatch))
        return {distance(copy, ImageOps.mirror(own)) < distance(copy, own) for copy in copies}

    assert mirrored("guitar") == mirrored("rabbit") == {True, False}
    assert mirrored("right arrow") == mirrored("two o'clock") == mirrored("keycap: 2") == {False}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"subset": "quickstrt"}, "no subset 'quickstrt'.*quickstart"),
        ({"split": "test"}, "no split 'test'.*held_out_pair"),
        ({"subset": "quickstart", "split": "held_out_pair"}, "of the training split"),
        ({"augment": -1}, "not -1"),
    ],
)
def test_what_is_not_there(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        emoji_records(**settings)
