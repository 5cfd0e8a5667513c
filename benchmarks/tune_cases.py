"""What benchmarks/tune.py times: the kernels, MicroDiT_XL_2's shapes, and the settings to be tried."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from micro_diffusion.kernels import add_norm, attention, expert_choice, launch

EPS, EXPERTS, TEXT = 1e-6, 8, 77
Setting = dict[str, int]


class Work(NamedTuple):
    """What to time, and the bytes that it has to read and to write."""

    call: Callable[[], object]
    bytes: int


def norms(backward: bool, images: int, tokens: int, dim: int, gated: bool) -> Work:
    x, branch, into, other = random(4, images, tokens, dim)
    shift, scale, gate = random(images, 3 * dim).chunk(3, dim=1)
    weight, maybe = random(dim).float(), gate if gated else None
    if not backward:
        return Work(lambda: add_norm._add_norm(x, branch, maybe, weight, shift, scale, EPS, x.dtype), 4 * x.nbytes)

    def call() -> Tensor:  # the fewer tokens a program has, the more parts there are to be summed
        return add_norm._add_norm_backward(x, branch, maybe, weight, scale, into, other, EPS)[2].sum(2)

    return Work(call, (5 + gated) * x.nbytes)


def heads(backward: bool, images: int, queries: int, keys: int, dim: int, head: int) -> Work:
    """Self-attention if there are as many keys as queries."""
    q, k, v = random(images, queries, 3 * dim).chunk(3, -1)
    if keys != queries:
        q, (k, v) = q.contiguous(), random(images, keys, 2 * dim).chunk(2, -1)
    grad = random(images, queries, dim)
    if not backward:
        return Work(lambda: attention._attention(q, k, v, None, head), 2 * (q.nbytes + k.nbytes))
    return Work(lambda: attention._attention_backward(q, k, v, None, grad, head), 3 * q.nbytes + 4 * k.nbytes)


def experts(op: str, images: int, tokens: int, dim: int) -> Work:
    """Every token is taken twice on average."""
    chosen = torch.rand(images, EXPERTS, tokens, device=device()).argsort()[:, :, : 2 * tokens // EXPERTS]
    chosen, slots = chosen.contiguous(), expert_choice.slots_of(chosen, tokens)
    x, y, weights = random(images, tokens, dim), random(EXPERTS, images * chosen.shape[2], dim), random(*chosen.shape)
    calls: dict[str, Callable[[], object]] = {
        "dispatch": lambda: expert_choice._dispatch(x, chosen, slots),
        "dispatch backward": lambda: expert_choice._dispatch_backward(y, slots),
        "combine": lambda: expert_choice._combine(y, weights, chosen, slots),
        "combine backward": lambda: expert_choice._combine_backward(x, y, weights, chosen),
    }
    return Work(calls[op], x.nbytes + (2 if op == "combine backward" else 1) * y.nbytes)


def device() -> str:
    return "cpu" if launch.INTERPRETED else "cuda"


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=device(), dtype=torch.float32 if launch.INTERPRETED else torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """`make(first, *shape)` makes the work; toy shapes have the same number of sizes."""

    module: ModuleType
    make: Callable[..., Work]
    firsts: Sequence[Any]
    shapes: Sequence[tuple[int, ...]]
    toy: tuple[int, ...]
    rounds: Sequence[Sequence[Setting]]

    def works(self) -> dict[str, Work]:
        shapes = [self.toy] if launch.INTERPRETED else self.shapes
        return {
            " x ".join(map(str, shape)) + (f" {first}" if isinstance(first, str) else ""): self.make(first, *shape)
            for first, shape in itertools.product(self.firsts, shapes)
        }


def grid(**values: Sequence[int]) -> list[Setting]:
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def tiles(prefix: str, warps: Sequence[int], queries: Sequence[int], most: int) -> list[Setting]:
    """Of warps and queries what belongs together: at least four queries a warp, and at most `most`."""
    found = grid(**{f"{prefix}WARPS": warps, f"{prefix}QUERIES": queries})
    return [each for each in found if 4 <= each[f"{prefix}QUERIES"] // each[f"{prefix}WARPS"] <= most]


NORMS = [(256, 64, 1024, 1), (256, 256, 768, 1), (256, 64, 1024, 0)]
SHORT, LONG = [(256, 64, 64, 1024, 64), (256, 32, 32, 1024, 64)], [
    (256, 64, TEXT, 1024, 64), (256, 256, TEXT, 768, 64), (128, 128, 128, 1024, 64),
]  # fmt: skip
MOVES, FEW, MANY, TOY = [(256, 64, 1024), (64, 256, 1024)], (16, 32, 64), (16, 32, 64, 128), (1, 18, 18, 32, 16)
WARPS, STAGES = (1, 2, 4, 8), (1, 2, 3)
KERNELS = {
    "add_norm": Kernel(add_norm, norms, [False], NORMS, (2, 9, 24, 1), [grid(WARPS=WARPS)]),
    "add_norm backward": Kernel(add_norm, norms, [True], NORMS, (2, 9, 24, 1), [
        grid(GRAD_WARPS=(2, 4, 8), ROWS=(1, 2), STAGES=(1, 2)), grid(TOKENS_OF_PROGRAM=(4, 8, 16, 32, 64)),
        grid(ROWS=(1, 2, 4), STAGES=STAGES),
    ]),
    "attention": Kernel(attention, heads, [False], SHORT, TOY, [tiles("", WARPS, FEW, 32)]),
    "attention backward": Kernel(attention, heads, [True], SHORT, TOY, [
        tiles("GRAD_", WARPS, FEW, 16), grid(GRAD_STAGES=STAGES),
    ]),
    "long attention": Kernel(attention, heads, [False], LONG, (1, 5, 70, 32, 16), [tiles("LONG_", WARPS, MANY, 32)]),
    "long attention backward": Kernel(attention, heads, [True], LONG, (1, 5, 70, 32, 16), [
        tiles("LONG_GRAD_", (4, 8), MANY, 16), grid(LONG_GRAD_STAGES=STAGES),
    ]),
    "gather": Kernel(expert_choice, experts, ["dispatch"], MOVES, (2, 8, 24), [grid(GATHER_WARPS=WARPS)]),
    "gather and dot": Kernel(expert_choice, experts, ["combine backward"], MOVES, (2, 8, 24), [grid(DOT_WARPS=WARPS)]),
    "sum": Kernel(expert_choice, experts, ["combine", "dispatch backward"], MOVES, (2, 8, 24), [grid(SUM_WARPS=WARPS)]),
}  # fmt: skip
