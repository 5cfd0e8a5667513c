"""From records to a latent store, part by part: killed and run again, it redoes only what is missing."""

import contextlib
import hashlib
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from micro_diffusion.data import store as layout
from micro_diffusion.data.captions import CAPTION_RULES, clean_captions
from micro_diffusion.data.records import Record, Rejected, decode_image, resize_crop
from micro_diffusion.data.store import PartInfo, RowWriter, StoreInfo
from micro_diffusion.runtime.files import TEMPORARY_PREFIX, UserError, remove_leftovers, sha256, sync, write_atomic
from micro_diffusion.runtime.random import derive_seed

REJECTS_FILE = "rejects.jsonl"

# Pictures in [-1, 1], (b, 3, h, w), to the mean and standard deviation of their scaled latents, (b, c, h, w) each.
EncodeImages = Callable[[Tensor], tuple[Tensor, Tensor]]
# Captions to padded states (b, l, d) and the mask of real tokens (b, l).
EncodeText = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


class Sample(NamedTuple):
    """A record that is ready to be encoded."""

    record: Record
    texts: list[str]
    weights: list[float]
    size: tuple[int, int]  # width and height of the original
    crops: dict[int, UInt8[np.ndarray, "h w 3"]]  # by resolution


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` found and did."""

    rows: int
    parts: int
    parts_written: int  # new, or given a new file; 0 means that there was nothing to do
    rejected: dict[str, int]  # by reason
    rejects_file: Path | None


def prepare(
    records: Iterable[Record],
    out: Path,
    *,
    resolutions: Sequence[int],
    encode_images: EncodeImages,
    encode_text: EncodeText,
    info: StoreInfo,
    seed: int = 0,
    rows_per_part: int = 4096,
    batch_size: int = 32,
    workers: int = 4,
    max_rejected: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
) -> PrepareReport:
    """Encode records into the store `out`, or finish or extend (by a resolution, a text encoder) the one that is there.

    `info` holds the autoencoder, one text encoder, the caption rule and the source's description. Records must come in
    the same order each time: the n-th part covers the n-th `rows_per_part` of them. `progress` is told how many records
    were seen and how many rejected. Raises `UserError` for a store made with other settings, a source that has changed,
    and when more than the share `max_rejected` is rejected.
    """
    out, remaining = Path(out), iter(records)
    wanted = replace(info, resolutions=tuple(sorted(set(resolutions))), seed=seed, rows_per_part=rows_per_part)
    info, complete = _settle(out, wanted)
    (text_name,) = wanted.text_encoders
    parts: list[PartInfo] = []
    written = 0
    out.mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
            work = _Work(out, info, encode_images, encode_text, text_name, batch_size, pool, max_rejected, progress)
            while (head := next(remaining, None)) is not None:
                chunk = itertools.chain([head], itertools.islice(remaining, rows_per_part - 1))
                part, changed = work.part(layout.part_folder(out, len(parts)), chunk)
                parts.append(part)
                written += changed
        if not parts:
            raise UserError("The source has no records: there is nothing to prepare.")
        if layout.part_folder(out, len(parts)).exists():
            raise _changed(out)
        if written or not complete:
            _write_rejects(out, work.rejects)
            write_atomic(out / "store.json", layout.to_json(replace(info, complete=True)))
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()  # only when it is empty: nothing came of it
    path = out / REJECTS_FILE if work.rejects else None
    return PrepareReport(sum(part.rows for part in parts), len(parts), written, _by_reason(work.rejects), path)


def _settle(out: Path, wanted: StoreInfo) -> tuple[StoreInfo, bool]:
    """What the store shall be: the one that is there and what is wanted; and whether it is that already, complete."""
    if wanted.caption_rule not in CAPTION_RULES:
        raise UserError(f"There is no caption rule '{wanted.caption_rule}', only {', '.join(CAPTION_RULES)}.")
    if odd := [size for size in wanted.resolutions if size < 1 or size % wanted.autoencoder.downscale]:
        raise UserError(f"A resolution must be a multiple of {wanted.autoencoder.downscale}, which {odd[0]} is not.")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if "store.json" not in names:
        if out.is_file() or any(not name.startswith(TEMPORARY_PREFIX) for name in names - {REJECTS_FILE}):
            raise UserError(f"{out} is not empty and not a latent store; choose another folder.")
        remove_leftovers(out)
        return wanted, False
    remove_leftovers(out)
    old = StoreInfo.read(out)
    settings = [(name, getattr(old, name), getattr(wanted, name)) for name in ("caption_rule", "seed", "rows_per_part")]
    settings += [("autoencoder", replace(old.autoencoder, name=""), replace(wanted.autoencoder, name=""))]
    settings += [
        (f"text encoder '{name}'", old.text_encoders.get(name, text), text)
        for name, text in wanted.text_encoders.items()
    ]
    for name, before, now in settings:
        if before != now:
            raise UserError(f"The store {out} was made with another {name}: {before}, not {now}; use a new folder.")
    info = replace(
        old,
        text_encoders={**old.text_encoders, **wanted.text_encoders},
        resolutions=tuple(sorted({*old.resolutions, *wanted.resolutions})),
    )
    return replace(info, complete=False), info == old and old.complete


@dataclass
class _Work:
    """What the parts of one `prepare` share."""

    out: Path
    info: StoreInfo
    encode_images: EncodeImages
    encode_text: EncodeText
    text_name: str
    batch_size: int
    pool: ThreadPoolExecutor
    max_rejected: float
    progress: Callable[[int, int], None] | None
    records: int = 0
    keys: set[bytes] = field(default_factory=set)  # 8 bytes of hash each
    rejects: list[dict[str, str]] = field(default_factory=list)

    def part(self, folder: Path, records: Iterable[Record]) -> tuple[PartInfo, bool]:
        """Make the files that this part lacks; returns what it then is, and whether anything was made.

        Files are written and synced in a temporary folder and moved; part.json, the last, makes them count.
        """
        old = PartInfo.read(folder) if (folder / "part.json").exists() else None
        files = [layout.ROWS_FILE, *map(layout.latents_file, self.info.resolutions), layout.text_file(self.text_name)]
        missing = [file for file in files if old is None or file not in old.files]
        if old is None and (others := self.info.text_encoders.keys() - {self.text_name}):
            raise UserError(f"The store {self.out} is not finished: first prepare it with '{others.pop()}' again.")
        keys = set(layout.read_stream(folder / layout.ROWS_FILE)["key"].to_pylist()) if old and missing else set()
        digest, first_reject = hashlib.blake2b(digest_size=16), len(self.rejects)
        with TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=self.out) as name:
            samples = self._samples(records, missing, digest, keys if old else None)
            splits = self._write(Path(name), missing, samples)
            if old:
                if old.records_hash != digest.hexdigest():
                    raise _changed(self.out)
                self.rejects += old.rejects
            else:
                self._check_rejects(self.records)
            if old and not missing:
                return old, False
            hashes = {file: sha256(Path(name, file)) for file in missing}
            new = PartInfo(splits.total(), dict(splits), digest.hexdigest(), {}, self.rejects[first_reject:])
            part = replace(old or new, files={**(old.files if old else {}), **hashes})
            write_atomic(self.out / "store.json", layout.to_json(self.info))
            folder.mkdir(exist_ok=True)
            for file in missing:
                sync(Path(name, file))
                Path(name, file).replace(folder / file)
            write_atomic(folder / "part.json", layout.to_json(part))
        return part, True

    def _samples(
        self,
        records: Iterable[Record],
        files: Collection[str],
        digest: "hashlib.blake2b",
        known: Collection[str] | None,
    ) -> Iterator[Sample]:
        """Samples in the order of the records, decoded in threads; with `known`, those keys only, and none may fail."""
        rule = CAPTION_RULES[self.info.caption_rule]
        resolutions = [size for size in self.info.resolutions if layout.latents_file(size) in files]
        pending: deque[tuple[str, Future[Sample]]] = deque()
        for record in records:
            digest.update(repr((record.key, record.split, record.captions)).encode())
            self.records += 1
            short = hashlib.blake2b(repr(record.key).encode(), digest_size=8).digest()
            new = short not in self.keys
            self.keys.add(short)
            if known is None or (new and record.key in known):
                pending.append((record.key, self.pool.submit(load, record, resolutions, rule, new=new)))
            if len(pending) > 2 * self.batch_size:
                yield from self._take(*pending.popleft(), known=known is not None)
        for key, future in pending:
            yield from self._take(key, future, known=known is not None)

    def _take(self, key: str, future: Future[Sample], *, known: bool) -> Sequence[Sample]:
        """The sample, or none when it was rejected."""
        try:
            return [future.result()]
        except Rejected as error:
            if known:
                raise UserError(
                    f"The picture of {key}, which is in {self.out}, is not readable now: {error}."
                ) from error
            self.rejects.append({"key": key, "reason": error.reason, "detail": error.detail})
            self._check_rejects(max(self.records, self.info.rows_per_part))
            return []

    def _check_rejects(self, among: int) -> None:
        """Stop, after writing the list, when too large a share was rejected."""
        if len(self.rejects) > self.max_rejected * among:
            reasons = ", ".join(f"{count} times {reason}" for reason, count in _by_reason(self.rejects).items())
            raise UserError(
                f"{len(self.rejects)} of {self.records} records were rejected ({reasons}), more than "
                f"{self.max_rejected:.0%}; they are listed in {_write_rejects(self.out, self.rejects)}."
            )

    def _write(self, folder: Path, files: Collection[str], samples: Iterator[Sample]) -> Counter[str]:
        """Encode samples batch by batch into these files of a part; returns the rows by split."""
        splits: Counter[str] = Counter()
        with contextlib.ExitStack() as stack:
            writers = {file: stack.enter_context(RowWriter(folder / file)) for file in files}
            while batch := list(itertools.islice(samples, self.batch_size)):
                splits.update(sample.record.split for sample in batch)
                if writer := writers.get(layout.ROWS_FILE):
                    for record, texts, weights, size, _ in batch:
                        writer.write(record.key, texts, weights, *size, record.source, record.split)
                for resolution in self.info.resolutions:
                    if writer := writers.get(layout.latents_file(resolution)):
                        for latent in self._latents(batch, resolution):
                            writer.write(latent.reshape(-1), *latent.shape[1:])
                if writer := writers.get(layout.text_file(self.text_name)):
                    for captions in self._captions(batch):
                        lengths = np.array([len(states) for states in captions], np.int32)
                        writer.write(lengths, np.concatenate([states.reshape(-1) for states in captions]))
                if self.progress:
                    self.progress(self.records, len(self.rejects))
        return splits

    def _latents(self, samples: Sequence[Sample], resolution: int) -> Iterator[Float[np.ndarray, "c h w"]]:
        """One draw from each picture's posterior, by a generator that only (seed, key, resolution) decide."""
        pixels = torch.from_numpy(np.stack([sample.crops[resolution] for sample in samples]))
        distribution = self.encode_images(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
        mean, std = (tensor.detach().float().cpu() for tensor in distribution)
        for sample, center, spread in zip(samples, mean, std, strict=True):
            seed = derive_seed(self.info.seed, "posterior", sample.record.key, resolution)
            noise = torch.randn(center.shape, generator=torch.Generator().manual_seed(seed))
            yield _to_half(center + spread * noise, "autoencoder")

    def _captions(self, samples: Sequence[Sample]) -> Iterator[list[Float[np.ndarray, "l d"]]]:
        """For each sample the states of each of its captions, without padding."""
        texts = [text for sample in samples for text in sample.texts]
        states: list[np.ndarray] = []
        for start in range(0, len(texts), self.batch_size):
            padded, mask = self.encode_text(texts[start : start + self.batch_size])
            padded, mask = padded.detach().float().cpu(), mask.bool().cpu()
            states += [_to_half(row[real], "text encoder") for row, real in zip(padded, mask, strict=True)]
        remaining = iter(states)
        for sample in samples:
            yield list(itertools.islice(remaining, len(sample.texts)))


def load(record: Record, resolutions: Sequence[int], rule: Callable[[str], str], *, new: bool = True) -> Sample:
    """Clean the captions and decode the picture, unless no resolution is asked for; raises `Rejected`."""
    if not new:
        raise Rejected("duplicate key")
    if not record.key.isprintable():  # file names that are not UTF-8 among them
        raise Rejected("unprintable key")
    texts, weights = clean_captions(record.captions, rule)
    if not resolutions:
        return Sample(record, texts, weights, (0, 0), {})
    image = decode_image(record)
    crops = {resolution: resize_crop(image, resolution) for resolution in resolutions}
    return Sample(record, texts, weights, image.size, crops)


def _to_half(values: Tensor, maker: str) -> np.ndarray:
    half = values.half()
    if not half.isfinite().all():
        raise UserError(f"The {maker} returned values that float16 cannot hold; run it in float32.")
    return half.numpy()


def _by_reason(rejects: Sequence[dict[str, str]]) -> dict[str, int]:
    return dict(Counter(reject["reason"] for reject in rejects).most_common())


def _write_rejects(out: Path, rejects: Sequence[dict[str, str]]) -> Path:
    path = out / REJECTS_FILE
    if rejects:
        write_atomic(path, "".join(json.dumps(reject, sort_keys=True) + "\n" for reject in rejects))
    else:
        path.unlink(missing_ok=True)
    return path


def _changed(out: Path) -> UserError:
    return UserError(f"The source has changed since the store {out} was made from it; prepare it into a new folder.")
