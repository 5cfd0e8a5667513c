"""DiffusionDB (large): 14 million pictures that Stable Diffusion drew, with their prompts."""

from collections.abc import Iterator
from pathlib import Path

from micro_diffusion.data.fetch import DOWNLOADS, HUB, expand, fetch, fetch_all
from micro_diffusion.data.records import Record
from micro_diffusion.data.sources.archives import caption_index, picture_records

PARTS = ("diffusiondb-large-part-1/part-{000001..010000}.zip", "diffusiondb-large-part-2/part-{010001..014000}.zip")
MAX_NSFW = 0.2  # of both scores, the picture's and the prompt's


def diffusiondb_records(
    address: str = f"{HUB}poloclub/diffusiondb", *, downloads: Path = DOWNLOADS, fraction: float = 1.0
) -> Iterator[Record]:
    """14,000 zips of 1,000 pictures; those with a high nsfw score are left out."""
    table = f"{address}/metadata-large.parquet"
    lookup = caption_index(downloads / "index", table, lambda: _prompts(fetch(table, downloads)))
    parts = [part for name in PARTS for part in expand(f"{address}/{name}")]
    parts = parts[: len(expand("{1..14000}", fraction))]
    return picture_records(fetch_all(parts, downloads), "diffusiondb", lookup, absent="nsfw score")


def _prompts(table: Path) -> Iterator[tuple[str, str]]:
    from pyarrow import parquet

    for batch in parquet.ParquetFile(table).iter_batches(columns=["image_name", "prompt", "image_nsfw", "prompt_nsfw"]):
        for name, prompt, *scores in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if max(scores) <= MAX_NSFW:
                yield name, prompt
