import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from micro_diffusion.data import records
from micro_diffusion.data.records import Caption, Record, Rejected, decode_image, resize_crop


def record(image):
    return Record("a", image, (Caption("a"),), "test")


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_decodes_to_rgb(kind, tmp_path):
    (tmp_path / "picture").write_bytes(encoded(Image.new("RGB", (6, 4), (200, 30, 30)), kind))
    image = decode_image(record(tmp_path / "picture"))
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert np.abs(np.asarray(image).astype(int) - (200, 30, 30)).max() < 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_decodes_to_rgb(mode):
    image = decode_image(record(encoded(Image.new(mode, (3, 3)), "TIFF" if mode == "CMYK" else "PNG")))
    assert image.mode == "RGB"


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    assert np.asarray(decode_image(record(encoded(image)))).tolist() == [[[255] * 3, [0] * 3]]
    palette = image.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert decode_image(record(encoded(palette))).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_greys_are_scaled():
    grey = Image.fromarray(np.array([[0, 32896, 65535]], np.uint16))
    assert np.asarray(decode_image(record(encoded(grey))))[0, :, 0].tolist() == [0, 128, 255]


def test_exif_rotation_is_undone():
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode_image(record(encoded(image, "JPEG", exif=exif))).size == (2, 4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty file"), (b"no picture", "image does not decode"), (None, "file cannot be read")],
)
def test_damage_is_rejected_with_a_reason(content, reason, tmp_path):
    with pytest.raises(Rejected) as error:
        decode_image(record(tmp_path / "missing" if content is None else content))
    assert error.value.reason == reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_file_is_rejected(kind):
    content = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), kind)
    with pytest.raises(Rejected, match="image does not decode"):
        decode_image(record(content[: len(content) // 2]))


def test_huge_picture_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(records, "MAX_PIXELS", 99)
    with pytest.raises(Rejected, match="too many pixels: 10 x 10"):
        decode_image(record(encoded(Image.new("RGB", (10, 10)))))


def test_decompression_bomb_is_refused():
    """A PNG whose header claims 30,000 by 30,000 pixels."""
    content = encoded(Image.new("RGB", (10, 10)))
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + content[24:29]
    bomb = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    with pytest.raises(Rejected, match="too many pixels"):
        decode_image(record(bomb))


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (20, 20), (1000, 20)])
def test_crop_is_resize_then_central_square(size):
    image = Image.effect_noise(size, 100).convert("RGB")
    small = image.resize((size[0] // 2, size[1] // 2), Image.Resampling.BICUBIC)
    left, top = (small.width - 10) // 2, (small.height - 10) // 2
    expected = np.asarray(small.crop((left, top, left + 10, top + 10))).astype(int)
    assert np.abs(resize_crop(image, 10) - expected).max() <= 1
    assert resize_crop(image, 50).shape == (50, 50, 3)


def test_shrinking_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32))).convert("RGB")
    small = resize_crop(stripes, 8).astype(int)
    assert np.abs(small[2:-2, 2:-2] - 127.5).max() < 8
