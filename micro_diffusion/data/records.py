"""What every source yields: a picture, its captions, a key; and how a picture becomes an RGB square."""

import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float16, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from micro_diffusion.runtime.files import UserError

# Larger pictures are refused before they are decoded: a small file can claim a size that fills the memory.
MAX_PIXELS = 89_000_000


class Caption(NamedTuple):
    """One caption; at each visit one of a picture's captions is drawn with probability proportional to its weight."""

    text: str | bytes  # bytes: as found in a file, decoded as UTF-8 when it is cleaned
    weight: float = 1.0


class Encoded(NamedTuple):
    """What a source already holds of a picture in encoded form, flat: taken as it is."""

    latents: Mapping[int, Float16[np.ndarray, " n"]]  # by resolution, shifted and scaled
    text: Float16[np.ndarray, " n"]  # states of every token of the caption


@dataclass(frozen=True)
class Record:
    """One picture with its captions, as a source found it; nothing is opened or decoded yet."""

    key: str  # unique within a store
    image: bytes | Path | Callable[[], bytes | Image.Image]  # called in the threads that decode
    captions: tuple[Caption, ...]
    source: str
    split: str = "train"
    problem: "Rejected | None" = None  # why the source itself could not read it, or leaves it out
    encoded: Encoded | None = None


Records = Iterator[Record]


class Rejected(Exception):
    """A record that cannot be used: `reason` is what rejects are counted by, `detail` what went wrong with this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.key = reason, detail, ""


class Filtered(Rejected):
    """A record that is not wanted: counted, and no sign of damage."""


def hash_share(name: str, share: float) -> bool:
    """Whether a name falls into this share of all names, by its hash."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def hold_out(records: Iterable[Record], share: float) -> Iterator[Record]:
    """The records, those with a share of all keys, chosen by hash, kept out of training. Raises `UserError`."""
    if not 0 <= share < 1:
        raise UserError(f"validation is a share of the pictures, from 0 to below 1, not {share}.")
    return (replace(record, split="validation") if hash_share(record.key, share) else record for record in records)


def distinct(records: Iterable[Record]) -> Iterator[Record]:
    """The records, those whose key was there before marked as rejected; 8 bytes of each key's hash are kept."""
    seen = set[bytes]()
    for record in records:
        before = len(seen)
        seen.add(hashlib.blake2b(repr(record.key).encode(), digest_size=8).digest())
        yield record if len(seen) > before else replace(record, problem=record.problem or Rejected("duplicate key"))


def decode_image(record: Record, *, min_size: int = 0, max_aspect: float = 0.0) -> Image.Image:
    """Decode a record's picture to RGB: upright by its EXIF mark, transparency on white, 16-bit greys scaled to 8.

    Raises `Rejected` for a file that cannot be read, does not decode, or has more than `MAX_PIXELS` pixels; `Filtered`
    for a shorter edge below `min_size`, or a longer one more than `max_aspect` times that (0: any).
    """
    try:
        image = record.image
        content = image if isinstance(image, bytes) else image.read_bytes() if isinstance(image, Path) else image()
    except OSError as error:
        raise Rejected("file cannot be read", error.strerror or str(error)) from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise Rejected("archive is damaged", str(error)) from error
    if not content:
        raise Rejected("empty file")
    try:
        picture = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
        if picture.width * picture.height > MAX_PIXELS:
            raise Rejected("too many pixels", f"{picture.width} x {picture.height}")
        if min(picture.size) < min_size:
            raise Filtered(f"smaller than {min_size} px")
        if max(picture.size) > (max_aspect or math.inf) * min(picture.size):
            raise Filtered(f"longer than {max_aspect:g} to 1")
        return _to_rgb(ImageOps.exif_transpose(picture))
    except Rejected:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected("too many pixels", str(error)) from error
    except UnidentifiedImageError as error:  # whose message holds a memory address
        raise Rejected("image does not decode", "unknown format") from error
    except Exception as error:  # damaged files make Pillow raise nearly anything: OSError, SyntaxError, IndexError, ...
        raise Rejected("image does not decode", f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_crop(image: Image.Image, resolution: int) -> UInt8[np.ndarray, "h w 3"]:
    """Scale the shorter edge to `resolution` (bicubic, antialiased) and keep the central square.

    Both in one resampling of the central square, so that a very long picture costs no more than a square one.
    """
    edge = min(image.size)
    left, top = (image.width - edge) / 2, (image.height - edge) / 2
    square = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    return np.asarray(square)
