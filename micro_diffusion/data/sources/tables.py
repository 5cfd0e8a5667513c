"""Folders and tables of pictures and captions: CSV, JSONL or Parquet with file names or pictures, and hub data."""

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from micro_diffusion.data.fetch import DOWNLOADS, expand, fetch_all
from micro_diffusion.data.records import Caption, Record, Records, hash_share
from micro_diffusion.runtime.files import UserError, user_error

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
IMAGE_COLUMNS = ("file_name", "image", "path", "jpg", "png", "webp", "img_path", "image_name")
CAPTION_COLUMNS = ("caption", "text", "captions", "prompt", "reference_strs", "caption_syn_pixart_llava15", "txt")

Row = tuple[str | bytes, tuple[Caption, ...]]  # file name or content of a picture, captions
Table = tuple[list[str], Iterable[dict[str, Any]]]  # names of the columns, rows


def folder_records(address: Path | str, *, table: Path | str | None = None) -> Records:
    """Records of the folder's pictures, subfolders included, sorted by name; or of the table's rows, in their order.

    A table has one column of file names relative to the folder (`file_name`, `image` or `path`) and one of captions
    (`caption`, `text` or `captions`; JSONL and Parquet may hold lists). Raises `UserError` at once for one of no use.
    """
    folder = Path(address)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the pictures.")
    return _records(_beside(folder) if table is None else rows_of(Path(table)), folder)


def _beside(folder: Path) -> Iterator[tuple[str, tuple[Caption, ...]]]:
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    kinds = Counter(Path(name).suffix.lower() or "without ending" for name in names)
    there = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing"
    pictures = [name for name in names if name.lower().endswith(PICTURES)]
    if not pictures:
        raise UserError(f"There is no picture in {folder} ({' '.join(PICTURES)}); it holds {there}.")
    if ".txt" not in kinds:
        raise UserError(f"{folder} has no captions: put name.txt beside name.png, or name a table; it holds {there}.")
    texts = [(name, (folder / name).with_suffix(".txt")) for name in pictures]
    return ((name, (Caption(text.read_bytes()),) if text.exists() else ()) for name, text in texts)


def table_records(address: str, *, downloads: Path = DOWNLOADS, fraction: float = 1.0) -> Records:
    """Rows of CSV, JSONL or Parquet tables: pictures in a column, or their file names beside the table."""
    for table in fetch_all(expand(address, fraction), downloads):
        yield from _records(rows_of(table), table.parent, f"{table.stem}/")


def hub_records(address: str, *, split: str = "train", revision: str | None = None, fraction: float = 1.0) -> Records:
    """A data set of the hub by its name, or a local folder that `datasets` can read: streamed, nothing is kept."""
    import datasets
    from datasets.exceptions import DatasetsError

    with user_error(f"The data set {address!r} ({split}) cannot be opened: {{}}", OSError, ValueError, DatasetsError):
        rows = datasets.load_dataset(address, split=split, revision=revision, streaming=True)
        columns = list(rows.features or next(iter(rows)))
        image, captions = _columns(columns, address)
        rows = rows.select_columns([image, captions]).cast_column(image, datasets.Image(decode=False))
    for number, row in enumerate(rows):
        if hash_share(key := f"{split}/{number:08}", fraction):
            content = _image(row[image])
            read = content if isinstance(content, bytes) else partial(_read, content)
            yield Record(key, read, captions_of(row[captions]), address)


def _read(address: str) -> bytes:
    import fsspec

    with fsspec.open(address, "rb") as file:
        return bytes(file.read())


def _records(rows: Iterable[Row], folder: Path, prefix: str = "") -> Records:
    """A file's name becomes the key; a picture that is in the table itself gets its row's number."""
    for number, (image, captions) in enumerate(rows):
        if isinstance(image, bytes):
            yield Record(f"{prefix}{number:08}", image, captions, folder.name)
        else:
            yield Record(image, folder / image, captions, folder.name)


def rows_of(table: Path) -> Iterator[Row]:
    """Picture and captions of each row. Raises `UserError` at once for a file that is not such a table."""
    if not table.is_file():
        raise UserError(f"There is no table {table}.")
    if (kind := table.suffix.lower()) not in READERS:
        raise UserError(f"{table} is not a table that can be read: it must end in {', '.join(READERS)}.")
    columns, rows = READERS[kind](table)
    image, captions = _columns(columns, str(table))
    return ((_image(row.get(image)), captions_of(row.get(captions))) for row in rows)


def _columns(columns: list[str], table: str) -> tuple[str, str]:
    """The columns of pictures (or file names) and of captions."""
    image, caption = (next(filter(columns.__contains__, names), "") for names in (IMAGE_COLUMNS, CAPTION_COLUMNS))
    if not image or not caption:
        what, names = ("captions", CAPTION_COLUMNS) if image else ("pictures or file names", IMAGE_COLUMNS)
        has = ", ".join(columns) or "none"
        raise UserError(f"{table} has no column of {what} ({', '.join(names)}); its columns are {has}.")
    return image, caption


def _image(value: Any) -> str | bytes:
    """As `datasets` stores it: content, or the file's name, or both."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, bytes) else os.fsdecode(value or "")


def captions_of(value: Any) -> tuple[Caption, ...]:
    """One caption, a list of them, or none; as bytes, so that what is not UTF-8 is found out when they are cleaned."""
    values = [each for each in (value if isinstance(value, list | tuple) else [value]) if each is not None]
    texts = (each if isinstance(each, bytes) else str(each).encode("utf-8", "surrogatepass") for each in values)
    return tuple(map(Caption, texts))


def _read_csv(table: Path) -> Table:
    with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or []), list(reader)


def _read_jsonl(table: Path) -> Table:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(table.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n"), 1):
        with user_error(f"Line {number} of {table} is not a JSON object: {{}}.", ValueError, TypeError):
            if line.strip():
                rows.append(dict(json.loads(line)))
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _read_parquet(table: Path) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    with user_error(f"{table} is not a Parquet file: {{}}.", pa.ArrowInvalid):
        file = parquet.ParquetFile(table)
    wanted = [field for field in file.schema_arrow if field.name in IMAGE_COLUMNS + CAPTION_COLUMNS]
    strings = {field.name for field in wanted if pa.types.is_string(field.type)}
    # as bytes: one string that is not UTF-8 must not end the reading
    schema = pa.schema([field.with_type(pa.binary()) if field.name in strings else field for field in wanted])

    def rows() -> Iterator[dict[str, Any]]:
        for batch in file.iter_batches(256, columns=schema.names):
            for row in batch.select(schema.names).cast(schema).to_pylist():
                yield row | {name: os.fsdecode(row[name] or b"") for name in strings.intersection(IMAGE_COLUMNS)}

    return file.schema_arrow.names, rows()


READERS: dict[str, Callable[[Path], Table]] = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
