import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from micro_diffusion.data.prepare import prepare
from micro_diffusion.data.records import Caption
from micro_diffusion.data.store import Store
from micro_diffusion.runtime.files import UserError


def snapshot(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def latents(store, part=0):
    return np.array(store.latents(16, part)["latents"].to_pylist(), np.float32).reshape(-1, 3, 4, 4)


def test_latents_are_one_draw_from_the_posterior(world, tmp_path):
    """The spread-less channel holds the mean exactly; the others have the deviation that the encoder gave."""
    store = world.store(tmp_path, rows=200, rows_per_part=200)
    images = torch.arange(200) * 37 % 256 / 127.5 - 1
    assert np.allclose(latents(store)[:, 2, 1, 1], images.half().float(), atol=1e-3)
    noise = latents(store)[:, 0] - latents(store)[:, 0].mean((1, 2), keepdims=True)
    assert noise.std() == pytest.approx(0.1 * np.sqrt(15 / 16), rel=0.05)


def test_draw_depends_on_key_and_seed_only(world, tmp_path):
    first = latents(world.store(tmp_path / "a", rows=12, rows_per_part=12))
    shifted = latents(world.store(tmp_path / "b", rows=8, first=4, rows_per_part=8, batch_size=3))
    assert np.array_equal(first[4:], shifted)
    other = latents(world.store(tmp_path / "c", rows=12, rows_per_part=12, seed=1))
    assert (first[:, :2] != other[:, :2]).mean() > 0.9


def test_run_again_does_nothing(world, tmp_path):
    first = world.prepare(map(world.record, range(25)), tmp_path, rows_per_part=10)
    assert (first.rows, first.parts, first.parts_written, first.rejected) == (25, 3, 3, {})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = world.prepare(
        map(world.record, range(25)), tmp_path, rows_per_part=10, encode_images=never, encode_text=never
    )
    assert again == replace(first, parts_written=0)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def never(inputs):
    raise AssertionError("nothing is to be encoded")


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("after", [0, 1, 3, 4])
def test_interrupted_run_is_finished_byte_for_byte(world, tmp_path, after):
    calls = []

    def fragile(images):
        calls.append(len(images))
        if len(calls) > after:
            raise Stop
        return world.encode_images(images)

    with pytest.raises(Stop):
        world.prepare(map(world.record, range(25)), tmp_path / "a", rows_per_part=10, encode_images=fragile)
    assert (tmp_path / "a").exists() == (after > 1)
    (tmp_path / "a" / ".tmp-part-00001").mkdir(parents=True)
    report = world.prepare(map(world.record, range(25)), tmp_path / "a", rows_per_part=10)
    assert report.parts_written == 3 - after // 2
    world.store(tmp_path / "b", rows=25)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_parts_missing_in_the_middle_are_redone(world, tmp_path):
    world.store(tmp_path)
    before = snapshot(tmp_path)
    shutil.rmtree(tmp_path / "part-00001")
    assert world.prepare(map(world.record, range(30)), tmp_path, rows_per_part=10).parts_written == 1
    assert snapshot(tmp_path) == before


def test_added_resolution_touches_no_old_file(world, tmp_path):
    world.store(tmp_path / "a", rows=25)
    before = snapshot(tmp_path / "a")
    report = world.prepare(
        map(world.record, range(25)), tmp_path / "a", resolutions=(32,), rows_per_part=10, encode_text=never
    )
    assert report.parts_written == 3
    after = snapshot(tmp_path / "a")
    assert {file for file in after if before.get(file) != after[file]} == {
        "store.json",
        *(f"part-0000{part}/{file}" for part in range(3) for file in ("part.json", "latents-32.arrow")),
    }
    world.store(tmp_path / "b", rows=25, resolutions=(32, 16)[::-1])
    assert after == snapshot(tmp_path / "b")


def test_added_text_encoder_decodes_no_picture(world, tmp_path):
    world.store(tmp_path, rows=25)
    records = [replace(world.record(number), image=b"") for number in range(25)]
    info = world.info(name="org/other")
    world.prepare(records, tmp_path, info=info, rows_per_part=10, encode_images=never)
    store = Store.open(tmp_path)
    assert set(store.info.text_encoders) == {"letters", "org/other"}
    assert store.text("org/other", 2).equals(store.text("letters", 2))
    assert set(store.parts[0].files) == {"rows.arrow", "latents-16.arrow", "text-letters.arrow", "text-org-other.arrow"}


def test_extension_leaves_out_what_was_rejected(world, tmp_path):
    records = [world.record(number) for number in range(40)]
    records[7] = replace(records[7], image=b"damage")
    records[9] = replace(records[9], key="key-8")
    for resolution in (16, 32):
        report = world.prepare(records, tmp_path, resolutions=(resolution,), max_rejected=0.1)
    assert report.rejected == {"image does not decode": 1, "duplicate key": 1}
    store = Store.open(tmp_path)
    assert len(store) == len(store.latents(32, 0)) == 38
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in lines] == [
        ("key-7", "image does not decode"),
        ("key-8", "duplicate key"),
    ]


