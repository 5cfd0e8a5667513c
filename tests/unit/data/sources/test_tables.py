import json

import archives
import pyarrow as pa
import pytest
from archives import picture
from pyarrow import parquet

from micro_diffusion.data.captions import clean_captions, light
from micro_diffusion.data.records import decode_image
from micro_diffusion.data.sources.tables import hub_records, table_records
from micro_diffusion.runtime.files import UserError


def read(records):
    return [(r.key, decode_image(r).size, clean_captions(r.captions, light)[0]) for r in records]


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_with_pictures_in_it(tmp_path, struct):
    for part in range(2):
        rows = [
            {"image": {"bytes": picture(n), "path": None} if struct else picture(n), "text": f"{part}.{n}"}
            for n in range(3)
        ]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"x-{part}.parquet", row_group_size=2)
    expected = [(f"x-{part}/{n:08}", (40, 32), [f"{part}.{n}"]) for part in range(2) for n in range(3)]
    assert read(table_records(f"{tmp_path}/x-{{0..1}}.parquet")) == expected
    assert read(table_records(f"{tmp_path}/*.parquet", fraction=0.5)) == expected[:3]


def test_jsonl_of_paths_beside_it(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / "t.jsonl").write_text(json.dumps({"path": "a.jpg", "captions": ["one", "two"]}) + "\n")
    assert read(table_records(str(tmp_path / "t.jsonl"))) == [("a.jpg", (40, 32), ["one", "two"])]


def test_a_data_set_of_the_hub_is_streamed(tmp_path):
    archives.textcaps(tmp_path)
    records = read(hub_records(str(tmp_path)))
    assert records == [(f"train/{n:08}", (40, 32), [f"a sign {n}", f"it says {n}"]) for n in range(5)]
    assert 0 < len(read(hub_records(str(tmp_path), fraction=0.8))) < 5


def test_a_data_set_that_does_not_open_is_named(tmp_path):
    with pytest.raises(UserError, match=r"The data set .*none.* cannot be opened"):
        next(hub_records(str(tmp_path / "none")))


def test_a_folder_of_pictures_as_datasets_reads_it(tmp_path):
    (tmp_path / "train").mkdir()
    for number in range(3):
        (tmp_path / "train" / f"{number}.jpg").write_bytes(picture(number))
    rows = "".join(json.dumps({"file_name": f"{n}.jpg", "text": f"thing {n}"}) + "\n" for n in range(3))
    (tmp_path / "train" / "metadata.jsonl").write_text(rows)
    assert read(hub_records(str(tmp_path))) == [(f"train/{n:08}", (40, 32), [f"thing {n}"]) for n in range(3)]
