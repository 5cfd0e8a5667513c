"""A folder of pictures: captions in `name.txt` beside `name.png`, or in a CSV, JSONL or Parquet table."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from micro_diffusion.data.records import Caption, Record
from micro_diffusion.data.sources.tables import PICTURES, row_record, rows_of
from micro_diffusion.runtime.files import UserError


def folder_records(address: Path | str, *, table: Path | str | None = None) -> Iterator[Record]:
    """Records of the folder's pictures, subfolders included, sorted by name; or of the table's rows, in their order.

    A table has one column of file names relative to the folder (`file_name`, `image` or `path`) and one of captions
    (`caption`, `text` or `captions`; JSONL and Parquet may hold lists). Raises `UserError` at once for one of no use.
    """
    folder = Path(address)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the pictures.")
    rows = _beside(folder) if table is None else rows_of(Path(table))
    return (row_record(row, f"{number:08}", folder=folder, source=folder.name) for number, row in enumerate(rows))


def _beside(folder: Path) -> Iterator[tuple[str, tuple[Caption, ...]]]:
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
