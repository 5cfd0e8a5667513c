"""Find the launch settings of the kernels on this GPU: `python -m benchmarks.tune --out tune.json`.

Each kernel is timed alone, in bf16, for a grid of the constants that head its module (benchmarks/tune_cases.py); where
there are several rounds, each starts from the best setting of the one before. What is best has the lowest sum of times
over a kernel's shapes. With `--apply` constants are rewritten in the source where that is faster than now by over 2%.
Kernels are compiled by several processes at once, which leave them in Triton's cache. Rehearsed on a CPU with

    TRITON_INTERPRET=1 python -m benchmarks.tune --toy --out toy.json
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from triton.runtime.errors import TritonError

from benchmarks.step import machine
from benchmarks.tune_cases import KERNELS, Setting, Work, device
from benchmarks.twins import bench
from micro_diffusion.kernels import launch

Items = tuple[tuple[str, int], ...]  # of a setting
GAIN = 0.02  # less is noise


@contextlib.contextmanager
def constants(module: ModuleType, setting: Setting) -> Iterator[None]:
    before = {name: getattr(module, name) for name in setting}
    vars(module).update(setting)
    try:
        yield
    finally:
        vars(module).update(before)


def compiled(name: str, setting: Setting) -> None:
    """In a process of its own: what fails here fails again when it is timed."""
    kernel = KERNELS[name]
    with constants(kernel.module, setting):
        for work in kernel.works().values():
            with contextlib.suppress(TritonError, RuntimeError):
                work.call()
    torch.cuda.empty_cache()


def timed(name: str, setting: Setting, works: dict[str, Work]) -> list[dict[str, Any]]:
    rows = []
    for shape, work in works.items():
        row: dict[str, Any] = {"kernel": name, "shape": shape, "setting": setting, "ms": None}
        try:
            with constants(KERNELS[name].module, setting):
                work.call()
                row["ms"] = bench(work.call, gpu=not launch.INTERPRETED, milliseconds=5)
            text = f"{row['ms']:8.4f} ms {work.bytes / row['ms'] / 1e6:6.0f} GB/s"
        except (TritonError, RuntimeError) as error:
            row["error"] = text = f"failed: {error}".splitlines()[0][:100]
        print(f"{name:24} {shape:30} {' '.join(f'{k}={v}' for k, v in setting.items()):56} {text}", flush=True)
        rows.append(row)
    return rows


def tuned(name: str, pool: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All rows of a kernel; and its best setting, with the sums of its and of today's times."""
    kernel, works = KERNELS[name], KERNELS[name].works()
    best: Setting = {key: getattr(kernel.module, key) for each in kernel.rounds for key in each[0]}
    default, rows, sums = best, list[dict[str, Any]](), dict[Items, float]()
    for settings in kernel.rounds:
        changes = [{}, *(settings[:3] if launch.INTERPRETED else settings)]
        tried: list[Items] = [tuple((best | change).items()) for change in changes]
        new = [items for items in dict.fromkeys(tried) if items not in sums]
        if pool:
            pool.starmap(compiled, [(name, dict(items)) for items in new], chunksize=1)
        for items in new:
            found = timed(name, dict(items), works)
            rows += found
            sums[items] = sum(row["ms"] or float("inf") for row in found)
        fastest = min(sums, key=lambda items: sums[items])
        best = dict(fastest)
    now, then = sums[tuple(default.items())], sums[tuple(best.items())]
    print(f"{name}: {now:.4f} ms with {default}, {then:.4f} ms ({then / now - 1:+.1%}) with {best}\n", flush=True)
    return rows, {"default": default, "best": best, "default_ms": now, "best_ms": then}


def rewritten(source: str, name: str, value: int) -> str:
    """A module's source with another value of one constant, which may be one of several on a line."""
    found = re.search(rf"^((?:\w+, )*{name}(?:, \w+)*) = ([\d, ]*\d)", source, re.MULTILINE)
    assert found, name
    values = dict(zip(found[1].split(", "), found[2].split(", "), strict=True)) | {name: str(value)}
    return f"{source[: found.start()]}{found[1]} = {', '.join(values.values())}{source[found.end() :]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rewritten after each kernel")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS, metavar="NAME")
    parser.add_argument("--apply", action="store_true", help="rewrite the constants in the source")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="that compile; 0: none")
    parser.add_argument("--toy", action="store_true", help="tiny shapes and three settings, interpreted")
    args = parser.parse_args()
    if args.toy and not os.environ.get("TRITON_INTERPRET"):
        parser.error("--toy needs TRITON_INTERPRET=1")
    launch.INTERPRETED = args.toy
    workers = 0 if args.toy else args.workers
    rows, kernels = list[dict[str, Any]](), dict[str, dict[str, Any]]()
    with multiprocessing.get_context("spawn").Pool(workers) if workers else contextlib.nullcontext() as pool:
        for name in args.kernels:
            new, kernels[name] = tuned(name, pool)
            rows += new
            best = {
                f"{KERNELS[each].module.__name__.rpartition('.')[2]}.{key}": value
                for each, found in kernels.items() for key, value in found["best"].items()
            }  # fmt: skip
            result = {"machine": machine(device()), "best": best, "kernels": kernels, "rows": rows}
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, found in kernels.items():
        if args.apply and found["best_ms"] < (1 - GAIN) * found["default_ms"]:
            path = Path(str(KERNELS[name].module.__file__))
            for key, value in found["best"].items():
                path.write_text(rewritten(path.read_text(), key, value))


if __name__ == "__main__":
    main()
