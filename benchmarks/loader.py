"""Samples a second that one worker of the loader reads from page cache, at the paper's shapes.

    python -m benchmarks.loader --rows 2000 --out loader.json

A store of random numbers is written into a temporary folder and read once before the clock starts. Every caption has
all 77 positions unless --tokens says otherwise.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.step import machine
from micro_diffusion.data.loader import Loader
from micro_diffusion.data.prepare import prepare
from micro_diffusion.data.records import Caption, Encoded, Record
from micro_diffusion.data.store import AutoencoderInfo, Store, StoreInfo, TextInfo

WIDTH, CHANNELS, DOWNSCALE = 1024, 4, 8


def write_store(folder: Path, *, rows: int, tokens: int, resolutions: tuple[int, ...], dtype: str) -> Store:
    """Latents and caption states of random numbers, each row's from another place of one long draw."""
    draw = np.random.default_rng(0)
    pool = draw.standard_normal(2**22, np.float32).astype(np.float16)

    def some(count: int) -> np.ndarray:
        start = int(draw.integers(len(pool) - count))
        return pool[start : start + count].copy()

    def record(number: int) -> Record:
        latents = {size: some(CHANNELS * (size // DOWNSCALE) ** 2) for size in resolutions}
        encoded = Encoded(latents, some(tokens * WIDTH))
        return Record(f"{number:08}", b"", (Caption("a caption"),), "random", encoded=encoded)

    def never(inputs: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("nothing is to be encoded")

    info = StoreInfo(
        AutoencoderInfo("random", "0", 1.0, 0.0, CHANNELS, DOWNSCALE),
        {"random": TextInfo("0", WIDTH, tokens, "none")},
        dtypes={"latents": "float16", "text": dtype},
    )
    prepare(
        map(record, range(rows)), folder, resolutions=resolutions, encode_images=never, encode_text=never, info=info,
        rows_per_part=256, batch_size=64,
    )  # fmt: skip
    return Store.open(folder)


def measure(store: Store, *, resolution: int, batch_size: int, seconds: float) -> dict[str, float]:
    """Best of several passes of `seconds` altogether."""
    loader = Loader([store], resolution=resolution, text_encoder="random", seed=0)
    rows = len(loader) // batch_size * batch_size
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until or not best:
        start = time.perf_counter()
        total = 0
        for batch in loader.batches(0, rows, batch_size):
            total += len(batch.latents)
        best = max(best, total / (time.perf_counter() - start))
    kilobytes = sum(f.stat().st_size for f in store.path.rglob("*.arrow")) / len(store) / 1e3
    return {"samples_per_second": round(best), "stored_kB_per_sample": round(kilobytes, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file; without it the JSON is printed")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[77, 20])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=1, help="of torch, in the one worker")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for tokens in args.tokens:
        for dtype in ("float16", "int8"):
            with tempfile.TemporaryDirectory() as folder:
                store = write_store(
                    Path(folder) / "s", rows=args.rows, tokens=tokens, resolutions=(256, 512), dtype=dtype
                )
                for resolution in (256, 512):
                    found = measure(store, resolution=resolution, batch_size=args.batch_size, seconds=args.seconds)
                    results.append({"tokens": tokens, "text": dtype, "resolution": resolution, **found})
    head = {"machine": machine("cpu"), "batch_size": args.batch_size, "rows": args.rows, "results": results}
    text = json.dumps(head, indent=2) + "\n"
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
