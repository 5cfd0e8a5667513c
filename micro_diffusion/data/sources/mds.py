"""MDS folders as the reference's scripts write them: raw pictures, or latents that are already encoded.

A shard is: number of samples n (uint32), n + 1 offsets (uint32), a header; a sample: the sizes (uint32) of its columns
of variable size, then the values of all columns. `index.json` names columns, encodings and shards.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from micro_diffusion.data.records import Encoded, Record, Rejected
from micro_diffusion.data.sources.tables import CAPTION_COLUMNS, captions_of
from micro_diffusion.runtime.files import UserError

PLAIN = ("str", "bytes", "jpeg", "png")
CAPTIONS = (*CAPTION_COLUMNS, "json")  # the last one for COCO


def mds_records(address: str) -> Iterator[Record]:
    """Records of an MDS folder. Latents and caption states in it are taken as they are, without encoding."""
    folder = Path(address)
    if not (folder / "index.json").is_file():
        raise UserError(f"{folder} is not an MDS folder: it has no index.json.")
    shards = json.loads((folder / "index.json").read_text())["shards"]
    if any(shard["format"] != "mds" or shard.get("compression") for shard in shards):
        raise UserError(f"{folder} holds compressed shards; unpack them first.")
    return (record for shard in shards for record in _records(folder, shard))


def _records(folder: Path, shard: dict[str, Any]) -> Iterator[Record]:
    name: str = shard["raw_data"]["basename"]
    try:
        for number, values in enumerate(_samples(folder / name, shard)):
            key = f"{name.removesuffix('.mds')}/{number:06}"
            caption = next((values[column] for column in CAPTIONS if column in values), None)
            yield Record(key, values.get("jpg", b""), captions_of(caption), folder.name, encoded=_encoded(values))
    except Rejected as error:
        yield Record(name, b"", (), folder.name, problem=error)


def _samples(path: Path, shard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    columns = list(zip(shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True))
    content = np.memmap(path, np.uint8, "r") if path.is_file() and path.stat().st_size else np.zeros(0, np.uint8)
    offsets = content[4 : 4 * (shard["samples"] + 2)].view("<u4")
    if len(offsets) != shard["samples"] + 1:
        raise Rejected("archive is damaged", f"{path.name} breaks off")
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        sample = content[start:stop].tobytes()
        if len(sample) != stop - start:
            raise Rejected("archive is damaged", f"{path.name} breaks off")
        sizes = iter(np.frombuffer(sample, "<u4", sum(size is None for *_, size in columns)).tolist())
        place, values = 4 * sum(size is None for *_, size in columns), {}
        for name, encoding, size in columns:
            length = next(sizes) if size is None else size
            if encoding in (*PLAIN, "json"):
                value = sample[place : place + length]
                values[name] = value if encoding in PLAIN else json.loads(value)
            place += length
        yield values


def _encoded(values: dict[str, Any]) -> Encoded | None:
    """The reference's latents (float16, already scaled) by resolution, and the states of the caption."""
    numbers = {name: np.frombuffer(values[name], np.float16) for name in values if "latents" in name}
    latents = {int(name.removeprefix("latents_")): numbers[name] for name in numbers if name != "caption_latents"}
    return Encoded(latents, numbers["caption_latents"]) if latents and "caption_latents" in numbers else None
