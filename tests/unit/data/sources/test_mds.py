"""The folders were made by mosaicml-streaming itself (tests/mds/make.py)."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from micro_diffusion.data.records import decode_image
from micro_diffusion.data.sources.mds import mds_records
from micro_diffusion.data.store import Store
from micro_diffusion.runtime.files import UserError

MDS = Path(__file__).parents[3] / "mds"


def test_raw_pictures():
    records = list(mds_records(str(MDS / "raw")))
    assert [record.key for record in records] == [f"shard.0000{n // 2}/00000{n % 2}" for n in range(6)]
    for number, record in enumerate(records):
        assert record.captions[0].text.decode() == f"picture {number}, café"
        image = decode_image(record)
        assert image.size == (20, 16 + number)
        assert np.allclose(np.asarray(image).mean((0, 1)), (40 * number, 255 - 40 * number, 90), atol=3)


def test_latents_become_a_store_without_encoding(world, tmp_path):
    def never(inputs):
        assert not len(inputs)

    records = mds_records(str(MDS / "latents"))
    world.prepare(records, tmp_path, resolutions=(16, 32), encode_images=never, encode_text=never, batch_size=4)
    store = Store.open(tmp_path)
    assert store.rows(0)["captions"].to_pylist() == [[f"latent {number}"] for number in range(6)]
    for size, values in ((16, np.arange(48.0)), (32, np.arange(192.0))):
        sign = 1 if size == 16 else -1
        expected = [(values + sign * number).tolist() for number in range(6)]
        assert store.latents(size, 0)["latents"].to_pylist() == expected
    assert store.text("letters", 0)["lengths"].to_pylist() == [[5]] * 6
    assert store.text("letters", 0)["states"].to_pylist() == [[float(number)] * 15 for number in range(6)]


def test_latents_that_do_not_fit_are_named(world, tmp_path):
    records = list(mds_records(str(MDS / "latents")))
    with pytest.raises(UserError, match="no latents of 64 px"):
        world.prepare(records, tmp_path / "a", resolutions=(64,))
    with pytest.raises(UserError, match="not an MDS folder"):
        mds_records(str(tmp_path))


def test_truncated_shard_is_counted_and_the_next_is_read(tmp_path):
    shutil.copytree(MDS / "raw", tmp_path / "raw")
    shard = tmp_path / "raw" / "shard.00001.mds"
    for end, kept in ((0, 0), (100, 0), (1000, 1), (1590, 1)):
        shard.write_bytes((MDS / "raw" / shard.name).read_bytes()[:end])
        records = list(mds_records(str(tmp_path / "raw")))
        assert [record.problem.reason for record in records if record.problem] == ["archive is damaged"], end
        assert len([record for record in records if not record.problem]) == 4 + kept, end
