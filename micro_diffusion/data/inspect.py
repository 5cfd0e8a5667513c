"""What a store holds, and whether it holds what it says."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from micro_diffusion.data.store import ROWS_FILE, PartInfo, Store, latents_file, part_folder, text_file
from micro_diffusion.runtime.files import sha256


def summary(store: Store) -> dict[str, str]:
    """Names and values for people: counts, sizes, caption lengths, and what was left out by reason."""
    rows = pa.concat_tables([store.rows(index) for index in range(len(store.parts))])
    words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.list_flatten(rows["captions"])))
    splits, rejected, filtered, size = (Counter[str]() for _ in range(4))
    for index, part in enumerate(store.parts):
        splits.update(part.splits)
        rejected.update(reject["reason"] for reject in part.rejects)
        filtered.update(part.filtered)
        size.update({name: (part_folder(store.path, index) / name).stat().st_size for name in part.files})
    each = {name: f"{total / max(len(store), 1):,.0f}" for name, total in size.items()}
    return {
        "pictures": f"{len(store):,} in {len(store.parts)} parts ({_listed(splits)})",
        "sources": _listed(Counter(rows["source"].to_pylist())),
        "bytes a picture": f"{size.total() / max(len(store), 1):,.0f} ({_listed(each)})",
        "shorter edge, px": _spread(pc.min_element_wise(rows["width"], rows["height"])),
        "captions a picture": _spread(pc.list_value_length(rows["captions"])),
        "words a caption": _spread(pc.list_value_length(words)),
        "damaged": _listed(rejected) or "none",
        "not wanted": _listed(filtered) or "none",
    }


def problems(store: Store) -> Iterator[str]:
    """One sentence for everything that is wrong: files whose hash, shapes or values are not what they should be."""
    for index, part in enumerate(store.parts):
        folder = part_folder(store.path, index)
        files = part.files.items()
        changed = [name for name, digest in files if not (folder / name).is_file() or sha256(folder / name) != digest]
        yield from (f"{folder / name} is missing, or is not the file that was written." for name in changed)
        if not changed:
            yield from (f"{folder / name} has {what}." for name, what in _wrong(store, index, part))


def _wrong(store: Store, index: int, part: PartInfo) -> Iterator[tuple[str, str]]:
    """File, and what is wrong in it."""
    rows, info = store.rows(index), store.info
    captions = [len(texts) for texts in rows["captions"].to_pylist()]
    checks: list[tuple[str, bool, np.ndarray]] = [(ROWS_FILE, rows.num_rows == part.rows, np.zeros(1))]
    for resolution in info.resolutions:
        table, values = store.latents(resolution, index), info.autoencoder.channels
        values *= (resolution // info.autoencoder.downscale) ** 2
        for column in ("latents", "deviation") if info.posterior else ("latents",):
            sizes, numbers = _lists(table[column])
            checks.append((latents_file(resolution), sizes.tolist() == [values] * part.rows, numbers))
    for name, text in info.text_encoders.items():
        table = store.text(name, index)
        (sizes, states), (counts, lengths) = _lists(table["states"]), _lists(table["lengths"])
        wanted = [text.width * int(some.sum()) for some in np.split(lengths, np.cumsum(counts)[:-1])]
        numbers = _lists(table["scales"])[1] if "scales" in table.column_names else states
        checks.append((text_file(name), (counts.tolist(), sizes.tolist()) == (captions, wanted), numbers))
    for name, fits, numbers in checks:
        if not fits:
            yield name, "other shapes than it should"
        if not np.isfinite(numbers).all():
            yield name, "values that are not finite"


def _lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Length of each list, and all values."""
    return pc.list_value_length(column).to_numpy(), pc.list_flatten(column).to_numpy()


def _listed(counts: dict[str, int] | dict[str, str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _spread(values: pa.ChunkedArray) -> str:
    low, middle, high = np.percentile(values.to_numpy() if len(values) else [0], [5, 50, 95])
    return f"{middle:g} (nine in ten from {low:g} to {high:g})"
