"""Where pictures come from: a function each, one line each in `SOURCES`.

A source takes an address (a path, or what the data set's own is replaced by) and options, which become those of
`micro-diffusion prepare`. It yields records, always the same in the same order.
"""

from collections.abc import Callable, Iterator

from micro_diffusion.data.records import Record
from micro_diffusion.data.sources import archives, paper, tables
from micro_diffusion.data.sources.emoji import emoji_records
from micro_diffusion.data.sources.emoji_scenes import emoji_scene_records
from micro_diffusion.data.sources.mds import mds_records

SOURCES: dict[str, Callable[..., Iterator[Record]]] = {
    "emoji": emoji_records, "emoji-scenes": emoji_scene_records, "folder": tables.folder_records, "mds": mds_records,
    "webdataset": archives.webdataset_records, "archive": archives.archive_records,
    "table": tables.table_records, "hub": tables.hub_records,
    "cc12m": paper.cc12m, "sa1b": paper.sa1b, "journeydb": paper.journeydb, "diffusiondb": paper.diffusiondb,
    "textcaps": paper.textcaps, "coco": paper.coco,
}  # fmt: skip
