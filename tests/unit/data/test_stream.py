"""Batches encoded on the fly."""

import io
import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from micro_diffusion.data.loader import Batches
from micro_diffusion.data.stream import Stream
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.random import draw_normal


class Source:
    """40 records, of which 10 do not train: 4 are held out, the others are damaged or not wanted; counts decodings."""

    def __init__(self, world):
        self.decoded, self.records = [], []
        for number in range(40):
            record = world.record(number)
            if number in (5, 6, 17):
                record = replace(record, image=b"damage"[: number - 5])
            if number in (8, 28):
                record = replace(record, key="key-7")
            if number == 31:
                record = replace(record, captions=())
            self.records.append(replace(record, image=self.reader(record)))
        good = [number for number in range(40) if number not in (5, 6, 17, 8, 28, 31) and number % 10 != 3]
        self.keys = [f"key-{number}" for number in good]

    def reader(self, record):
        return lambda: self.decoded.append(record.key) or record.image

    def __call__(self):
        return iter(self.records)


@pytest.fixture
def source(world):
    return Source(world)


@pytest.fixture
def stream(world, source, tmp_path):
    return Stream(
        source, 16, world.encode_images, world.encode_text, world.info(), seed=7, marks=tmp_path / "m", workers=2
    )


def letters(batch):
    return [
        "".join(map(chr, states[mask, 0].int().tolist()))
        for states, mask in zip(batch.text, batch.text_mask, strict=True)
    ]


def same(one, two):
    return one.keys == two.keys and letters(one) == letters(two) and torch.equal(one.latents, two.latents)


def test_source_order_pass_after_pass(stream, source):
    assert isinstance(stream, Batches)
    batches = list(stream.batches(0, 90, 9))
    assert [key for batch in batches for key in batch.keys] == source.keys * 3
    reasons = {"duplicate key": 2, "image does not decode": 2, "empty file": 1, "no caption": 1}
    assert stream.left_out == Counter(reasons)  # of one pass
    assert all((batch.text[~batch.text_mask] == 0).all() for batch in batches)
    texts = [letters(batch) for batch in batches]
    drawn = Counter(caption[-1] for caption in itertools.chain(*texts))
    assert set(drawn) == {"0", "1"}
    for key, caption in zip(source.keys * 3, itertools.chain(*texts), strict=True):
        assert caption.startswith("c" * (int(key[4:]) % 5) + key[4:])


def test_latents_are_drawn_from_the_posterior_by_position(stream, source, world):
    (batch,) = stream.batches(30, 60, 30)
    for row, (key, latent) in enumerate(zip(batch.keys, batch.latents.float(), strict=True)):
        noise = draw_normal(7, "posterior", torch.tensor([30 + row]), (3, 4, 4))[0]
        number = int(key[4:])
        colour = torch.tensor([number % 256, number // 256 % 256, number * 37 % 256]) / 127.5 - 1
        spread = torch.tensor([0.1, 0.1, 0.0])[:, None, None]
        assert torch.allclose(latent, colour[:, None, None] + spread * noise, atol=2e-3)


@pytest.mark.parametrize("start", [0, 16, 24, 56])
def test_resumed_anywhere_with_or_without_marks(stream, source, tmp_path, start):
    whole = list(stream.batches(0, 80, 8))
    source.decoded.clear()
    rest = list(stream.batches(start, 80, 8))
    assert all(same(one, two) for one, two in zip(rest, whole[start // 8 :], strict=True))
    reached = source.records.index(next(r for r in source.records if r.key == whole[start // 8].keys[0]))
    assert source.records[reached].key in source.decoded[:2]  # by two threads: nothing before is decoded
    stream.marks.unlink()
    without = list(stream.batches(start, 80, 8))
    assert all(same(one, two) for one, two in zip(rest, without, strict=True))
    assert stream.left_out.total() == 6


def test_marks_serve_every_resolution_and_a_torn_one_is_dropped(stream, source):
    whole = [batch.keys for batch in replace(stream, resolution=32).batches(0, 40, 8)]
    stream.marks.write_text(stream.marks.read_text() + "[48, 0, 3")
    (batch,) = stream.batches(32, 40, 8)
    assert batch.keys == whole[4] and batch.latents.shape == (8, 3, 4, 4)
    positions = [json.loads(line)[0] for line in stream.marks.read_text().splitlines()[1:]]
    assert positions == [8, 16, 24, 32, 40]


def test_another_source_is_refused(stream, world):
    next(stream.batches(0, 8, 8))
    other = replace(stream, info=replace(world.info(), min_size=3))
    with pytest.raises(UserError, match="begun from another source"):
        next(other.batches(8, 16, 8))


def test_ranks_together_make_the_global_batch(stream, tmp_path):
    whole = list(stream.batches(4, 28, 8))
    ranks = [list(stream.batches(4, 28, 8, rank=rank, world=2)) for rank in range(2)]
    for one, *parts in zip(whole, *ranks, strict=True):
        assert one.keys == parts[0].keys + parts[1].keys
        assert torch.equal(one.latents, torch.cat([part.latents for part in parts]))
        assert letters(one) == letters(parts[0]) + letters(parts[1])
    with pytest.raises(ValueError, match="does not divide"):
        next(stream.batches(0, 9, 9, world=2))


def test_nothing_to_train_on_is_said(stream, source):
    source.records = [replace(record, image=io.BytesIO().getvalue()) for record in source.records]
    with pytest.raises(UserError, match=r"no picture to train on .left out: empty file 33"):
        next(stream.batches(0, 8, 8))


def test_text_of_fixed_length_and_first_captions(stream, source, world):
    (batch,) = replace(stream, text_length=3).batches(0, 20, 20)
    assert batch.text.shape == (20, 3, world.width) and batch.text_mask.all()
    source.decoded.clear()
    assert stream.captions(3) == ["0-0", "c1-0", "cc2-0"] and not source.decoded
