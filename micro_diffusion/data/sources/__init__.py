"""Where pictures come from: one file a source, one line each in `SOURCES`."""

from collections.abc import Callable, Iterator
from pathlib import Path

from micro_diffusion.data.records import Record


def emoji(*, split: str | None = None, subset: str | None = None, augment: int = 0) -> Iterator[Record]:
    """The embedded drawings."""
    from micro_diffusion.data.sources.emoji import emoji_records

    return emoji_records(split=split, subset=subset, augment=augment)


def folder(path: Path, *, table: Path | None = None, validation: float = 0.02) -> Iterator[Record]:
    """A folder of pictures, captions beside them or in a table."""
    from micro_diffusion.data.sources.folder import folder_records

    return folder_records(path, table=table, validation=validation)


SOURCES: dict[str, Callable[..., Iterator[Record]]] = {"emoji": emoji, "folder": folder}
