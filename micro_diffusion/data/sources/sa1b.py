"""SA1B: 11 million large photographs; captions by LLaVA, from the makers of PixArt."""

import io
import math
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from micro_diffusion.data.fetch import DOWNLOADS, HUB, ahead, fetch
from micro_diffusion.data.records import Record, Rejected, decode_image
from micro_diffusion.data.sources.archives import caption_index, entries, picture_records
from micro_diffusion.runtime.files import TEMPORARY_PREFIX, UserError

CAPTIONS = f"{HUB}PixArt-alpha/SAM-LLaVA-Captions10M/SA1B_caption.tar.gz"
EDGE = 512  # of the pictures that are kept; the originals have about 1,500


def sa1b_records(
    address: str, *, captions: str = CAPTIONS, downloads: Path = DOWNLOADS, fraction: float = 1.0
) -> Iterator[Record]:
    """The tars of the list of links that Segment Anything's page gives; the links expire, so the file is an argument.

    A tar is dropped once its pictures are kept at 512 px: a twelfth of the size.
    """
    if not Path(address).is_file():
        raise UserError(f"There is no list of links {address!r}; get it on Segment Anything's page: sa1b:LIST.txt.")
    links = [line.split("\t") for line in Path(address).read_text().splitlines()[1:] if "\t" in line]
    links = sorted(links)[: math.ceil(round(len(links) * fraction, 6))]
    lookup = caption_index(downloads / "index", captions, lambda: _captions(fetch(captions, downloads)))
    tars = ahead(partial(_shrunk, name, link.strip(), downloads) for name, link in links)
    return picture_records(tars, "sa1b", lambda name: lookup(f"{Path(name).stem}.txt"), absent="without LLaVA caption")


def _captions(archive: Path) -> Iterator[tuple[str, bytes]]:
    return ((Path(name).name, read()) for name, read in entries(archive))


def _shrunk(name: str, link: str, downloads: Path, stop: threading.Event) -> Path:
    """The tar's pictures with a shorter edge of `EDGE` at most; what does not decode is kept as it is."""
    small = downloads / "sa1b" / name
    if small.exists():
        return small
    large, made = fetch(link, downloads, stop), small.with_name(TEMPORARY_PREFIX + name)
    small.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(made, "w") as tar:
        for file, read in entries(large):
            if file.endswith(".jpg"):
                content = _resized(read())
                member = tarfile.TarInfo(Path(file).name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    made.replace(small)
    large.unlink()
    return small


def _resized(content: bytes) -> bytes:
    try:
        picture = decode_image(Record("", content, (), ""))
    except Rejected:
        return content  # to be rejected, and counted, when it is encoded
    scale, buffer = EDGE / min(picture.size), io.BytesIO()
    if scale < 1:
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    picture.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
