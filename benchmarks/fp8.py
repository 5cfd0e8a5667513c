"""Would fp8 pay? The matrix products of a training step in bf16 and in fp8: `python -m benchmarks.fp8 --out fp8.json`.

The products and their rows are those of a real forward pass (256 px, mask 0.75, on the meta device). Of shapes close to
each other (products.py) the one with most FLOPs is measured and stands, by FLOPs, for `copies` of itself. Left out, as
they would stay bf16: layers below 0.1% of the FLOPs, or with a dimension that 16 does not divide.

"fp8" and "fp8 fast" are the products alone, without and with fast accumulation, of operands cast before; "fp8 cast" is
compiled, with what per-tensor scaling asks for: amax, scale and cast of activations, weights and gradients (e5m2), and
the copies that make one operand row-major and the other column-major; fast accumulation forward only. Experts go one at
a time; "fp8 grouped" is their forward product alone by torch._scaled_grouped_mm. `step` has the sums; its "best" takes
for each shape the faster of "bf16" and "fp8 cast". In a model casts could fuse with what comes before them. On a CPU, a
small model and eager, this only rehearses; paths that fail have the reason in `notes`.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.products import Shape, layers, representatives
from benchmarks.step import machine
from benchmarks.twins import bench
from micro_diffusion.models.presets import PRESETS

SMALLEST, UNIT = 1e-3, 16
BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of a product in fp8: row-major, column-major, and their scales."""
Calls = tuple[Callable[[], object], ...]


def cast(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scaled to the type's range, and the factor that undoes it."""
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def column(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def operands(x: Tensor, w: Tensor, g: Tensor | None = None) -> list[Operands]:
    """Of the output, and given its gradient of the input's and the weight's."""
    (x8, xs), (w8, ws) = cast(x, E4M3), cast(w, E4M3)
    made = [(x8, column(w8), xs, ws)]
    if g is not None:
        g8, gs = cast(g, E5M2)
        made += [(g8, column(w8.mT), gs, ws), (x8.mT.contiguous(), column(g8), xs, gs)]
    return made


def multiply(products: list[Operands], *fast: bool) -> list[Tensor]:
    """As many products as flags, which say whether accumulation is fast."""
    return [
        torch._scaled_mm(one, other, scale_a=scale_a, scale_b=scale_b, out_dtype=BF16, use_fast_accum=quick)
        for (a, b, scale_a, scale_b), quick in zip(products, fast, strict=False)
        for one, other in zip(a, b, strict=True)
    ]


def with_casts(x: Tensor, w: Tensor, g: Tensor | None = None) -> list[Tensor]:
    return multiply(operands(x, w, g), True, False, False)


def paths(shape: Shape, device: str) -> dict[str, Calls]:
    """By path: the forward product, and it with the two of the backward pass."""
    x, g = (torch.randn(*shape[:2], width, device=device, dtype=BF16) for width in shape[2:])
    w = column(torch.randn(shape.experts, *shape[2:], device=device, dtype=BF16))  # as nn.Linear keeps it
    if shape.experts > 1:
        w = w.contiguous()
    made, (x1, w1, g1) = operands(x, w, g), (one.squeeze(0) for one in (x, w, g))
    torch.compiler.reset()
    compiled = torch.compile(with_casts, dynamic=False) if device == "cuda" else with_casts
    found: dict[str, Calls] = {
        "bf16": (lambda: x1 @ w1, lambda: (x1 @ w1, g1 @ w1.mT, x1.mT @ g1)),
        "fp8": (lambda: multiply(made, False), lambda: multiply(made, False, False, False)),
        "fp8 fast": (lambda: multiply(made, True), lambda: multiply(made, True, True, True)),
        "fp8 cast": (lambda: compiled(x, w), lambda: compiled(x, w, g)),
    }
    if shape.experts > 1:  # it takes a scale for each row and column
        a, b, *scales = made[0]
        s, t = (scale.expand(len(x), n).contiguous() for scale, n in zip(scales, shape[1::2], strict=True))
        found["fp8 grouped"] = (lambda: torch._scaled_grouped_mm(a, b, s, t, out_dtype=BF16, use_fast_accum=True),)
    return found


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="MicroDiT_XL_2" if device == "cuda" else "MicroDiT_Nano_4", choices=PRESETS)
    parser.add_argument("--images", type=int, default=256 if device == "cuda" else 16)
    args = parser.parse_args()
    counts = layers(args.model, args.images)
    whole = sum(counts[shape] * shape.macs for shape in counts)
    fit = Counter({shape: count for shape, count in counts.items()
                   if count * shape.macs >= SMALLEST * whole and not any(n % UNIT for n in shape[1:])})  # fmt: skip
    result: dict[str, Any] = {
        "machine": machine(device), "model": args.model, "images": args.images, "layers": fit.total(),
        "share_of_flops": sum(fit[shape] * shape.macs for shape in fit) / whole, "rows": [], "notes": {},
    }  # fmt: skip
    for shape, copies in representatives(fit).items():
        ms: dict[str, list[float]] = {}
        for path, calls in paths(shape, device).items():
            try:
                ms[path] = [bench(call, gpu=device == "cuda") for call in calls]
            except (RuntimeError, TypeError, AttributeError) as error:
                result["notes"].setdefault(path, f"{tuple(shape)}: {error}"[:300])
        ms["best"] = min((ms[path] for path in ("bf16", "fp8 cast") if path in ms), key=lambda pair: pair[1])
        result["rows"].append(shape._asdict() | {"copies": copies, "ms": ms})
        result["step"] = {
            path: [sum(row["copies"] * row["ms"][path][i] for row in result["rows"]) for i in (0, 1)]
            for path in ms if all(path in row["ms"] for row in result["rows"])
        }  # fmt: skip
        text = "  ".join(f"{path} {' / '.join(f'{value:.3f}' for value in found)}" for path, found in ms.items())
        print(f"{'x'.join(map(str, shape))} for {copies:.1f}: ms forward / both: {text}", flush=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
