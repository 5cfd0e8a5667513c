"""The latent store: a folder of parts, each a few Arrow files with the same rows in the same order.

    store.json                     schema version, autoencoder, text encoders, resolutions, dtypes, policies
    rejects.jsonl                  the records that were left out, and why
    part-00000/rows.arrow          key, captions and weights, size, source, split
    part-00000/latents-256.arrow   one resolution a file
    part-00000/text-NAME.arrow     one text encoder a file, states without padding
    part-00000/part.json           rows, sha256 of each file, rejects

The files are Arrow IPC streams, which `datasets.Dataset.from_file` opens too; they are read memory-mapped.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Int, Int8, Shaped

from micro_diffusion.data.fetch import fetch
from micro_diffusion.runtime.files import UserError, user_error

SCHEMA_VERSION = 1
ROWS_PER_BATCH = 256
INTEGERS, HALVES = pa.list_(pa.int32()), pa.list_(pa.float16())
ROWS_SCHEMA = pa.schema({
    "key": pa.string(), "captions": pa.list_(pa.string()), "weights": pa.list_(pa.float32()),
    "width": pa.int32(), "height": pa.int32(), "source": pa.string(), "split": pa.string(),
})  # fmt: skip
LATENTS_SCHEMA = pa.schema({"latents": HALVES, "height": pa.int32(), "width": pa.int32()})
DEVIATION = pa.field("deviation", HALVES)  # in a store that keeps posteriors; the latents are the means
TEXT_SCHEMAS = {
    "float16": pa.schema({"lengths": INTEGERS, "states": HALVES}),
    # state = integers * scale, one scale a token
    "int8": pa.schema({"lengths": INTEGERS, "states": pa.list_(pa.int8()), "scales": HALVES}),
}
ROWS_FILE = "rows.arrow"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "micro-diffusion", "stores")
CACHE_BYTES = int(os.environ.get("MICRO_DIFFUSION_CACHE_GB", "200")) * 10**9


def part_folder(store: Path, index: int) -> Path:
    return store / f"part-{index:05d}"


def latents_file(resolution: int) -> str:
    return f"latents-{resolution}.arrow"


def text_file(name: str) -> str:
    """File of a text encoder; a name such as `org/model` becomes `org-model`."""
    return f"text-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.arrow"


@dataclass(frozen=True)
class AutoencoderInfo:
    """What the latents were made with; they are stored as (z - shift_factor) * scaling_factor."""

    name: str
    sha256: str
    scaling_factor: float
    shift_factor: float
    channels: int
    downscale: int


@dataclass(frozen=True)
class TextInfo:
    """What one text file was made with."""

    sha256: str
    width: int
    max_length: int
    text_mask: str  # "none" or "padding", see models/dit.py


@dataclass(frozen=True)
class StoreInfo:
    """The content of store.json."""

    autoencoder: AutoencoderInfo
    text_encoders: Mapping[str, TextInfo]
    caption_rule: str = "light"
    source: str = ""  # a description for people
    resolutions: tuple[int, ...] = ()
    rows_per_part: int = 0
    seed: int = 0
    dtypes: Mapping[str, str] = field(default_factory=lambda: {"latents": "float16", "text": "float16"})
    posterior: bool = False  # mean and deviation of latents are kept, and a draw is made at each visit
    min_size: int = 0  # pixels of the shorter edge
    max_aspect: float = 0.0  # longer edge by shorter; 0: any
    parts: int = 0  # known when it is complete
    complete: bool = False
    schema: int = SCHEMA_VERSION

    @classmethod
    def read(cls, store: Path) -> Self:
        values: dict[str, Any] = json.loads((store / "store.json").read_text())
        if values.get("schema") != SCHEMA_VERSION:
            raise UserError(f"{store} has schema version {values.get('schema')}; this program reads {SCHEMA_VERSION}.")
        values["autoencoder"] = AutoencoderInfo(**values["autoencoder"])
        values["text_encoders"] = {name: TextInfo(**info) for name, info in values["text_encoders"].items()}
        values["resolutions"] = tuple(values["resolutions"])
        return cls(**values)


@dataclass(frozen=True)
class PartInfo:
    """The content of part.json."""

    rows: int
    splits: Mapping[str, int]  # rows of each split
    records_hash: str  # of the keys, captions and splits that the part covers: tells whether the source is the same
    files: Mapping[str, str]  # sha256 of each
    rejects: Sequence[dict[str, str]]  # key, reason, detail
    filtered: Mapping[str, int] = field(default_factory=dict)  # records that were not wanted, by reason

    @classmethod
    def read(cls, folder: Path) -> Self:
        return cls(**json.loads((folder / "part.json").read_text()))


def to_json(info: StoreInfo | PartInfo) -> str:
    return json.dumps(asdict(info), indent=2, sort_keys=True) + "\n"


def schema(file: str, info: StoreInfo) -> pa.Schema:
    """Columns of a file of the store."""
    latents = LATENTS_SCHEMA.append(DEVIATION) if info.posterior else LATENTS_SCHEMA
    kinds = {"rows": ROWS_SCHEMA, "latents": latents, "text": TEXT_SCHEMAS[info.dtypes["text"]]}
    return kinds[Path(file).stem.partition("-")[0]]


def lists(values: Shaped[np.ndarray, " n"], sizes: Sequence[int] | Int[np.ndarray, " b"]) -> pa.ListArray:
    """Lists of these sizes, whose values stand one after the other."""
    offsets = np.cumsum([0, *sizes])
    if offsets[-1] >= 2**31:  # Arrow's offsets are 32 bits wide
        raise UserError("The captions of one batch are too many for a file; choose a smaller --batch-size.")
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def quantise(states: Float16[np.ndarray, "l d"]) -> tuple[Int8[np.ndarray, "l d"], Float16[np.ndarray, " l"]]:
    """Per-token integers from -127 to 127 and their scales: an error of at most half a 127th of a token's largest."""
    scales = (np.abs(states).max(1).astype(np.float32) / 127).astype(np.float16)
    safe = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)
    return (states / safe[:, None]).round().clip(-127, 127).astype(np.int8), scales


