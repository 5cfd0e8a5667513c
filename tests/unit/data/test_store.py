import json

import numpy as np
import pyarrow as pa
import pytest

from micro_diffusion.data.store import Store, StoreInfo, lists, read_stream, text_file, to_json
from micro_diffusion.runtime.files import UserError


def test_layout(world, tmp_path):
    world.store(tmp_path / "store", rows=25)
    files = sorted(
        str(path.relative_to(tmp_path / "store")) for path in (tmp_path / "store").rglob("*") if path.is_file()
    )
    part = ["latents-16.arrow", "part.json", "rows.arrow", "text-letters.arrow"]
    assert files == [f"part-0000{index}/{file}" for index in range(3) for file in part] + ["store.json"]
    description = json.loads((tmp_path / "store" / "store.json").read_text())
    assert description["schema"] == 1
    assert description["resolutions"] == [16]
    assert description["autoencoder"]["downscale"] == 4
    assert description["text_encoders"]["letters"] == {
        "sha256": "bb",
        "width": 3,
        "max_length": 20,
        "text_mask": "padding",
    }
    assert description["dtypes"] == {"latents": "float16", "text": "float16"}


def test_content(world, tmp_path):
    store = world.store(tmp_path, rows=25)
    assert len(store) == 25
    assert [part.rows for part in store.parts] == [10, 10, 5]
    row = store.rows(1).slice(3, 1).to_pylist()[0]
    assert row["key"] == "key-13"
    assert row["captions"] == ["ccc13-0", "ccc13-1"]
    assert row["weights"] == [1.0, 2.0]
    assert (row["width"], row["height"], row["source"], row["split"]) == (8, 9, "test", "validation")
    latents = store.latents(16, 1).slice(3, 1).to_pylist()[0]
    assert (latents["height"], latents["width"], len(latents["latents"])) == (4, 4, 3 * 16)
    text = store.text("letters", 1).slice(3, 1).to_pylist()[0]
    assert text["lengths"] == [7, 7]
    states = np.array(text["states"]).reshape(14, world.width)
    assert "".join(map(chr, states[:, 0].astype(int))) == "ccc13-0ccc13-1"


def test_reading_is_memory_mapped_and_copies_nothing(world, tmp_path):
    world.store(tmp_path)
    before = pa.total_allocated_bytes()
    column = read_stream(tmp_path / "part-00000" / "latents-16.arrow")["latents"]
    values = column.chunk(0).values.to_numpy(zero_copy_only=True)
    assert values.dtype == np.float16
    assert pa.total_allocated_bytes() == before


def test_datasets_opens_each_file(world, tmp_path):
    datasets = pytest.importorskip("datasets")
    world.store(tmp_path, rows=10)
    opened = {path.stem: datasets.Dataset.from_file(str(path)) for path in (tmp_path / "part-00000").glob("*.arrow")}
    assert {name: len(data) for name, data in opened.items()} == {"rows": 10, "latents-16": 10, "text-letters": 10}
    assert opened["rows"][4]["key"] == "key-4"
    assert len(opened["latents-16"][4]["latents"]) == 48


def test_record_batches_are_small(world, tmp_path):
    world.store(tmp_path, rows=300, rows_per_part=300, batch_size=290)
    for file in (tmp_path / "part-00000").glob("*.arrow"):
        assert [len(batch) for batch in read_stream(file).to_batches()] == [256, 34, 10]


def test_lists_and_their_limit():
    assert lists(np.arange(5), [2, 0, 3]).to_pylist() == [[0, 1], [], [2, 3, 4]]
    with pytest.raises(UserError, match="smaller --batch-size"):
        lists(np.zeros(0), [2**30, 2**30])


def test_store_json_comes_back(world, tmp_path):
    info = world.info()
    (tmp_path / "store.json").write_text(to_json(info))
    assert StoreInfo.read(tmp_path) == info


def test_what_is_no_complete_store_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="no latent store"):
        Store.open(tmp_path)
    (tmp_path / "store.json").write_text(to_json(world.info()))
    with pytest.raises(UserError, match="not finished"):
        Store.open(tmp_path)
    (tmp_path / "store.json").write_text('{"schema": 99}')
    with pytest.raises(UserError, match="schema version 99"):
        Store.open(tmp_path)


def test_damage_is_named(world, tmp_path):
    store = world.store(tmp_path)
    (tmp_path / "part-00001" / "rows.arrow").unlink()
    with pytest.raises(UserError, match=r"rows\.arrow is missing"):
        store.rows(1)
    (tmp_path / "part-00001" / "part.json").unlink()
    with pytest.raises(UserError, match=r"part-00001/part\.json is missing"):
        len(Store.open(tmp_path))


def test_file_names_of_text_encoders():
    assert text_file("org/model v2") == "text-org-model-v2.arrow"
