"""JourneyDB: 4 million pictures that Midjourney drew, with their prompts. Its terms must be accepted on the hub."""

import json
from collections.abc import Iterator
from pathlib import Path

from micro_diffusion.data.fetch import DOWNLOADS, HUB, expand, fetch, fetch_all
from micro_diffusion.data.records import Record
from micro_diffusion.data.sources.archives import caption_index, entries, picture_records

TABLE = "data/train/train_anno_realease_repath.jsonl.tgz"


def journeydb_records(
    address: str = f"{HUB}JourneyDB/JourneyDB",
    *,
    downloads: Path = DOWNLOADS,
    fraction: float = 1.0,
) -> Iterator[Record]:
    """200 archives of training pictures."""
    table = f"{address}/{TABLE}"
    lookup = caption_index(downloads / "index", table, lambda: _prompts(fetch(table, downloads)))
    archives = expand(f"{address}/data/train/imgs/{{000..199}}.tgz", fraction)
    return picture_records(fetch_all(archives, downloads), "journeydb", lookup)


def _prompts(table: Path) -> Iterator[tuple[str, str]]:
    for _, read in entries(table):
        for line in read().splitlines():
            row = json.loads(line)
            if row.get("prompt"):
                yield row["img_path"].rpartition("/")[2], row["prompt"]
