"""Time each Triton kernel against its plain twin, compiled: `python -m benchmarks.kernels --out kernels.json`.

Forward and backward at MicroDiT_XL_2's shapes (256 images of 256 px, masked and not), bf16, on a GPU.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench_cudagraph

from benchmarks.step import machine
from micro_diffusion.kernels import launch
from micro_diffusion.kernels.add_norm import add_norm
from micro_diffusion.kernels.attention import attention
from micro_diffusion.kernels.expert_choice import combine, dispatch, slots_of

Compute = Callable[..., Sequence[Tensor]]


def timed(compute: Compute, inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Milliseconds of forward, and of forward and backward."""
    outputs = [out for out in compute(*inputs) if out.requires_grad]
    grads = [torch.randn_like(out) for out in outputs]
    wanted = [x for x in inputs if x.requires_grad]

    def both() -> None:
        torch.autograd.grad([out for out in compute(*inputs) if out.requires_grad], wanted, grads)

    # a graph's replays: launching so little work takes the host longer than the GPU
    return do_bench_cudagraph(lambda: compute(*inputs)), do_bench_cudagraph(both)


def cases(images: int, tokens: int, dim: int, text: int) -> dict[str, tuple[Compute, list[Tensor]]]:
    """One for each kernel, with fresh inputs."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    chosen = torch.rand(images, 8, tokens, device="cuda").argsort()[:, :, : tokens // 4]

    def modulated(x: Tensor, branch: Tensor, cond: Tensor, weight: Tensor) -> Sequence[Tensor]:
        shift, scale, gate = cond.chunk(3, dim=1)
        return add_norm(x, branch, gate, weight, shift, scale, eps=1e-6)

    def moved(x: Tensor, weights: Tensor) -> Sequence[Tensor]:
        slots = slots_of(chosen, tokens)
        return [combine(dispatch(x, chosen, slots), weights, chosen, slots)]

    x, branch, cond, weight = leaf(images, tokens, dim), leaf(images, tokens, dim), leaf(images, 3 * dim), leaf(dim)
    weights, kv, qkv = leaf(images, 8, tokens // 4), leaf(images, text, 2 * dim), leaf(images, tokens, 3 * dim)
    return {
        "add_norm": (modulated, [x, branch, cond, weight]),
        "plain norm": (lambda x, b, w: add_norm(x, b, None, w, eps=1e-6), [x, branch, weight]),
        "experts": (moved, [x, weights]),
        "cross-attention": (lambda q, kv: [attention(q, *kv.chunk(2, -1), head_dim=64)], [x, kv]),
        "self-attention": (lambda qkv: [attention(*qkv.chunk(3, -1), head_dim=64)], [qkv]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dim", type=int, default=1024)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for images, tokens in ((256, 64), (64, 256)):
        for name, (compute, inputs) in cases(images, tokens, args.dim, 77).items():
            with launch.plain():
                plain = timed(torch.compile(compute, dynamic=False), inputs)
            torch.compiler.reset()
            fast = timed(torch.compile(compute, dynamic=False), inputs)
            row = {"images": images, "tokens": tokens, "kernel": name, "plain_ms": plain, "fast_ms": fast}
            rows.append(row)
            text = "  ".join(
                f"{path} {one:.3f} + {both - one:.3f}" for path, (one, both) in (("plain", plain), ("fast", fast))
            )
            print(f"{images} x {tokens:3}  {name:16} ms forward + backward: {text}", flush=True)
            args.out.write_text(json.dumps({"machine": machine("cuda"), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
