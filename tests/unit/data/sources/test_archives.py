import io
import json
import tarfile

import pytest
from archives import packed, picture, tar

from micro_diffusion.data.captions import clean_captions, light
from micro_diffusion.data.records import Rejected, decode_image
from micro_diffusion.data.sources.archives import archive_records, caption_index, entries, webdataset_records


def shard(path, numbers, **others):
    files = {}
    for number in numbers:
        files[f"{number:04}.jpg"], files[f"{number:04}.txt"] = picture(number), f"caption {number}".encode()
    tar(path, files | others)


def read(record):
    assert decode_image(record).size == (40, 32)
    return record.key, clean_captions(record.captions, light)[0]


def test_webdataset(tmp_path):
    shard(tmp_path / "cats" / "a-0.tar", range(3))
    shard(tmp_path / "cats" / "a-1.tar", range(3))
    records = list(webdataset_records(f"{tmp_path}/cats/a-{{0..1}}.tar"))
    assert [read(record) for record in records] == [
        (f"a-{part}/{number:04}", [f"caption {number}"]) for part in range(2) for number in range(3)
    ]
    assert {record.source for record in records} == {"cats"}


def test_captions_in_json_and_other_entries(tmp_path):
    files = {"x/1.png": picture(1, "PNG"), "x/1.json": json.dumps({"caption": ["one", "uno"], "id": 3}).encode()}
    files |= {"x/2.jpg": picture(2), "x/2.json": b"{", "x/3.json": b"{}", "4.seg.png": picture(3), "4.jpg": picture(4)}
    tar(tmp_path / "a.tar", files)
    records = list(webdataset_records(str(tmp_path / "a.tar")))
    assert [(record.key, record.captions and clean_captions(record.captions, light)[0]) for record in records] == [
        ("a/x/1", ["one", "uno"]), ("a/x/2", ()), ("a/4", ()),
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_truncated_tars_keep_what_came_before(tmp_path, mode):
    """Wherever a tar breaks off, the pictures before it are read, it is counted once, and the next tar is read too."""
    files = {f"{number:04}.jpg": picture(number) for number in range(4)}
    tar(tmp_path / "a.tar", files, mode)
    whole = (tmp_path / "a.tar").read_bytes()
    shard(tmp_path / "b.tar", range(2))
    ends = (600, 1536, 2048, 2600, 4 * 1536) if mode == "w" else (30, len(whole) // 2)
    for end in ends:
        (tmp_path / "a.tar").write_bytes(whole[:end])
        records = list(webdataset_records(f"{tmp_path}/?.tar"))
        bad = [record for record in records if record.problem]
        assert [(record.key, record.problem.reason) for record in bad] == [("a.tar", "archive is damaged")]
        good = [record.key for record in records if not record.problem]
        assert good[-2:] == ["b/0000", "b/0001"]
        if mode == "w":
            assert len(good) - 2 == end // 1536
        for record in records:
            if not record.problem:
                decode_image(record)


def test_damage_inside_a_tar_is_found(tmp_path):
    shard(tmp_path / "a.tar", range(4))
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[3 * 1024 + 1024 : 3 * 1024 + 1100] = b"\xff" * 76  # a header
    (tmp_path / "a.tar").write_bytes(content)
    assert list(webdataset_records(str(tmp_path / "a.tar")))[-1].problem.reason == "archive is damaged"


def test_empty_and_foreign_files_are_damaged_archives(tmp_path):
    for content in (b"", b"<html>404</html>" * 100):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(Rejected, match="archive is damaged"):
            list(entries(tmp_path / "a.tar"))


def test_damaged_zip_entry_is_rejected_alone(tmp_path):
    packed(tmp_path / "a.zip", {"1.jpg": picture(1), "2.jpg": picture(2)})
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[200:220] = bytes(20)
    (tmp_path / "a.zip").write_bytes(content)
    (tmp_path / "t.csv").write_text("file_name,caption\n1.jpg,one\n2.jpg,two\n")
    first, second = archive_records(str(tmp_path / "a.zip"), table=str(tmp_path / "t.csv"), downloads=tmp_path / "d")
    with pytest.raises(Rejected, match="archive is damaged"):
        decode_image(first)
    assert read(second) == ("a/2.jpg", ["two"])


@pytest.mark.parametrize("name", ["a.zip", "a.tgz", "a.tar"])
def test_archive_with_a_table(tmp_path, name):
    files = {f"sub/{number}.webp": picture(number, "WEBP") for number in range(3)} | {"readme.txt": b"x"}
    packed(tmp_path / name, files) if name == "a.zip" else tar(tmp_path / name, files, "w:gz" if "tgz" in name else "w")
    rows = [{"file_name": "sub/0.webp", "captions": ["nought", "zero"]}, {"file_name": "2.webp", "captions": "two"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = list(archive_records(str(tmp_path / name), table=str(tmp_path / "t.jsonl"), downloads=tmp_path / "d"))
    assert [read(record) for record in records if not record.problem] == [
        ("a/sub/0.webp", ["nought", "zero"]), ("a/sub/2.webp", ["two"]),
    ]  # fmt: skip
    assert [(record.key, record.problem.reason) for record in records if record.problem] == [
        ("a/sub/1.webp", "not in the table")
    ]


def test_index_is_made_once_and_keeps_order(tmp_path):
    look = caption_index(tmp_path, "hf://x/y.json", lambda: [("a", "2"), ("b", b"\xff"), ("a", "1")])
    assert [caption.text for caption in look("a")] == ["2", "1"] and look("c") == ()
    again = caption_index(tmp_path, "hf://x/y.json", lambda: 1 / 0)
    assert again("b")[0].text == b"\xff"
    with pytest.raises(ZeroDivisionError):
        caption_index(tmp_path, "other", lambda: 1 / 0)
    assert len([file for file in tmp_path.rglob("*.sqlite") if file and file.name[0] != "."]) == 1


def test_duplicate_keys_are_found_when_prepared(world, tmp_path):
    files = [("1.jpg", picture(1)), ("1.txt", b"one"), ("1.jpg", picture(2)), ("1.txt", b"two"), ("2.jpg", picture(3))]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in [*files, ("2.txt", b"caf\xe9"), ("3.jpg", b""), ("3.txt", b"three")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    report = world.prepare(webdataset_records(str(tmp_path / "a.tar")), tmp_path / "store", max_rejected=1.0)
    assert (report.rows, report.rejected) == (1, {"duplicate key": 1, "caption is not UTF-8": 1, "empty file": 1})
