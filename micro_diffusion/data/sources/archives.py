"""Pictures in archives: WebDataset tars, and tars or zips of pictures whose captions are elsewhere."""

import io
import json
import sqlite3
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from micro_diffusion.data.fetch import DOWNLOADS, expand, fetch, fetch_all, lock
from micro_diffusion.data.records import Caption, Filtered, Record, Records, Rejected
from micro_diffusion.data.sources.tables import CAPTION_COLUMNS, PICTURES, captions_of, rows_of
from micro_diffusion.runtime.files import atomic_file

Lookup = Callable[[str], tuple[Caption, ...]]  # captions by name, several for a picture or none


class Entry(NamedTuple):
    """A file in an archive."""

    name: str
    read: Callable[[], bytes]


def webdataset_records(address: str, *, downloads: Path = DOWNLOADS, fraction: float = 1.0) -> Records:
    """WebDataset tars, `a-{0000..2175}.tar`: `KEY.jpg` with `KEY.txt` beside it, or a caption in `KEY.json`."""
    return picture_records(fetch_all(expand(address, fraction), downloads), Path(address).parent.name)


def archive_records(address: str, *, table: str, downloads: Path = DOWNLOADS, fraction: float = 1.0) -> Records:
    """Tars, tgz or zips of pictures with a table of their file names and captions."""
    lookup = caption_index(downloads, table, lambda: table_pairs(fetch(table, downloads)))
    return picture_records(fetch_all(expand(address, fraction), downloads), Path(address).parent.name, lookup)


def picture_records(
    archives: Iterable[Path], source: str, lookup: Lookup | None = None, *, absent: str = "not in the table"
) -> Records:
    """Records of the archives' pictures; captions by file name from the lookup, or else from the entries beside them.

    What the lookup does not know is left out as `absent`. Where an archive is damaged, what came before is kept.
    """
    for archive in archives:
        try:
            for stem, files in _together(archive):
                for ending, (name, read) in files.items():
                    if ending in PICTURES:
                        key = f"{archive.name.partition('.')[0]}/{stem}{ending if lookup else ''}"
                        captions = (lookup(name) or lookup(Path(name).name)) if lookup else _beside(files)
                        unwanted = Filtered(absent) if lookup and not captions else None
                        yield Record(key, read, captions, source, problem=unwanted)
        except Rejected as error:
            yield Record(archive.name, b"", (), source, problem=error)


def entries(archive: Path) -> Iterator[Entry]:
    """The files of a tar, tgz or zip in its order; those of a plain tar or a zip are read when they are wanted.

    Raises `Rejected` where the archive breaks off.
    """
    try:
        if zipfile.is_zipfile(archive):
            packed = zipfile.ZipFile(archive)
            yield from (Entry(file.filename, partial(packed.read, file)) for file in packed.infolist())
            return
        with tarfile.open(archive) as tar:
            plain = isinstance(tar.fileobj, io.BufferedReader)
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep millions of them
                if plain and member.isfile() and member.offset_data + member.size <= archive.stat().st_size:
                    yield Entry(member.name, partial(_piece, archive, member.offset_data, member.size))
                elif not plain and (file := tar.extractfile(member)):
                    yield Entry(member.name, partial(bytes, file.read()))
            if plain and any(_piece(archive, tar.offset, tarfile.BLOCKSIZE) or b"?"):  # tarfile says nothing of it
                raise tarfile.ReadError("it breaks off")
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        raise Rejected("archive is damaged", str(error)) from error


def _together(archive: Path) -> Iterator[tuple[str, dict[str, Entry]]]:
    """Neighbouring entries of one stem, by ending."""
    stem, files, damage = "", dict[str, Entry](), None
    try:
        for entry in entries(archive):
            before, (stem, ending) = stem, _split(entry.name)
            if files and (stem != before or ending in files):
                yield before, files
                files = {}
            files[ending] = entry
    except Rejected as error:
        damage = error
    if files:
        yield stem, files
    if damage:
        raise damage


def _piece(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _split(name: str) -> tuple[str, str]:
    """Stem and ending of an entry: WebDataset's key goes to the first dot of the file's own name."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}", f".{ending.lower()}"


def _beside(files: Mapping[str, Entry]) -> tuple[Caption, ...]:
    if text := files.get(".txt"):
        return (Caption(text.read()),)
    try:
        values = json.loads(files[".json"].read()) if ".json" in files else {}
    except ValueError:
        return ()
    return next((captions_of(values[name]) for name in CAPTION_COLUMNS if name in values), ())


def caption_index(downloads: Path, table: str, pairs: Callable[[], Iterable[tuple[str, str | bytes]]]) -> Lookup:
    """Captions by file name from an index on the disk, made of the pairs once: some tables are larger than memory."""
    file = downloads / "index" / f"{table.replace('/', '-').replace(':', '')}.sqlite"
    with lock(file):
        if not file.exists():
            with atomic_file(file) as made, closing(sqlite3.connect(made)) as database, database:
                database.execute("DROP TABLE IF EXISTS captions")  # of a killed process
                database.execute("CREATE TABLE captions (name, caption)")
                database.executemany("INSERT INTO captions VALUES (?, ?)", pairs())
                database.execute("CREATE INDEX names ON captions (name)")
    index = sqlite3.connect(file, check_same_thread=False)
    query = "SELECT caption FROM captions WHERE name = ? ORDER BY rowid"
    return lambda name: tuple(Caption(text) for (text,) in index.execute(query, (name,)))


def table_pairs(table: Path) -> Iterator[tuple[str, str | bytes]]:
    return ((str(image), caption.text) for image, captions in rows_of(table) for caption in captions)
