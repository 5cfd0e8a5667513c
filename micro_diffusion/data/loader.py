"""From latent stores to batches; what stands at a position depends on (seed, stores, position) and on nothing else.

A position counts images seen. The stores are interleaved by weight. Within a store, parts are permuted at each pass,
and rows are permuted inside windows of `shuffle_window` parts, so that few files are read at a time.
"""

from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from micro_diffusion.data.store import Store
from micro_diffusion.runtime.ahead import ahead
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.random import derive_seed, draw_normal, draw_uniform

Positions = Int[np.ndarray, " n"]


class Batch(NamedTuple):
    """What one training step looks at, as stored: the device makes float32 of it."""

    latents: Float[Tensor, "b c h w"]
    text: Shaped[Tensor, "b l d"]  # zeros where text_mask is False; float16, or int8
    text_mask: Bool[Tensor, "b l"]
    keys: tuple[str, ...]
    text_scale: Float[Tensor, "b l"] | None = None  # what the text is to be multiplied by; None is 1


Reading = Generator[Batch, None, None]  # to be closed: threads read ahead


@runtime_checkable
class Batches(Protocol):
    """What training reads from: what stands at a position is the same for any start, batch size and number of ranks."""

    def batches(self, start: int, stop: int, batch_size: int, *, rank: int = 0, world: int = 1) -> Reading:
        """This rank's share of each global batch between two positions."""


