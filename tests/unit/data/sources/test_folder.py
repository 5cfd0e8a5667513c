import json

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from micro_diffusion.data.captions import clean_captions, light
from micro_diffusion.data.records import Record, Rejected, hash_share, hold_out
from micro_diffusion.data.sources import SOURCES
from micro_diffusion.data.sources.tables import folder_records
from micro_diffusion.runtime.files import UserError


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def read(*args, **options):
    return [(record.key, clean_captions(record.captions, light)[0]) for record in folder_records(*args, **options)]


def test_text_files_beside_pictures_sorted_by_name(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp"):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of\n{name}\n")
    expected = [(name, [f"caption of {name}"]) for name in ("a.JPG", "b.png", "sub/c.webp")]
    assert read(tmp_path) == expected
    assert [record.key for record in SOURCES["folder"](tmp_path)] == [key for key, _ in expected]


def test_picture_without_text_has_no_caption(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("a")
    assert [len(record.captions) for record in folder_records(tmp_path)] == [1, 0]


def write_table(path, rows):
    if path.suffix == ".csv":
        lines = [",".join(rows[0])] + [",".join(f'"{value}"' for value in row.values()) for row in rows]
        path.write_text("\n".join(lines))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("file", "caption"), [("file_name", "text"), ("image", "caption"), ("path", "captions")])
def test_tables(tmp_path, kind, file, caption):
    picture(tmp_path / "b.png")
    picture(tmp_path / "a.png")
    table = tmp_path / f"table.{kind}"
    write_table(table, [{file: "b.png", caption: "a b, c", "x": 1}, {file: "a.png", caption: "12", "x": 2}])
    assert read(tmp_path, table=table) == [("b.png", ["a b, c"]), ("a.png", ["12"])]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_of_captions_and_nulls(tmp_path, kind):
    table = tmp_path / f"table.{kind}"
    write_table(table, [{"path": "a.png", "captions": ["one", "two"]}, {"path": "b.png", "captions": None}])
    first, second = folder_records(tmp_path, table=table)
    assert [caption.text for caption in first.captions] == [b"one", b"two"]
    assert second.captions == ()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_captions_that_are_not_utf8_are_rejected_alone(tmp_path, kind):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    table = tmp_path / f"table.{kind}"
    if kind == "txt":
        (tmp_path / "a.txt").write_bytes(b"caf\xe9")
        (tmp_path / "b.txt").write_bytes(b"b")
    elif kind == "csv":
        table.write_bytes(b"path,text\na.png,caf\xe9\nb.png,b\n")
    else:
        table.write_bytes(b'{"path": "a.png", "text": "caf\xe9"}\n\n{"path": "b.png", "text": "b"}\n')
    first, second = folder_records(tmp_path, table=None if kind == "txt" else table)
    with pytest.raises(Rejected, match="not UTF-8"):
        clean_captions(first.captions, light)
    assert clean_captions(second.captions, light)[0] == ["b"]


def test_held_out_share():
    names = [f"{number}.png" for number in range(5000)]
    out = {name for name in names if hash_share(name, 0.02)}
    assert 60 < len(out) < 140
    assert out < {name for name in names if hash_share(name, 0.1)}
    assert not any(hash_share(name, 0.0) for name in names)
    records = [Record(name, b"", (), "test") for name in names]
    assert {record.key for record in hold_out(records, 0.02) if record.split == "validation"} == out


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        folder_records(tmp_path / "missing")
    with pytest.raises(UserError, match="holds nothing"):
        folder_records(tmp_path)
    (tmp_path / "a.mp3").write_text("x")
    with pytest.raises(UserError, match=r"no picture .* holds 1 \.mp3"):
        folder_records(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"no captions: put name\.txt"):
        folder_records(tmp_path)
    with pytest.raises(UserError, match="share"):
        hold_out([], 1.5)


def test_bad_tables_are_named(tmp_path):
    with pytest.raises(UserError, match="no table"):
        folder_records(tmp_path, table=tmp_path / "none.csv")
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(UserError, match="must end in .csv"):
        folder_records(tmp_path, table=tmp_path / "a.xlsx")
    (tmp_path / "a.csv").write_text("name,caption\n")
    with pytest.raises(UserError, match=r"no column of pictures or file names .* its columns are name, caption"):
        folder_records(tmp_path, table=tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("path,words\n")
    with pytest.raises(UserError, match=r"no column of captions .* path, words"):
        folder_records(tmp_path, table=tmp_path / "b.csv")
    (tmp_path / "a.jsonl").write_text('{"path": "a"}\n{"path"\n')
    with pytest.raises(UserError, match="Line 2 .* is not a JSON object"):
        folder_records(tmp_path, table=tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(UserError, match="is not a Parquet file"):
        folder_records(tmp_path, table=tmp_path / "a.parquet")
