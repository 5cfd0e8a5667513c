"""From records straight to batches, encoded on the fly: for pictures that are looked at once, and not stored."""

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from micro_diffusion.data import encode
from micro_diffusion.data.encode import EncodeImages, EncodeText, Sample, encode_captions, encode_pictures, to_half
from micro_diffusion.data.loader import Batch, Reading, choose_caption, shares
from micro_diffusion.data.records import Record, Rejected, distinct
from micro_diffusion.data.store import StoreInfo
from micro_diffusion.runtime.ahead import ahead
from micro_diffusion.runtime.files import UserError, write_atomic
from micro_diffusion.runtime.random import draw_normal, draw_uniform

AT_ONCE = 64  # pictures, captions in one call of an encoder


class Mark(NamedTuple):
    """How far the source was read when a position was reached."""

    position: int = 0
    passes: int = 0  # whole ones
    records: int = 0  # of the pass at hand
    left_out: dict[str, int] = {}  # noqa: RUF012  # by reason, in the first pass


@dataclass(frozen=True)
class Stream:
    """Batches of a source's training records at one resolution, in the source's order; at its end a new pass begins.

    `read` gives the records, the same ones at every call. A rejected record has no position. `marks` is a file that
    remembers where positions lie in the source, so that a resumed run decodes only what it will see.
    """

    read: Callable[[], Iterable[Record]]
    resolution: int
    encode_images: EncodeImages
    encode_text: EncodeText
    info: StoreInfo  # of its settings: one text encoder, caption rule, filters
    seed: int
    marks: Path
    text_length: int | None = None
    device: torch.device | str = "cpu"
    workers: int = os.cpu_count() or 4
    left_out: Counter[str] = field(default_factory=Counter)  # by reason, in the first pass as far as it was read

    def captions(self, count: int) -> list[str]:
        """The first captions of the first pictures; nothing is decoded."""
        samples = (encode.load(record, (), self.info) for record in self.read())
        return list(itertools.islice((found.texts[0] for found in samples if isinstance(found, Sample)), count))

    def batches(self, start: int, stop: int, batch_size: int, *, rank: int = 0, world: int = 1) -> Reading:
        """This rank's share of each global batch between two positions; every rank decodes all, encodes its own."""
        parts = shares(start, stop, batch_size, rank=rank, world=world)
        mark = self._seek(start, keep=rank == 0)
        aside = torch.cuda.Stream(self.device) if torch.device(self.device).type == "cuda" else None
        with contextlib.closing(self._samples(mark)) as samples:
            for _ in range(start - mark.position):
                next(samples)
            for position, size, first, last in parts:
                some, marks = zip(*itertools.islice(samples, size), strict=True)
                with torch.cuda.stream(aside) if aside else contextlib.nullcontext():  # beside the training step
                    batch = self._encode(some[first:last], position + first)
                if rank == 0:
                    with self.marks.open("a") as file:
                        file.write(json.dumps(marks[-1]._replace(position=position + size)) + "\n")
                yield batch

    def _seek(self, start: int, *, keep: bool) -> Mark:
        """The last mark that is not after a position; later ones and a torn one are removed."""
        about = json.dumps(asdict(self.info), sort_keys=True) + "\n"
        first, *lines = self.marks.read_text().splitlines(keepends=True) if self.marks.exists() else [about]
        if first != about:
            begun = f"The run in {self.marks.parent} was begun from another source or with other settings for it"
            raise UserError(f"{begun}; give the same ones, or choose a new folder.")
        known = [Mark(*json.loads(line)) for line in lines if line.endswith("\n")]
        before = [mark for mark in known if mark.position <= start]
        if keep:
            write_atomic(self.marks, about + "".join(json.dumps(mark) + "\n" for mark in before))
        return before[-1] if before else Mark()

    def _samples(self, mark: Mark) -> Generator[tuple[Sample, Mark], None, None]:
        """Samples after a mark, pass after pass, decoded ahead in threads, each with the mark behind it."""
        self.left_out.clear()
        self.left_out.update(mark.left_out)
        for number in itertools.count(mark.passes):
            skip = mark.records if number == mark.passes else 0
            records, used = itertools.islice(distinct(self.read()), skip, None), skip > 0
            calls = (partial(self._load, record) for record in records)
            for place, found in enumerate(ahead(calls, depth=2 * AT_ONCE, workers=self.workers, name="decode"), skip):
                if isinstance(found, Sample):
                    used = True
                    yield found, Mark(0, number, place + 1, dict(self.left_out))
                elif found and not number:
                    self.left_out[found.reason] += 1
            if not used:
                reasons = ", ".join(f"{reason} {count}" for reason, count in self.left_out.most_common())
                raise UserError(f"The source has no picture to train on (left out: {reasons or 'nothing'}).")

    def _load(self, record: Record) -> Sample | Rejected | None:
        return encode.load(record, (self.resolution,), self.info) if record.split == "train" else None

    def _encode(self, samples: Sequence[Sample], position: int) -> Batch:
        """Latents drawn from the posterior and one caption for each sample, as the loader draws them."""
        positions, latents = torch.arange(position, position + len(samples)), []
        draws = zip(samples, draw_uniform(self.seed, "caption", positions).tolist(), strict=True)
        told = [each._replace(texts=[each.texts[choose_caption(each.weights, draw)]]) for each, draw in draws]
        for start in range(0, len(samples), AT_ONCE):
            some = told[start:][:AT_ONCE]
            mean, deviation = encode_pictures(some, self.resolution, self.encode_images, self.info, device=self.device)
            noise = draw_normal(self.seed, "posterior", positions[start:][:AT_ONCE], tuple(mean.shape[1:]))
            latents.append(to_half(mean + deviation * noise.to(mean.device), "autoencoder"))
        (settings,) = self.info.text_encoders.values()
        captions = encode_captions(told, self.encode_text, width=settings.width, at_once=AT_ONCE)
        text = [(to_half(states, "text encoder"), mask.bool().cpu()) for states, mask in captions]
        length = self.text_length or max([1, *(int(mask.sum(1).max()) for _, mask in text)])
        mask = torch.cat([pad(mask, (0, length - mask.shape[1])) for _, mask in text])
        states = torch.cat([pad(states, (0, 0, 0, length - states.shape[1])) for states, _ in text])
        keys = tuple(sample.record.key for sample in samples)
        return Batch(torch.cat(latents), states.masked_fill(~mask[..., None], 0), mask, keys)
