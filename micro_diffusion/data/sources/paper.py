"""The paper's data sets, where they are and how they lie; `downloads` and `fraction` are the same for all."""

import io
import json
import math
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from micro_diffusion.data.fetch import DOWNLOADS, HUB, expand, fetch, fetch_all, lock, one_ahead
from micro_diffusion.data.records import Record, Records, Rejected, decode_image, hash_share
from micro_diffusion.data.sources.archives import caption_index, entries, picture_records
from micro_diffusion.data.sources.tables import hub_records
from micro_diffusion.runtime.files import UserError, atomic_file

JOURNEYDB, DIFFUSIONDB = f"{HUB}JourneyDB/JourneyDB", f"{HUB}poloclub/diffusiondb"
COCO = "http://images.cocodataset.org"
Pairs = Iterator[tuple[str, str | bytes]]  # a picture's file name and one of its captions
DIFFUSIONDB_PARTS = ("1/part-{000001..010000}.zip", "2/part-{010001..014000}.zip")
MAX_NSFW = 0.2  # of both scores of DiffusionDB, the picture's and the prompt's
SA1B_CAPTIONS = f"{HUB}PixArt-alpha/SAM-LLaVA-Captions10M/SA1B_caption.tar.gz"
SA1B_EDGE = 512  # of the pictures that are kept; the originals have about 1,500


def cc12m(address: str = f"{HUB}pixparse/cc12m-wds", *, downloads: Path = DOWNLOADS, fraction: float = 1.0) -> Records:
    """CC12M, pictures of the web with their alternative texts: 2,176 WebDataset tars."""
    return picture_records(fetch_all(expand(f"{address}/cc12m-train-{{0000..2175}}.tar", fraction), downloads), "cc12m")


def sa1b(address: str, *, table: str = SA1B_CAPTIONS, downloads: Path = DOWNLOADS, fraction: float = 1.0) -> Records:
    """SA1B, large photographs, with captions by LLaVA. The address is the list of links of Segment Anything's page.

    The links expire. A tar is dropped once its pictures are kept with a shorter edge of 512 px.
    """
    if not Path(address).is_file():
        raise UserError(f"There is no list of links {address!r}; get it on Segment Anything's page: sa1b:LIST.txt.")
    links = sorted(line.split("\t") for line in Path(address).read_text().splitlines()[1:] if "\t" in line)
    links = links[: math.ceil(round(len(links) * fraction, 6))]

    def captions() -> Pairs:
        return ((Path(name).name, read()) for name, read in entries(fetch(table, downloads)))

    lookup = caption_index(downloads, table, captions)
    tars = one_ahead(partial(_shrunk, name, link.strip(), downloads) for name, link in links)
    return picture_records(tars, "sa1b", lambda name: lookup(f"{Path(name).stem}.txt"), absent="without LLaVA caption")


def _shrunk(name: str, link: str, downloads: Path, stop: threading.Event) -> Path:
    small = downloads / "sa1b" / name
    with lock(small):
        if small.exists():
            return small
        large = fetch(link, downloads, stop)
        try:
            with atomic_file(small) as made, tarfile.open(made, "w") as tar:
                for file, read in entries(large):
                    if file.endswith(".jpg"):
                        content, member = _resized(read()), tarfile.TarInfo(Path(file).name)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        except Rejected:  # it is read as it is, and the damage counted then
            return large
        large.unlink()
    return small


def _resized(content: bytes) -> bytes:
    buffer = io.BytesIO()
    try:
        picture = decode_image(Record("", content, (), ""))
    except Rejected:
        return content  # to be counted when it is encoded
    scale = min(1.0, SA1B_EDGE / min(picture.size))
    size = (round(picture.width * scale), round(picture.height * scale))
    picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def journeydb(address: str = JOURNEYDB, *, downloads: Path = DOWNLOADS, fraction: float = 1.0) -> Records:
    """JourneyDB, drawn by Midjourney: 200 archives of training pictures. Its terms must be accepted on the hub."""
    table = f"{address}/data/train/train_anno_realease_repath.jsonl.tgz"

    def prompts() -> Pairs:
        for _, read in entries(fetch(table, downloads)):
            rows = map(json.loads, read().splitlines())
            yield from ((Path(row["img_path"]).name, row["prompt"]) for row in rows if row.get("prompt"))

    archives = fetch_all(expand(f"{address}/data/train/imgs/{{000..199}}.tgz", fraction), downloads)
    return picture_records(archives, "journeydb", caption_index(downloads, table, prompts))


def diffusiondb(address: str = DIFFUSIONDB, *, downloads: Path = DOWNLOADS, fraction: float = 1.0) -> Records:
    """DiffusionDB (large), drawn by Stable Diffusion: 14,000 zips. Pictures with a high nsfw score are left out."""
    table = f"{address}/metadata-large.parquet"

    def prompts() -> Pairs:
        from pyarrow import parquet

        columns = ["image_name", "prompt", "image_nsfw", "prompt_nsfw"]
        for batch in parquet.ParquetFile(fetch(table, downloads)).iter_batches(columns=columns):
            for name, prompt, *scores in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if max(scores) <= MAX_NSFW:
                    yield name, prompt

    parts = [part for name in DIFFUSIONDB_PARTS for part in expand(f"{address}/diffusiondb-large-part-{name}")]
    parts = parts[: len(expand("{1..14000}", fraction))]
    lookup = caption_index(downloads, table, prompts)
    return picture_records(fetch_all(parts, downloads), "diffusiondb", lookup, absent="nsfw score")


def textcaps(address: str = "HuggingFaceM4/TextCaps", *, fraction: float = 1.0) -> Records:
    """TextCaps, pictures with writing in them: training and validation split, streamed from the hub's own Parquet."""
    revision = "refs/convert/parquet" if address == "HuggingFaceM4/TextCaps" else None
    for split in ("train", "validation"):
        yield from hub_records(address, split=split, revision=revision, fraction=fraction)


def coco(address: str = COCO, *, downloads: Path = DOWNLOADS, fraction: float = 1.0) -> Records:
    """COCO 2014, validation split: 40,504 pictures to judge by, never trained on."""
    table = f"{address}/annotations/annotations_trainval2014.zip"

    def captions() -> Pairs:
        (read,) = (read for name, read in entries(fetch(table, downloads)) if name.endswith("captions_val2014.json"))
        rows = json.loads(read())["annotations"]
        return ((f"COCO_val2014_{row['image_id']:012}.jpg", row["caption"]) for row in rows)

    pictures = fetch_all([f"{address}/zips/val2014.zip"], downloads)
    found = picture_records(pictures, "coco", caption_index(downloads, table, captions))
    return (replace(record, split="validation") for record in found if hash_share(record.key, fraction))
