"""COCO 2014, validation split: what pictures are judged by, never trained on."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from micro_diffusion.data.fetch import DOWNLOADS, fetch, fetch_all
from micro_diffusion.data.records import Record, hash_share
from micro_diffusion.data.sources.archives import caption_index, entries, picture_records

PICTURES, CAPTIONS = "zips/val2014.zip", "annotations/annotations_trainval2014.zip"


def coco_records(
    address: str = "http://images.cocodataset.org", *, downloads: Path = DOWNLOADS, fraction: float = 1.0
) -> Iterator[Record]:
    """40,504 pictures, about five captions each."""
    annotations = f"{address}/{CAPTIONS}"
    lookup = caption_index(downloads / "index", annotations, lambda: _captions(fetch(annotations, downloads)))
    found = picture_records(fetch_all([f"{address}/{PICTURES}"], downloads), "coco", lookup)
    return (replace(record, split="validation") for record in found if hash_share(record.key, fraction))


def _captions(archive: Path) -> Iterator[tuple[str, str]]:
    (read,) = (read for name, read in entries(archive) if name.endswith("captions_val2014.json"))
    for row in json.loads(read())["annotations"]:
        yield f"COCO_val2014_{row['image_id']:012}.jpg", row["caption"]