def shares(start: int, stop: int, batch_size: int, *, rank: int, world: int) -> Iterator[tuple[int, int, int, int]]:
    """Position and size of each global batch between two positions, and where in it this rank's share lies."""
    if batch_size % world:
        raise ValueError(f"a batch of {batch_size} does not divide among {world} ranks")
    sizes = ((position, min(batch_size, stop - position)) for position in range(start, stop, batch_size))
    return ((position, size, size * rank // world, size * (rank + 1) // world) for position, size in sizes)


def permutation(seed: int, length: int) -> Positions:
    """A permutation of `range(length)` from Philox's raw bits, which numpy promises never to change."""
    return np.argsort(np.random.Philox(key=seed).random_raw(length), kind="stable")


def interleave(weights: Sequence[float], positions: Positions) -> tuple[Positions, Positions]:
    """Which store each position falls to, and how many earlier positions fell to that same store.

    Of two shares w and 1 - w, the first has taken floor(p w) of the first p positions; more than two are split off one
    at a time. Integer arithmetic, so that every machine agrees; no store is ever off by more than len(weights).
    """
    total = sum(weights)
    exact = all(float(weight).is_integer() for weight in weights) and total < 2**31
    parts = [int(weight) if exact else max(1, round(2**24 * weight / total)) for weight in weights]
    which, count = np.zeros_like(positions), positions.copy()
    active = np.arange(len(positions))  # those that fell to none of the stores so far
    for store in range(len(parts) - 1):
        mine, rest = parts[store], sum(parts[store:])
        here = count[active]
        taken = here * mine // rest
        falls = (here + 1) * mine // rest > taken
        count[active] = np.where(falls, taken, here - taken)
        active = active[~falls]
        which[active] = store + 1
    return which, count


def numbers(column: pa.ChunkedArray, row: int) -> Shaped[np.ndarray, " n"]:
    """A row of a list column: a view of the memory-mapped values."""
    return column[row].values.to_numpy()


def choose_caption(weights: Sequence[float] | Float[np.ndarray, " n"], draw: float) -> int:
    """The caption that `draw` in [0, 1) chooses by weight; 0 is the first."""
    share = np.cumsum(weights, dtype=np.float64)
    return min(int(np.searchsorted(share, draw * share[-1], side="right")), len(share) - 1)


class OpenPart:
    """The files of one part that training reads."""

    def __init__(self, store: Store, part: int, *, resolution: int, text_encoder: str, split: str) -> None:
        rows, latents, text = store.rows(part), store.latents(resolution, part), store.text(text_encoder, part)
        self.rows = np.flatnonzero(pc.equal(rows["split"], "train").to_numpy() == (split == "train"))
        self.keys, self.weights = rows["key"], rows["weights"]
        self.latents, self.deviation = latents["latents"], latents["deviation"] if store.info.posterior else None
        self.lengths, self.states = text["lengths"], text["states"]
        self.scales = text["scales"] if "scales" in text.column_names else None
        self.shape = (latents["height"][0].as_py(), latents["width"][0].as_py()) if len(rows) else (0, 0)

    def caption(self, row: int, draw: float, width: int) -> tuple[Shaped[np.ndarray, "l d"], Shaped[np.ndarray, " l"]]:
        """States and scales of the caption that `draw` in [0, 1) chooses by weight."""
        lengths, choice = numbers(self.lengths, row), choose_caption(numbers(self.weights, row), draw)
        start, length = int(lengths[:choice].sum()), int(lengths[choice])
        states = numbers(self.states, row)[start * width : (start + length) * width].reshape(-1, width)
        scales = np.ones(length, np.float16) if self.scales is None else numbers(self.scales, row)[start:][:length]
        return states, scales


class Order:
    """In which order a store's rows are visited, pass after pass; a row is (part, n-th row of the split in it)."""

    def __init__(self, counts: Sequence[int], *, seed: int, window: int) -> None:
        self.counts, self.seed, self.window = np.asarray(counts), seed, window
        self.rows = int(self.counts.sum())
        self._pass = lru_cache(maxsize=2)(self._plan_pass)
        self._window = lru_cache(maxsize=2)(self._plan_window)

    def _plan_pass(self, number: int) -> tuple[Positions, Int[np.ndarray, " w"]]:
        """Permuted parts, and the row at which each window starts."""
        parts = permutation(derive_seed(self.seed, "parts", number), len(self.counts))
        ends = np.append(0, np.cumsum(self.counts[parts]))
        return parts, ends[: -1 : self.window]

    def _plan_window(self, number: int, window: int) -> tuple[Positions, Positions]:
        """Part, and row in the part, of every row of a window."""
        parts = self._pass(number)[0][window * self.window : (window + 1) * self.window]
        part = np.repeat(parts, self.counts[parts])
        row = np.concatenate([np.arange(count) for count in self.counts[parts]])
        order = permutation(derive_seed(self.seed, "rows", number, window), len(part))
        return part[order], row[order]

    def __getitem__(self, position: int) -> tuple[int, int]:
        number, row = divmod(position, self.rows)
        starts = self._pass(number)[1]
        window = int(np.searchsorted(starts, row, side="right")) - 1
        parts, rows = self._window(number, window)
        return int(parts[row - starts[window]]), int(rows[row - starts[window]])


class Loader:
    """Reads batches from one store or from several mixed by weight (by default: by their rows).

    `split` is "train", or "validation" for every other row. Raises `UserError` when the stores have no such rows.
    """

    def __init__(
        self, stores: Sequence[Store], *, resolution: int, text_encoder: str, seed: int,
        weights: Sequence[float] | None = None, shuffle_window: int = 16, split: str = "train",
        text_length: int | None = None,
    ) -> None:  # fmt: skip
        require(stores, resolution=resolution, text_encoder=text_encoder)
        self.stores, self.seed, self.text_length = list(stores), seed, text_length
        self.width = stores[0].info.text_encoders[text_encoder].width
        self.channels = stores[0].info.autoencoder.channels
        counts = [[_rows_of(part.splits, split) for part in store.parts] for store in stores]
        if empty := [store.path for store, rows in zip(stores, counts, strict=True) if not sum(rows)]:
            raise UserError(f"The store {empty[0]} has no {split} rows.")
        seeds = [derive_seed(seed, "order", index) for index in range(len(stores))]
        self.orders = [Order(rows, seed=s, window=shuffle_window) for rows, s in zip(counts, seeds, strict=True)]
        self.weights = list(weights) if weights is not None else [order.rows for order in self.orders]
        if len(self.weights) != len(self.stores) or min(self.weights) <= 0:
            raise ValueError("one positive weight a store")
        part_of = partial(OpenPart, resolution=resolution, text_encoder=text_encoder, split=split)
        self._open = lru_cache(4 * shuffle_window * len(stores))(lambda store, part: part_of(self.stores[store], part))

    def __len__(self) -> int:
        """Rows in all stores: the length of a pass when the weights are the default."""
        return sum(order.rows for order in self.orders)

    def batch(self, start: int, count: int) -> Batch:
        """The images at positions `start` to `start + count`; each visit draws one of the picture's captions."""
        positions = np.arange(start, start + count)
        which, nth = interleave(self.weights, positions)
        draws = draw_uniform(self.seed, "caption", torch.from_numpy(positions)).tolist()
        places = [(int(store), *self.orders[store][n]) for store, n in zip(which, nth.tolist(), strict=True)]
        return self._assemble(places, draws, torch.from_numpy(positions))

    def rows(self, indices: Sequence[int]) -> Batch:
        """Rows of the split in the order of the stores' tables, each with its first caption; float32."""
        ends = np.cumsum([0] + [count for order in self.orders for count in order.counts])
        names = [(store, part) for store, order in enumerate(self.orders) for part in range(len(order.counts))]
        if odd := [index for index in indices if not 0 <= index < ends[-1]]:
            raise IndexError(f"row {odd[0]} of {ends[-1]}")
        parts = (np.searchsorted(ends, indices, side="right") - 1).tolist()
        places = [(*names[part], int(index - ends[part])) for part, index in zip(parts, indices, strict=True)]
        batch = self._assemble(places, [0.0] * len(places))
        assert batch.text_scale is not None
        text = batch.text.float() * batch.text_scale.float()[..., None]
        return batch._replace(latents=batch.latents.float(), text=text, text_scale=None)

    def _assemble(
        self, places: Sequence[tuple[int, int, int]], draws: Sequence[float], positions: Tensor | None = None
    ) -> Batch:
        """Rows with the captions that `draws` choose; latents from kept posteriors, or without positions the means."""
        parts = [self._open(store, part) for store, part, _ in places]
        rows = [int(part.rows[row]) for part, (_, _, row) in zip(parts, places, strict=True)]
        captions = [part.caption(row, draw, self.width) for part, row, draw in zip(parts, rows, draws, strict=True)]
        length = self.text_length or max([1, *(len(states) for states, _ in captions)])
        text = np.zeros((len(places), length, self.width), np.result_type(*{states.dtype for states, _ in captions}))
        scales, mask = np.ones((len(places), length), np.float16), np.zeros((len(places), length), bool)
        for index, (states, scale) in enumerate(captions):
            kept = min(len(states), length)
            text[index, :kept], scales[index, :kept], mask[index, :kept] = states[:kept], scale[:kept], True
        found = [numbers(part.latents, row) for part, row in zip(parts, rows, strict=True)]
        latents = torch.from_numpy(np.stack(found)).reshape(len(places), self.channels, *parts[0].shape)
        if positions is not None and any(part.deviation is not None for part in parts):
            spread = [
                np.zeros_like(mean) if part.deviation is None else numbers(part.deviation, row)
                for part, row, mean in zip(parts, rows, found, strict=True)
            ]
            noise = draw_normal(self.seed, "posterior", positions, tuple(latents.shape[1:]))
            latents = latents.float() + torch.from_numpy(np.stack(spread)).float().reshape(latents.shape) * noise
        keys = tuple(part.keys[row].as_py() for part, row in zip(parts, rows, strict=True))
        return Batch(latents, torch.from_numpy(text), torch.from_numpy(mask), keys, torch.from_numpy(scales))

    def batches(self, start: int, stop: int, batch_size: int, *, rank: int = 0, world: int = 1) -> Reading:
        """This rank's share of each global batch between two positions, read ahead in a thread; the last may be small.

        Closing the iterator stops the thread; an error in it is raised here.
        """
        parts = shares(start, stop, batch_size, rank=rank, world=world)
        calls = (partial(self.batch, position + first, last - first) for position, _, first, last in parts)
        return ahead(calls, depth=2, name="loader")


def _rows_of(splits: Any, split: str) -> int:
    if split not in ("train", "validation"):
        raise ValueError(f"split is 'train' or 'validation', not {split!r}")
    return sum(count for name, count in splits.items() if (name == "train") == (split == "train"))


def require(
    stores: Sequence[Store], *, resolution: int, text_encoder: str,
    autoencoder_sha256: str | None = None, text_encoder_sha256: str | None = None,
) -> None:  # fmt: skip
    """Raise `UserError`, naming what the store has, unless every store holds what the training needs."""
    for store in stores:
        info = store.info
        if resolution not in info.resolutions:
            has = ", ".join(map(str, info.resolutions))
            raise UserError(f"The store {store.path} lacks {resolution} px (it has {has}); prepare it with that too.")
        if text_encoder not in info.text_encoders:
            has = ", ".join(f"'{name}'" for name in info.text_encoders)
            raise UserError(f"The store {store.path} has no captions encoded by '{text_encoder}' (it has {has}).")
        for what, made_with, wanted in (
            (f"autoencoder '{info.autoencoder.name}'", info.autoencoder.sha256, autoencoder_sha256),
            (f"text encoder '{text_encoder}'", info.text_encoders[text_encoder].sha256, text_encoder_sha256),
        ):
            if wanted and wanted != made_with:
                made = f"The store {store.path} was made with the {what} of sha256 {made_with[:12]}"
                raise UserError(f"{made}, the model wants {wanted[:12]}; prepare the data with the model's own.")
