"""TextCaps: 25 thousand pictures with writing in them, five captions each that read it."""

from collections.abc import Iterator

from micro_diffusion.data.records import Record
from micro_diffusion.data.sources.tables import hub_records


def textcaps_records(address: str = "HuggingFaceM4/TextCaps", *, fraction: float = 1.0) -> Iterator[Record]:
    """Training and validation split, as the paper takes them; streamed from the hub's own Parquet."""
    revision = "refs/convert/parquet" if address == "HuggingFaceM4/TextCaps" else None
    for split in ("train", "validation"):
        yield from hub_records(address, split=split, revision=revision, fraction=fraction)
