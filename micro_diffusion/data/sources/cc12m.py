"""CC12M: 12 million pictures of the web with their alternative texts."""

from collections.abc import Iterator
from pathlib import Path

from micro_diffusion.data.fetch import DOWNLOADS, HUB, expand, fetch_all
from micro_diffusion.data.records import Record
from micro_diffusion.data.sources.archives import picture_records


def cc12m_records(
    address: str = f"{HUB}pixparse/cc12m-wds", *, downloads: Path = DOWNLOADS, fraction: float = 1.0
) -> Iterator[Record]:
    """2,176 WebDataset tars. The list of addresses itself goes through img2dataset, then `webdataset:`."""
    return picture_records(fetch_all(expand(f"{address}/cc12m-train-{{0000..2175}}.tar", fraction), downloads), "cc12m")
