"""Kernels against their plain twins: what benchmarks/attention.py, moe.py and norms.py share.

Forward, and forward with backward, compiled, in bf16, at MicroDiT_XL_2's shapes: 256 px masked, 256 px (whose backbone
has as many patches as 512 px masked) and 512 px. On a CPU both paths are the plain one, in float32, eager: that only
rehearses.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.step import machine
from micro_diffusion.kernels import launch

SHAPES = ((256, 64), (64, 256), (16, 1024))  # images and patches of a forward pass
CPU_SHAPES = ((2, 64),)
CPU_REPEATS = 3


class Work(NamedTuple):
    """A function, what it is called with, and the module whose weights it uses besides."""

    compute: Callable[..., Sequence[Tensor]]
    inputs: Sequence[Tensor]
    module: torch.nn.Module | None = None


class Maker:
    """Fresh random tensors, to be differentiated, for a device."""

    def __init__(self, device: str) -> None:
        self.device, self.dtype = device, torch.bfloat16 if device == "cuda" else torch.float32

    def leaf(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype).requires_grad_()


Cases = Callable[[Maker, int, int, int], dict[str, dict[str, Work]]]
"""Of images, patches and width: for each kernel the paths, each "plain", "fast" or one of its own."""


def twins(work: Work) -> dict[str, Work]:
    """The same work by both paths."""
    return {"plain": work, "fast": work}


def timed(work: Work, *, gpu: bool) -> tuple[float, float]:
    """Milliseconds of forward, and of forward and backward."""
    torch.compiler.reset()
    compute = torch.compile(work.compute, dynamic=False) if gpu else work.compute
    outputs = [out for out in compute(*work.inputs) if out.requires_grad]
    grads = [torch.randn_like(out) for out in outputs]
    del outputs  # and with them what autograd keeps for the leaves, whose stream a graph must not wait for
    wanted = [x for x in work.inputs if x.requires_grad] + list(work.module.parameters() if work.module else ())

    def both() -> None:
        torch.autograd.grad([out for out in compute(*work.inputs) if out.requires_grad], wanted, grads)

    return bench(lambda: compute(*work.inputs), gpu=gpu), bench(both, gpu=gpu)


def bench(call: Callable[[], object], *, gpu: bool, milliseconds: int = 20) -> float:
    """Milliseconds of a call; a GPU repeats it ten times as long as `milliseconds`."""
    if gpu:
        from triton.testing import do_bench_cudagraph

        # a graph's replays: launching so little work takes the host longer than the GPU
        return float(do_bench_cudagraph(call, rep=milliseconds))
    seconds = []
    for _ in range(CPU_REPEATS + 1):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[1:])


def main(about: str | None, cases: Cases) -> None:
    """Time all cases at all shapes; JSON is rewritten after each."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dim", type=int, default=1024 if gpu else 64)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for images, tokens in SHAPES if gpu else CPU_SHAPES:
        for name, paths in cases(Maker("cuda" if gpu else "cpu"), images, tokens, args.dim).items():
            found = {}
            for path, work in paths.items():
                if path == "fast":
                    found[path] = timed(work, gpu=gpu)
                else:
                    with launch.plain():
                        found[path] = timed(work, gpu=gpu)
            rows.append({"images": images, "tokens": tokens, "kernel": name, "ms": found})
            text = "  ".join(f"{path} {one:.3f} + {both - one:.3f}" for path, (one, both) in found.items())
            print(f"{images} x {tokens:4}  {name:18} ms forward + backward: {text}", flush=True)
            result = {"machine": machine("cuda" if gpu else "cpu"), "dim": args.dim, "rows": rows}
            args.out.write_text(json.dumps(result, indent=2) + "\n")
