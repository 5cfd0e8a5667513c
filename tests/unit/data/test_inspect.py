from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from micro_diffusion.data.inspect import problems, summary
from micro_diffusion.data.store import PartInfo, Store, read_stream, to_json
from micro_diffusion.runtime.files import sha256


@pytest.mark.parametrize("options", [{}, {"posterior": True}, {"dtypes": {"latents": "float16", "text": "int8"}}])
def test_a_sound_store_has_no_problems(world, tmp_path, options):
    store = world.store(tmp_path, rows=25, resolutions=(16, 32), info=replace(world.info(), **options))
    assert list(problems(store)) == []


def test_summary_counts(world, tmp_path):
    records = [world.record(number) for number in range(25)]
    records[4] = replace(records[4], image=b"x")
    info = replace(world.info(), min_size=9)
    world.prepare(records[:5], tmp_path / "none", info=replace(info, min_size=8), max_rejected=0.5)
    told = summary(Store.open(tmp_path / "none"))
    assert told["pictures"] == "4 in 1 parts (train 3, validation 1)"
    assert told["damaged"] == "image does not decode 1"
    assert told["shorter edge, px"].startswith("8 ") and told["captions a picture"].startswith("2 ")
    report = world.prepare(records, tmp_path / "filtered", info=info, max_rejected=0.5)
    assert (report.rows, report.filtered) == (0, {"smaller than 9 px": 24})


def test_changed_byte_is_found(world, tmp_path):
    store = world.store(tmp_path)
    file = tmp_path / "part-00001" / "latents-16.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (tmp_path / "part-00002" / "text-letters.arrow").unlink()
    found = list(problems(store))
    assert len(found) == 2 and "latents-16.arrow is missing, or is not" in found[0] and "text-letters" in found[1]


def rewrite(folder, name, change):
    """A file with other content, whose hash is as noted: as a bad encoder would have left it."""
    table = change(read_stream(folder / name).to_pydict(), read_stream(folder / name).schema)
    with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
        stream.write_table(table)
    part = PartInfo.read(folder)
    (folder / "part.json").write_text(to_json(replace(part, files={**part.files, name: sha256(folder / name)})))


def test_wrong_shapes_and_values_are_found(world, tmp_path):
    world.store(tmp_path)

    def infinite(columns, schema):
        columns["latents"][3][5] = np.float16("inf")
        return pa.Table.from_pydict(columns, schema)

    def short(columns, schema):
        columns["states"][2] = columns["states"][2][:-1]
        return pa.Table.from_pydict(columns, schema)

    rewrite(tmp_path / "part-00000", "latents-16.arrow", infinite)
    rewrite(tmp_path / "part-00002", "text-letters.arrow", short)
    found = list(problems(Store.open(tmp_path)))
    assert len(found) == 2
    assert "latents-16.arrow has values that are not finite" in found[0] and "text-letters.arrow has other" in found[1]