def test_picture_lost_before_an_extension_is_an_error(world, tmp_path):
    world.store(tmp_path)
    records = [replace(world.record(number), image=b"") for number in range(30)]
    with pytest.raises(UserError, match="key-0, which is in .*, is not readable now: empty file"):
        world.prepare(records, tmp_path, resolutions=(32,), rows_per_part=10)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_more_than_the_share_rejected_stops_with_the_list(world, tmp_path):
    records = [world.record(number) for number in range(20)]
    records[3] = replace(records[3], captions=(Caption(" "),))
    records[5] = replace(records[5], captions=(Caption(b"\xff"),))
    with pytest.raises(UserError, match=r"2 of 20 records .*1 times empty caption, 1 times caption is not UTF-8.*5%"):
        world.prepare(records, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rejects.jsonl"]
    assert world.prepare(records[:5] + records[6:], tmp_path, max_rejected=0.06).rows == 18


def test_bad_records_stop_before_all_is_read(world, tmp_path):
    """A part's worth of allowed rejects is the most that is looked at."""
    read = []

    def records():
        for number in range(10_000):
            read.append(number)
            yield replace(world.record(0), key=str(number), image=b"")

    with pytest.raises(UserError, match="empty file"):
        world.prepare(records(), tmp_path, rows_per_part=100)
    assert len(read) < 100


def test_unprintable_key_is_rejected(world, tmp_path):
    records = [replace(world.record(0), key="a\udc80"), world.record(1)]
    assert world.prepare(records, tmp_path, max_rejected=0.5).rejected == {"unprintable key": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"info": {"autoencoder": "other"}}, "another autoencoder"),
        ({"info": {"text": "other"}}, "another text encoder 'letters'"),
        ({"info": {"rule": "none"}}, "another caption_rule: light, not none"),
        ({"info": {"rule": "lihgt"}}, "no caption rule 'lihgt', only none, light"),
        ({"seed": 1}, "another seed"),
        ({"resolutions": (18,)}, "multiple of 4, which 18 is not"),
        ({"rows_per_part": 9}, "another rows_per_part"),
    ],
)
def test_other_settings_are_refused(world, tmp_path, options, message):
    world.store(tmp_path)
    before = snapshot(tmp_path)
    options = {"rows_per_part": 10, **options, "info": world.info(**options.get("info", {}))}
    with pytest.raises(UserError, match=message):
        world.prepare(map(world.record, range(30)), tmp_path, **options)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("rows", [range(29), range(20), [*range(29), 99]])
def test_changed_source_is_refused(world, tmp_path, rows):
    world.store(tmp_path)
    with pytest.raises(UserError, match="source has changed"):
        world.prepare(map(world.record, rows), tmp_path, rows_per_part=10)


def test_parts_are_added_when_a_source_grows_by_whole_parts(world, tmp_path):
    world.store(tmp_path / "a")
    assert world.prepare(map(world.record, range(35)), tmp_path / "a", rows_per_part=10).parts_written == 1
    world.store(tmp_path / "b", rows=35)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_folder_that_is_no_store_is_left_alone(world, tmp_path):
    (tmp_path / "letter.txt").write_text("x")
    with pytest.raises(UserError, match="not empty and not a latent store"):
        world.store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_empty_source_leaves_nothing(world, tmp_path):
    with pytest.raises(UserError, match="no records"):
        world.prepare([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unfinished_store_wants_its_own_text_encoder_first(world, tmp_path):
    world.store(tmp_path)
    shutil.rmtree(tmp_path / "part-00002")
    with pytest.raises(UserError, match="first prepare it with 'letters'"):
        world.prepare(map(world.record, range(30)), tmp_path, rows_per_part=10, info=world.info(name="other"))


def test_values_beyond_float16_are_an_error(world, tmp_path):
    def infinite(images):
        mean, std = world.encode_images(images)
        return mean * 1e9, std

    with pytest.raises(UserError, match="float16 cannot hold"):
        world.prepare([world.record(1)], tmp_path / "out", encode_images=infinite)
    assert not (tmp_path / "out").exists()


def test_source_streams(world, tmp_path):
    """No more records are taken from the source than the decoders run ahead of the encoder."""
    taken, encoded = [], []

    def records():
        for number in range(300):
            taken.append(number)
            yield world.record(number)

    def encode(images):
        encoded.extend(images)
        assert len(taken) - len(encoded) <= 2 * 8 + 1
        return world.encode_images(images)

    seen = []
    prepare(
        records(),
        tmp_path,
        resolutions=(16,),
        encode_images=encode,
        encode_text=world.encode_text,
        info=world.info(),
        batch_size=8,
        progress=lambda done, rejected: seen.append((done, rejected)),
    )
    assert len(encoded) == 300
    assert seen[-1] == (300, 0)
