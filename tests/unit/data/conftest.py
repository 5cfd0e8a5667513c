"""A small world: pictures of one colour, an autoencoder that averages, a text encoder that counts letters."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from micro_diffusion.data.prepare import prepare
from micro_diffusion.data.records import Caption, Record
from micro_diffusion.data.store import AutoencoderInfo, Store, StoreInfo, TextInfo

WIDTH = 3


def encode_images(images):
    """Four times down: the mean of each square, one channel of noise without spread; deviation 0.1 elsewhere."""
    mean = torch.nn.functional.avg_pool2d(images, 4)
    std = torch.full_like(mean, 0.1)
    std[:, 2] = 0
    return mean, std


def encode_text(captions):
    """One token a letter; its state is (code point, place, length)."""
    longest = max(map(len, captions))
    states, mask = (
        torch.full((len(captions), longest, WIDTH), 77.0),
        torch.zeros(len(captions), longest, dtype=torch.bool),
    )
    for row, caption in enumerate(captions):
        for place, letter in enumerate(caption):
            states[row, place] = torch.tensor([ord(letter), place, len(caption)])
            mask[row, place] = True
    return states, mask


def png(number):
    buffer = io.BytesIO()
    colour = (number % 256, number // 256 % 256, (number * 37) % 256)
    Image.fromarray(np.full((9, 8, 3), colour, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def record(number, captions=2, split=None):
    texts = [Caption(f"{'c' * (number % 5)}{number}-{choice}", choice + 1.0) for choice in range(captions)]
    return Record(
        f"key-{number}", png(number), tuple(texts), "test", split or ("validation" if number % 10 == 3 else "train")
    )


def store_info(autoencoder="aa", text="bb", name="letters", rule="light"):
    return StoreInfo(
        autoencoder=AutoencoderInfo("mean", autoencoder, 1.0, 0.0, 3, 4),
        text_encoders={name: TextInfo(text, WIDTH, 20, "padding")},
        caption_rule=rule,
        source="colours",
    )


class World:
    """What tests of the store need, in one place."""

    record = staticmethod(record)
    info = staticmethod(store_info)
    encode_images = staticmethod(encode_images)
    encode_text = staticmethod(encode_text)
    width = WIDTH

    def prepare(self, records, out, *, resolutions=(16,), info=None, **options):
        options = {"encode_images": encode_images, "encode_text": encode_text, "batch_size": 8, **options}
        return prepare(records, out, resolutions=resolutions, info=info or store_info(), **options)

    def store(self, out, rows=30, *, rows_per_part=10, first=0, **options):
        self.prepare(map(record, range(first, first + rows)), out, rows_per_part=rows_per_part, **options)
        return Store.open(out)


@pytest.fixture(scope="session")
def world():
    return World()
