"""Where pictures come from: one file a data set, one line each in `SOURCES`.

A source is a function of an address (a path, or what the data set's own address is replaced by) and of options, which
become those of `micro-diffusion prepare`. It yields records, always the same in the same order.
"""

from collections.abc import Callable, Iterator

from micro_diffusion.data.records import Record
from micro_diffusion.data.sources.archives import archive_records, webdataset_records
from micro_diffusion.data.sources.cc12m import cc12m_records
from micro_diffusion.data.sources.coco import coco_records
from micro_diffusion.data.sources.diffusiondb import diffusiondb_records
from micro_diffusion.data.sources.emoji import emoji_records
from micro_diffusion.data.sources.folder import folder_records
from micro_diffusion.data.sources.journeydb import journeydb_records
from micro_diffusion.data.sources.mds import mds_records
from micro_diffusion.data.sources.sa1b import sa1b_records
from micro_diffusion.data.sources.tables import hub_records, table_records
from micro_diffusion.data.sources.textcaps import textcaps_records

SOURCES: dict[str, Callable[..., Iterator[Record]]] = {
    "emoji": emoji_records,
    "folder": folder_records,
    "webdataset": webdataset_records,
    "archive": archive_records,
    "table": table_records,
    "hub": hub_records,
    "mds": mds_records,
    "cc12m": cc12m_records,
    "sa1b": sa1b_records,
    "journeydb": journeydb_records,
    "diffusiondb": diffusiondb_records,
    "textcaps": textcaps_records,
    "coco": coco_records,
}
