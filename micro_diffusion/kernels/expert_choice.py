"""Tokens to experts and back: no one-hot matrix, no atomic addition, the same result at every run.

An expert's list `tokens` says which token lies in which slot; the inverse, `slots`, says in which slot of each expert a
token lies, so that every output row is written once, by a program that reads what belongs to it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from micro_diffusion.kernels.launch import either, launcher, tl, triton, usable

# Launch settings, which benchmarks/tune.py measures and rewrites.
GATHER_WARPS, DOT_WARPS, SUM_WARPS = 2, 1, 2


def slots_of(tokens: Int[Tensor, "b e k"], count: int) -> Int[Tensor, "b t e"]:
    """In which slot of each expert each of `count` tokens lies; -1 where the expert did not take it."""
    batch, experts, capacity = tokens.shape
    slots = torch.full((batch, experts, count), -1, dtype=torch.int32, device=tokens.device)
    numbers = torch.arange(capacity, dtype=torch.int32, device=tokens.device).expand_as(tokens)
    return slots.scatter(2, tokens, numbers).transpose(1, 2).contiguous()


def dispatch(
    x: Float[Tensor, "b t d"], tokens: Int[Tensor, "b e k"], slots: Int[Tensor, "b t e"]
) -> Float[Tensor, "e n d"]:
    """The tokens of each expert, those of all images in a row: n = b * k."""
    if usable(x):
        return _dispatch(x.contiguous(), tokens.contiguous(), slots)
    return x.flatten(0, 1)[_rows(tokens, x.shape[1])]


def combine(
    y: Float[Tensor, "e n d"], weights: Float[Tensor, "b e k"],
    tokens: Int[Tensor, "b e k"], slots: Int[Tensor, "b t e"],
) -> Float[Tensor, "b t d"]:  # fmt: skip
    """For each token the weighted sum of what the experts that took it made of it; zero if none did."""
    if usable(y):
        return _combine(y.contiguous(), weights.contiguous(), tokens.contiguous(), slots)
    batch, count, _ = slots.shape
    weighted = y * weights.transpose(0, 1).flatten(1)[:, :, None].to(y.dtype)
    sums = weighted.new_zeros(batch * count, y.shape[-1])
    return sums.index_add(0, _rows(tokens, count).flatten(), weighted.flatten(0, 1)).view(batch, count, -1)


def _rows(tokens: Int[Tensor, "b e k"], count: int) -> Int[Tensor, "e n"]:
    """Rows of the flat batch of tokens."""
    offsets = torch.arange(len(tokens), device=tokens.device)[:, None, None] * count
    return (tokens + offsets).transpose(0, 1).flatten(1)


if triton is not None:

    @triton.jit
    def _gather_kernel(
        source, tokens, weights, other, out, dots, count, capacity, rows_of_expert, experts, dim,
        WEIGHTED: tl.constexpr, DOT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Row (e, b * k): out = weight * source[b, tokens[b, e, k]], dots = <source row, other row>."""
        row = tl.program_id(0).to(tl.int64)
        expert, rest = row // rows_of_expert, row % rows_of_expert
        image, slot = rest // capacity, rest % capacity
        place = (image * experts + expert) * capacity + slot
        token = tl.load(tokens + place)
        columns = tl.arange(0, BLOCK)
        inside = columns < dim
        values = tl.load(source + (image * count + token) * dim + columns, mask=inside, other=0.0)
        if DOT:
            others = tl.load(other + row * dim + columns, mask=inside, other=0.0)
            tl.store(dots + place, tl.sum(values.to(tl.float32) * others.to(tl.float32)))
        if WEIGHTED:
            values = values.to(tl.float32) * tl.load(weights + place).to(tl.float32)
        tl.store(out + row * dim + columns, values.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _sum_kernel(
        source, slots, weights, out, count, capacity, rows_of_expert, dim,
        WEIGHTED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Row (b, t): the sum over its experts of weight * source[e, b * k]."""
        row = tl.program_id(0).to(tl.int64)
        image = row // count
        columns = tl.arange(0, BLOCK)
        inside = columns < dim
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for expert in tl.static_range(EXPERTS):
            slot = tl.load(slots + row * EXPERTS + expert)
            taken = slot >= 0
            here = expert * rows_of_expert + image * capacity + slot
            values = tl.load(source + here * dim + columns, mask=inside & taken, other=0.0).to(tl.float32)
            if WEIGHTED:
                place = (image * EXPERTS + expert) * capacity + slot
                values *= tl.load(weights + place, mask=taken, other=0.0).to(tl.float32)
            total += values
        tl.store(out + row * dim + columns, total.to(out.dtype.element_ty), mask=inside)

    def _gather(source: Tensor, tokens: Tensor, weights: Tensor | None, other: Tensor | None) -> tuple[Tensor, Tensor]:
        (batch, experts, capacity), (_, count, dim) = tokens.shape, source.shape
        out = source.new_empty(experts, batch * capacity, dim)
        dots = source.new_empty(tokens.shape if other is not None else 0, dtype=torch.float32)
        launcher(_gather_kernel)[(experts * batch * capacity,)](
            source, tokens, either(weights, source), either(other, source), out, dots,
            count, capacity, batch * capacity, experts, dim, WEIGHTED=weights is not None, DOT=other is not None,
            BLOCK=triton.next_power_of_2(dim), num_warps=GATHER_WARPS if other is None else DOT_WARPS,
        )  # fmt: skip
        return out, dots

    def _sum(source: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
        (batch, count, experts), (_, rows, dim) = slots.shape, source.shape
        out = source.new_empty(batch, count, dim)
        launcher(_sum_kernel)[(batch * count,)](
            source, slots, either(weights, source), out, count, rows // batch, rows, dim,
            WEIGHTED=weights is not None, EXPERTS=experts, BLOCK=triton.next_power_of_2(dim), num_warps=SUM_WARPS,
        )  # fmt: skip
        return out

    @torch.library.triton_op("micro_diffusion::dispatch", mutates_args=())
    def _dispatch(x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        return _gather(x, tokens, None, None)[0]

    @torch.library.triton_op("micro_diffusion::dispatch_backward", mutates_args=())
    def _dispatch_backward(grad: Tensor, slots: Tensor) -> Tensor:
        return _sum(grad, slots, None)

    @torch.library.triton_op("micro_diffusion::combine", mutates_args=())
    def _combine(y: Tensor, weights: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        return _sum(y, slots, weights)

    @torch.library.triton_op("micro_diffusion::combine_backward", mutates_args=())
    def _combine_backward(grad: Tensor, y: Tensor, weights: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return _gather(grad, tokens, weights, y)

    _dispatch.register_autograd(
        lambda ctx, grad: (_dispatch_backward(grad.contiguous(), *ctx.saved_tensors), None, None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[2]),
    )
    _combine.register_autograd(
        lambda ctx, grad: (*_combine_backward(grad.contiguous(), *ctx.saved_tensors), None, None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]),
    )
