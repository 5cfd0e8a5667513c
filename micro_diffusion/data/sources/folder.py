"""A folder of pictures: captions in `name.txt` beside `name.png`, or in a CSV, JSONL or Parquet table."""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from micro_diffusion.data.records import Caption, Record
from micro_diffusion.runtime.files import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FILE_COLUMNS = ("file_name", "image", "path")
CAPTION_COLUMNS = ("caption", "text", "captions")

Captioned = Iterator[tuple[str, tuple[Caption, ...]]]  # file name and captions
Table = tuple[list[str], list[dict[str, Any]]]  # names of the columns, rows


def folder_records(path: Path, *, table: Path | None = None, validation: float = 0.02) -> Iterator[Record]:
    """Records of the folder's pictures, subfolders included, sorted by name; or of the table's rows, in their order.

    A table has one column of file names relative to `path` (`file_name`, `image` or `path`) and one of captions
    (`caption`, `text` or `captions`; JSONL and Parquet may hold lists). The share `validation` of the pictures, chosen
    by a hash of their names, is kept out of training. Raises `UserError` at once for a folder or table of no use.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give the folder that holds the pictures.")
    if not 0 <= validation < 1:
        raise UserError(f"validation is a share of the pictures, from 0 to below 1, not {validation}.")
    found = _beside(path) if table is None else _listed(Path(table))

    def record(name: str, captions: tuple[Caption, ...]) -> Record:
        return Record(name, path / name, captions, path.name, "validation" if held_out(name, validation) else "train")

    return (record(name, captions) for name, captions in found)


def held_out(name: str, share: float) -> bool:
    """Whether a name falls into this share of all names, by its hash."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _beside(folder: Path) -> Captioned:
    names = sorted(
        Path(parent, file).relative_to(folder).as_posix() for parent, _, fs in os.walk(folder) for file in fs
    )
    kinds = Counter(Path(name).suffix.lower() or "without ending" for name in names)
    there = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing"
    pictures = [name for name in names if name.lower().endswith(PICTURES)]
    if not pictures:
        raise UserError(f"There is no picture in {folder} ({' '.join(PICTURES)}); it holds {there}.")
    if ".txt" not in kinds:
        raise UserError(f"{folder} has no captions: put name.txt beside name.png, or name a table; it holds {there}.")
    texts = [(name, (folder / name).with_suffix(".txt")) for name in pictures]
    return ((name, (Caption(text.read_bytes()),) if text.exists() else ()) for name, text in texts)


def _listed(table: Path) -> Captioned:
    if not table.is_file():
        raise UserError(f"There is no table {table}.")
    if (kind := table.suffix.lower()) not in READERS:
        raise UserError(f"{table} is not a table that can be read: it must end in {', '.join(READERS)}.")
    columns, rows = READERS[kind](table)

    def column(wanted: tuple[str, ...], what: str) -> str:
        for name in wanted:
            if name in columns:
                return name
        has = ", ".join(columns) or "none"
        raise UserError(f"{table} has no column of {what} ({', '.join(wanted)}); its columns are {has}.")

    names, captions = column(FILE_COLUMNS, "file names"), column(CAPTION_COLUMNS, "captions")
    return ((os.fsdecode(row.get(names) or ""), _captions(row.get(captions))) for row in rows)


def _captions(value: Any) -> tuple[Caption, ...]:
    """One caption, a list of them, or none; as bytes, so that what is not UTF-8 is found out when they are cleaned."""
    values = [each for each in (value if isinstance(value, list) else [value]) if each is not None]
    return tuple(
        Caption(each if isinstance(each, bytes) else str(each).encode("utf-8", "surrogatepass")) for each in values
    )


def _read_csv(table: Path) -> Table:
    with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or []), list(reader)


def _read_jsonl(table: Path) -> Table:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(table.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n"), 1):
        try:
            if line.strip():
                rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"Line {number} of {table} is not a JSON object: {error}.") from error
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _read_parquet(table: Path) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(table)
    except pa.ArrowInvalid as error:
        raise UserError(f"{table} is not a Parquet file: {error}.") from error
    columns: list[str] = file.schema_arrow.names
    data = file.read(columns=[name for name in columns if name in FILE_COLUMNS + CAPTION_COLUMNS])
    for index, kind in enumerate(data.schema.types):
        if pa.types.is_string(kind):  # as bytes: one string that is not UTF-8 must not end the reading
            data = data.set_column(index, data.column_names[index], data.column(index).cast(pa.binary()))
    return columns, data.to_pylist()


READERS: dict[str, Callable[[Path], Table]] = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
