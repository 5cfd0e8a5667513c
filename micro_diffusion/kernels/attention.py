"""Softmax attention over few keys: all of them stay on the chip, and the backward is one kernel without atomics.

Patches that survive masking are 64 at 256 px, captions have 77 tokens: for so few keys a program holds keys and values
of one head of one image and walks over the queries.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from micro_diffusion.kernels.launch import either, launcher, tl, triton, usable

MOST_KEYS = 128
# Launch settings, which benchmarks/tune.py measures and rewrites: warps, queries of a program's step, loads in flight.
WARPS, QUERIES, GRAD_WARPS, GRAD_QUERIES, GRAD_STAGES = 4, 64, 4, 64, 3  # up to 64 keys
LONG_WARPS, LONG_QUERIES, LONG_GRAD_WARPS, LONG_GRAD_QUERIES, LONG_GRAD_STAGES = 4, 128, 4, 16, 3  # more
LOG2_E = 1.4426950408889634


def attention(
    q: Float[Tensor, "b t d"], k: Float[Tensor, "b l d"], v: Float[Tensor, "b l d"], *,
    head_dim: int, mask: Bool[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b t d"]:  # fmt: skip
    """Scaled dot-product attention of each head; `mask` is true where a key may be attended to."""
    short = k.shape[1] <= MOST_KEYS and head_dim in (16, 32, 64, 128)
    if short and usable(q) and (q.dtype in (torch.bfloat16, torch.float16) or not q.is_cuda):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        return _attention(q, k, v, None if mask is None else mask.contiguous(), head_dim)
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
    return out.transpose(1, 2).flatten(2)


if triton is not None:

    @triton.jit
    def _attention_kernel(
        q, k, v, mask, out, queries, keys, heads,
        q_image, q_row, k_image, k_row, v_image, v_row,
        factor: tl.constexpr, MASKED: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    ):  # fmt: skip
        image, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        key, column = tl.arange(0, KEYS), head * DIM + tl.arange(0, DIM)[None, :]
        query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
        here, there = query < queries, key < keys
        qs = tl.load(q + image * q_image + query[:, None] * q_row + column, mask=here[:, None], other=0.0)
        ks = tl.load(k + image * k_image + key[:, None] * k_row + column, mask=there[:, None], other=0.0)
        vs = tl.load(v + image * v_image + key[:, None] * v_row + column, mask=there[:, None], other=0.0)
        allowed = there
        if MASKED:
            allowed = there & (tl.load(mask + image * keys + key, mask=there, other=0) != 0)
        scores = tl.where(allowed[None, :], tl.dot(qs, tl.trans(ks)) * factor, float("-inf"))
        scores = tl.exp2(scores - tl.max(scores, 1)[:, None])
        result = tl.dot(scores.to(vs.dtype), vs) * (1 / tl.sum(scores, 1))[:, None]
        place = (image * queries + query[:, None]) * heads * DIM + column
        tl.store(out + place, result.to(out.dtype.element_ty), mask=here[:, None])

    @triton.jit
    def _attention_grad_kernel(
        q, k, v, mask, grad, into_q, into_k, into_v, queries, keys, heads,
        q_image, q_row, k_image, k_row, v_image, v_row,
        factor: tl.constexpr, scale: tl.constexpr, MASKED: tl.constexpr,
        DIM: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, STEPS: tl.constexpr,
    ):  # fmt: skip
        image, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        key, column = tl.arange(0, KEYS), head * DIM + tl.arange(0, DIM)[None, :]
        there = key < keys
        ks = tl.load(k + image * k_image + key[:, None] * k_row + column, mask=there[:, None], other=0.0)
        vs = tl.load(v + image * v_image + key[:, None] * v_row + column, mask=there[:, None], other=0.0)
        allowed = there
        if MASKED:
            allowed = there & (tl.load(mask + image * keys + key, mask=there, other=0) != 0)
        of_k, of_v = tl.zeros([KEYS, DIM], dtype=tl.float32), tl.zeros([KEYS, DIM], dtype=tl.float32)
        for step in range(STEPS):  # a constant: one step is no loop and needs fewer registers
            query = step * QUERIES + tl.arange(0, QUERIES)
            here = query < queries
            place = (image * queries + query[:, None]) * heads * DIM + column
            qs = tl.load(q + image * q_image + query[:, None] * q_row + column, mask=here[:, None], other=0.0)
            gs = tl.load(grad + place, mask=here[:, None], other=0.0)
            scores = tl.where(allowed[None, :], tl.dot(qs, tl.trans(ks)) * factor, float("-inf"))
            scores = tl.exp2(scores - tl.max(scores, 1)[:, None])
            shares = scores * (1 / tl.sum(scores, 1))[:, None]
            of_v += tl.dot(tl.trans(shares.to(gs.dtype)), gs)
            into_shares = tl.dot(gs, tl.trans(vs))
            into_scores = shares * (into_shares - tl.sum(shares * into_shares, 1)[:, None]) * scale
            into_scores = into_scores.to(qs.dtype)
            of_k += tl.dot(tl.trans(into_scores), qs)
            tl.store(into_q + place, tl.dot(into_scores, ks).to(into_q.dtype.element_ty), mask=here[:, None])
        place = (image * keys + key[:, None]) * heads * DIM + column
        tl.store(into_k + place, of_k.to(into_k.dtype.element_ty), mask=there[:, None])
        tl.store(into_v + place, of_v.to(into_v.dtype.element_ty), mask=there[:, None])

    @torch.library.triton_op("micro_diffusion::attention", mutates_args=())
    def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, head_dim: int) -> Tensor:
        (batch, queries, width), keys = q.shape, k.shape[1]
        out, heads = q.new_empty(q.shape), width // head_dim
        warps, step = (LONG_WARPS, LONG_QUERIES) if keys > 64 else (WARPS, QUERIES)
        step = min(step, _padded(queries))
        launcher(_attention_kernel)[(batch * heads, triton.cdiv(queries, step))](
            q, k, v, either(mask, q), out, queries, keys, heads, *_strides(q, k, v), factor=head_dim**-0.5 * LOG2_E,
            MASKED=mask is not None, DIM=head_dim, KEYS=_padded(keys), QUERIES=step, num_warps=warps,
        )  # fmt: skip
        return out

    @torch.library.triton_op("micro_diffusion::attention_backward", mutates_args=())
    def _attention_backward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grad: Tensor, head_dim: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        (batch, queries, width), keys = q.shape, k.shape[1]
        into_q, into_k, into_v = (x.new_empty(x.shape) for x in (q, k, v))
        heads, factor = width // head_dim, head_dim**-0.5
        warps, step = (LONG_GRAD_WARPS, LONG_GRAD_QUERIES) if keys > 64 else (GRAD_WARPS, GRAD_QUERIES)
        step = min(step, _padded(queries))
        launcher(_attention_grad_kernel)[(batch * heads,)](
            q, k, v, either(mask, q), grad, into_q, into_k, into_v, queries, keys, heads,
            *_strides(q, k, v), factor=factor * LOG2_E, scale=factor, MASKED=mask is not None, DIM=head_dim,
            KEYS=_padded(keys), QUERIES=step, STEPS=triton.cdiv(queries, step), num_warps=warps,
            num_stages=LONG_GRAD_STAGES if keys > 64 else GRAD_STAGES,
        )  # fmt: skip
        return into_q, into_k, into_v

    def _context(ctx, inputs, output):
        *saved, ctx.head_dim = inputs
        ctx.save_for_backward(*saved)

    _attention.register_autograd(
        lambda ctx, grad: (*_attention_backward(*ctx.saved_tensors, grad.contiguous(), ctx.head_dim), None, None),
        setup_context=_context,
    )


def _padded(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]
