"""What every source yields: a picture, its captions, a key; and how a picture becomes an RGB square."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

# Larger pictures are refused before they are decoded: a small file can claim a size that fills the memory.
MAX_PIXELS = 89_000_000


class Caption(NamedTuple):
    """One caption; at each visit one of a picture's captions is drawn with probability proportional to its weight."""

    text: str | bytes  # bytes: as found in a file, decoded as UTF-8 when it is cleaned
    weight: float = 1.0


@dataclass(frozen=True)
class Record:
    """One picture with its captions, as a source found it; nothing is opened or decoded yet."""

    key: str  # unique within a store
    image: bytes | Path | Callable[[], bytes]  # called in the threads that decode
    captions: tuple[Caption, ...]
    source: str
    split: str = "train"


class Rejected(Exception):
    """A record that cannot be used: `reason` is what rejects are counted by, `detail` what went wrong with this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def decode_image(record: Record) -> Image.Image:
    """Decode a record's picture to RGB: upright by its EXIF mark, transparency on white, 16-bit greys scaled to 8.

    Raises `Rejected` for a file that cannot be read, does not decode, or has more than `MAX_PIXELS` pixels.
    """
    try:
        image = record.image
        content = image if isinstance(image, bytes) else image.read_bytes() if isinstance(image, Path) else image()
    except OSError as error:
        raise Rejected("file cannot be read", error.strerror or str(error)) from error
    if not content:
        raise Rejected("empty file")
    try:
        picture = Image.open(io.BytesIO(content))
        if picture.width * picture.height > MAX_PIXELS:
            raise Rejected("too many pixels", f"{picture.width} x {picture.height}")
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
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def resize_crop(image: Image.Image, resolution: int) -> UInt8[np.ndarray, "h w 3"]:
    """Scale the shorter edge to `resolution` (bicubic, antialiased) and keep the central square.

    Both in one resampling of the central square, so that a very long picture costs no more than a square one.
    """
    edge = min(image.size)
    left, top = (image.width - edge) / 2, (image.height - edge) / 2
    square = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    return np.asarray(square)
