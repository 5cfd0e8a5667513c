"""From records to a latent store, part by part: killed and run again, it redoes only what is missing."""

import contextlib
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch

from micro_diffusion.data import encode
from micro_diffusion.data import store as layout
from micro_diffusion.data.captions import CAPTION_RULES
from micro_diffusion.data.encode import Columns, EncodeImages, EncodeText, Sample
from micro_diffusion.data.records import Filtered, Record, distinct
from micro_diffusion.data.store import PartInfo, StoreInfo
from micro_diffusion.runtime.ahead import ahead
from micro_diffusion.runtime.distributed import ALONE, World
from micro_diffusion.runtime.files import TEMPORARY_PREFIX, UserError, remove_leftovers, sha256, sync, write_atomic

REJECTS_FILE = "rejects.jsonl"
# Begins to encode a batch; returns what makes a file's columns once the device is done.
Maker = Callable[[Sequence[Sample]], Callable[[], Columns]]


def on_ray(work: Callable[[World], object], *, gpus: float) -> None:
    """Let Ray Data do `work` for each of several shares of the parts, as ranks that do not wait for each other.

    A share whose worker is lost is done again elsewhere: what it had finished is found, the rest is made. All machines
    must see the sources and the store. `gpus` is what one task takes; there are twice as many as can run at once.
    """

    import ray

    if not ray.is_initialized():
        ray.init()
    tasks = 2 * max(1, int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1)))

    def share(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        work(World(int(batch["id"][0]) + 1, tasks))  # rank 0 is the driver's
        return batch

    shares = ray.data.range(tasks, override_num_blocks=tasks)
    shares.map_batches(share, batch_size=1, num_gpus=gpus, max_retries=-1).materialize()


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` found and did."""

    rows: int
    parts: int
    parts_written: int  # new, or given a new file; 0 means that there was nothing to do
    rejected: dict[str, int]  # by reason
    filtered: dict[str, int]  # not wanted, by reason


def prepare(
    records: Iterable[Record], out: Path, *, resolutions: Sequence[int], info: StoreInfo,
    encode_images: EncodeImages, encode_text: EncodeText, seed: int = 0, rows_per_part: int = 4096,
    batch_size: int = 32, workers: int | None = None, max_rejected: float = 0.05, device: torch.device | str = "cpu",
    world: World = ALONE, helpers: Callable[[], object] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PrepareReport:  # fmt: skip
    """Encode records into the store `out`, or finish or extend (by a resolution, a text encoder) the one that is there.

    `info` holds the autoencoder, one text encoder, the caption rule and the source's description. Records must come in
    the same order each time: the n-th part covers the n-th `rows_per_part` of them. `workers` threads decode (by
    default, one a core). Of several ranks, each makes its share of the parts; `helpers` makes what it can before that.
    `progress` is told how many records were seen and how many rejected. Raises `UserError` for a store made with other
    settings, a source that has changed, and when more than the share `max_rejected` is rejected.
    """
    wanted = replace(info, resolutions=tuple(sorted(set(resolutions))), seed=seed, rows_per_part=rows_per_part)
    info, complete = _settle(out, wanted)
    (text_name,) = wanted.text_encoders
    out.mkdir(parents=True, exist_ok=True)
    if world.rank == 0:
        remove_leftovers(out)
        if (world.size > 1 or helpers) and not complete:  # by one process, before the others begin
            write_atomic(out / "store.json", layout.to_json(info))
    world.agree()
    try:
        if helpers:
            helpers()
        makers = _makers(info, text_name, encode_images, encode_text, device=device, at_once=batch_size)
        work = _Work(out, info, makers, batch_size, workers or os.cpu_count() or 4, max_rejected, progress)
        parts, written = work.all(distinct(records), world)
        world.agree()
        folders = (layout.part_folder(out, index) for index in range(parts))
        found = [PartInfo.read(folder) for folder in folders if (folder / "part.json").exists()]  # other ranks may lag
        rejects = [reject for part in found for reject in part.rejects]
        if world.rank == 0 and (written or not complete or not StoreInfo.read(out).complete):
            remove_leftovers(out)  # of other ranks that were lost
            _write_rejects(out, rejects)
            write_atomic(out / "store.json", layout.to_json(replace(info, parts=parts, complete=True)))
        rejected = Counter(reject["reason"] for reject in rejects)
        filtered = sum((Counter(part.filtered) for part in found), Counter[str]())
        rows = sum(part.rows for part in found)
        return PrepareReport(rows, parts, written, dict(rejected.most_common()), dict(filtered.most_common()))
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()  # only when it is empty: nothing came of it


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
        return wanted, False
    old = StoreInfo.read(out)
    same = ("caption_rule", "seed", "rows_per_part", "dtypes", "posterior", "min_size", "max_aspect")
    settings = [(name, getattr(old, name), getattr(wanted, name)) for name in same]
    settings += [("autoencoder", replace(old.autoencoder, name=""), replace(wanted.autoencoder, name=""))]
    texts = wanted.text_encoders.items()
    settings += [(f"text encoder '{name}'", old.text_encoders.get(name, text), text) for name, text in texts]
    for name, before, now in settings:
        if before != now:
            raise UserError(f"The store {out} was made with another {name}: {before}, not {now}; use a new folder.")
    resolutions = tuple(sorted({*old.resolutions, *wanted.resolutions}))
    info = replace(old, text_encoders={**old.text_encoders, **wanted.text_encoders}, resolutions=resolutions)
    return replace(info, complete=False), info == old and old.complete


def _makers(
    info: StoreInfo, name: str, images: EncodeImages, texts: EncodeText, *, device: torch.device | str, at_once: int
) -> dict[str, Maker]:
    """The maker of each file of a part; `name` is the text encoder's."""
    width, small = info.text_encoders[name].width, info.dtypes["text"] == "int8"

    def latents(size: int, batch: Sequence[Sample]) -> Callable[[], Columns]:
        both = encode.encode_pictures(batch, size, images, info, device=device)
        return partial(encode.latent_columns, *both, batch, size, info)

    def text(batch: Sequence[Sample]) -> Callable[[], Columns]:
        states = list(encode.encode_captions(batch, texts, width=width, at_once=at_once))
        return partial(encode.text_columns, states, batch, width=width, small=small)

    makers: dict[str, Maker] = {layout.ROWS_FILE: lambda batch: partial(encode.row_columns, batch)}
    makers |= {layout.latents_file(size): partial(latents, size) for size in info.resolutions}
    return makers | {layout.text_file(name): text}


@dataclass
class _Work:
    """What the parts of one `prepare` share."""

    out: Path
    info: StoreInfo
    makers: dict[str, Maker]  # of each file
    batch_size: int
    workers: int
    max_rejected: float
    progress: Callable[[int, int], None] | None
    records: int = 0
    rejects: list[dict[str, str]] = field(default_factory=list)

    def all(self, records: Iterator[Record], world: World) -> tuple[int, int]:
        """Go through all records and make this rank's parts; how many parts there are, and how many were made here."""
        index = written = 0
        while (head := next(records, None)) is not None:
            chunk = itertools.chain([head], itertools.islice(records, self.info.rows_per_part - 1))
            if (index - world.rank) % world.size == 0:
                written += self.part(layout.part_folder(self.out, index), chunk)
            else:
                self.records += sum(1 for _ in chunk)
            index += 1
        if not index:
            raise UserError("The source has no records: there is nothing to prepare.")
        if layout.part_folder(self.out, index).exists():
            raise _changed(self.out)
        return index, written

    def part(self, folder: Path, records: Iterable[Record]) -> bool:
        """Make the files that this part lacks; returns whether there were any.

        Files are written and synced in a temporary folder and moved; part.json, the last, makes them count.
        """
        old = PartInfo.read(folder) if (folder / "part.json").exists() else None
        missing = [file for file in self.makers if old is None or file not in old.files]
        others = [name for name in self.info.text_encoders if layout.text_file(name) not in self.makers]
        if old is None and others:
            raise UserError(f"The store {self.out} is not finished: first prepare it with '{others[0]}' again.")
        known = set(layout.read_stream(folder / layout.ROWS_FILE)["key"].to_pylist()) if old and missing else set()
        digest, before = hashlib.blake2b(digest_size=16), len(self.rejects)
        splits, filtered = Counter[str](), Counter[str]()

        def wanted() -> Iterator[Record]:
            for record in records:
                self.records += 1
                digest.update(repr((record.key, record.split, record.captions)).encode())
                if old is None or record.key in known:
                    known.discard(record.key)  # a second one is a duplicate
                    yield record

        with TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=self.out) as name:
            samples = self._samples(wanted(), missing, filtered, complete=old is not None)
            self._write(Path(name), missing, samples, splits)
            if old and old.records_hash != digest.hexdigest():
                raise _changed(self.out)
            if old:
                self.rejects += old.rejects
            else:
                self._check_rejects(self.records)
            if not missing:
                return False
            hashes = {file: sha256(Path(name, file)) for file in missing}
            rejects = self.rejects[before:]
            part = old or PartInfo(
                splits.total(), dict(splits), digest.hexdigest(), {}, rejects, dict(sorted(filtered.items()))
            )
            part = replace(part, files={**part.files, **hashes})
            if not (self.out / "store.json").exists() or StoreInfo.read(self.out) != self.info:
                write_atomic(self.out / "store.json", layout.to_json(self.info))
            folder.mkdir(exist_ok=True)
            for file in missing:
                sync(Path(name, file))
                Path(name, file).replace(folder / file)
            write_atomic(folder / "part.json", layout.to_json(part))
        return True

    def _samples(
        self, records: Iterable[Record], files: Collection[str], filtered: Counter[str], *, complete: bool
    ) -> Iterator[Sample]:
        """Samples in the order of the records, decoded in threads; of a part that is `complete` none may fail."""
        resolutions = [size for size in self.info.resolutions if layout.latents_file(size) in files]
        calls = (partial(encode.load, record, resolutions, self.info) for record in records)
        for found in ahead(calls, depth=2 * self.batch_size, workers=self.workers, name="decode"):
            if isinstance(found, Sample):
                yield found
            elif complete:
                raise UserError(f"The picture of {found.key}, which is in {self.out}, is not readable now: {found}.")
            elif isinstance(found, Filtered):
                filtered[found.reason] += 1
            else:
                self.rejects.append({"key": found.key, "reason": found.reason, "detail": found.detail})
                self._check_rejects(max(self.records, self.info.rows_per_part))

    def _check_rejects(self, among: int) -> None:
        """Stop, after writing the list, when too large a share was rejected."""
        if len(self.rejects) > self.max_rejected * among:
            counts = Counter(reject["reason"] for reject in self.rejects).most_common()
            reasons = ", ".join(f"{count} times {reason}" for reason, count in counts)
            found = f"{len(self.rejects)} of {self.records} records were rejected ({reasons})"
            listed = _write_rejects(self.out, self.rejects)
            raise UserError(f"{found}, more than {self.max_rejected:.0%}; they are listed in {listed}.")

    def _write(self, folder: Path, files: Collection[str], samples: Iterator[Sample], splits: Counter[str]) -> None:
        """Encode samples batch by batch; a thread waits for the device and writes while the next batch is encoded."""
        with contextlib.ExitStack() as stack:
            schemas = {file: layout.schema(file, self.info) for file in files}
            streams = {file: stack.enter_context(pa.ipc.new_stream(folder / file, schemas[file])) for file in files}

            def store(columns_of: dict[str, Callable[[], Columns]]) -> None:
                for file, columns in columns_of.items():
                    table = pa.Table.from_pydict(columns(), schemas[file])
                    streams[file].write_table(table, max_chunksize=layout.ROWS_PER_BATCH)

            def calls() -> Iterator[Callable[[], None]]:
                while batch := list(itertools.islice(samples, self.batch_size)):
                    splits.update(sample.record.split for sample in batch)
                    yield partial(store, {file: self.makers[file](batch) for file in files})
                    if self.progress:
                        self.progress(self.records, len(self.rejects))

            list(ahead(calls(), depth=1, name="write"))  # what they do is to write


def _write_rejects(out: Path, rejects: Sequence[dict[str, str]]) -> Path:
    path = out / REJECTS_FILE
    if rejects:
        write_atomic(path, "".join(json.dumps(reject, sort_keys=True) + "\n" for reject in rejects))
    else:
        path.unlink(missing_ok=True)
    return path


def _changed(out: Path) -> UserError:
    return UserError(f"The source has changed since the store {out} was made from it; prepare it into a new folder.")