def read_stream(path: Path) -> pa.Table:
    """A table whose columns lie in the memory-mapped file: nothing is read until it is touched."""
    with user_error(f"{path} is damaged ({{}}); copy it again, or prepare a new store.", pa.ArrowInvalid, OSError):
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _forget_oldest(cache: Path, limit: int) -> None:
    """Delete the files used longest ago until `limit` bytes remain; what is mapped into memory stays readable."""
    files = sorted(cache.rglob("*.arrow"), key=lambda file: file.stat().st_mtime)
    total = sum(file.stat().st_size for file in files)
    while total > limit and len(files) > 1:
        total -= files[0].stat().st_size
        files.pop(0).unlink()


@dataclass(frozen=True)
class Store:
    """A complete store, open for reading; of one elsewhere, those files are kept here that were needed lately."""

    path: Path
    info: StoreInfo
    address: str = ""  # of a store elsewhere
    cache: Path = CACHE

    @classmethod
    def open(cls, path: Path | str, *, cache: Path = CACHE) -> Self:
        """A folder, or an address: `s3://`, `hf://datasets/OWNER/NAME/STORE`, `https://`, what fsspec knows.

        Raises `UserError` when there is no store, or one that `prepare` did not finish.
        """
        address = str(path).rstrip("/") if "://" in str(path) else ""
        path = fetch(f"{address}/store.json", cache).parent if address else Path(path)
        if not (path / "store.json").is_file():
            raise UserError(f"There is no latent store in {path}; make one with 'micro-diffusion prepare'.")
        info = StoreInfo.read(path)
        if not info.complete:
            raise UserError(f"The store {path} is not finished; run the same 'micro-diffusion prepare' again.")
        return cls(path, info, address, cache)

    @cached_property
    def parts(self) -> tuple[PartInfo, ...]:
        """Raises `UserError` when one in the middle is missing."""
        count = self.info.parts or sum(1 for _ in self.path.glob("part-[0-9]*"))
        return tuple(PartInfo.read(self._file(index, "part.json").parent) for index in range(count))

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    def rows(self, part: int) -> pa.Table:
        return read_stream(self._file(part, ROWS_FILE))

    def latents(self, resolution: int, part: int) -> pa.Table:
        return read_stream(self._file(part, latents_file(resolution)))

    def text(self, name: str, part: int) -> pa.Table:
        return read_stream(self._file(part, text_file(name)))

    def _file(self, part: int, name: str) -> Path:
        path = part_folder(self.path, part) / name
        if self.address:
            path = fetch(f"{self.address}/{path.parent.name}/{name}", self.cache)
            os.utime(path)
            _forget_oldest(self.cache, CACHE_BYTES)
        if not path.is_file():
            raise UserError(f"{path} is missing: the store is damaged; prepare it again into a new folder.")
        return path
