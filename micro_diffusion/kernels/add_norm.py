"""Gated residual, layer norm and modulation in one pass over memory, forward and backward.

    stream = x + gate * branch
    normed = layer_norm(stream) * weight * (1 + scale) + shift

The compiler needs several passes for the backward, since gate, shift and scale are summed over the tokens of an image
and weight over all of them; here a program walks over a few tokens of one image and keeps those sums in registers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from micro_diffusion.kernels.launch import either, launcher, tl, triton, usable

# Launch settings, which benchmarks/tune.py measures and rewrites.
WARPS, GRAD_WARPS = 2, 2
# of the backward: few enough to fill the chip, enough to make the partial sums cheap; and how many are in flight
TOKENS_OF_PROGRAM, ROWS, STAGES = 32, 1, 3


class Normed(NamedTuple):
    """The residual stream after the addition, and what the next layer reads."""

    stream: Float[Tensor, "b t d"]
    normed: Float[Tensor, "b t d"]


def add_norm(
    x: Float[Tensor, "b t d"], branch: Float[Tensor, "b t d"] | None, gate: Float[Tensor, "b d"] | None,
    weight: Float[Tensor, " d"], shift: Float[Tensor, "b d"] | None = None, scale: Float[Tensor, "b d"] | None = None,
    *, eps: float,
) -> Normed:  # fmt: skip
    """`stream` has the dtype of x; `normed` is float32, or what autocast computes in. No gate is a gate of one."""
    if usable(x) and branch is not None:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return Normed(*_add_norm(x.contiguous(), branch.contiguous(), gate, weight, shift, scale, eps, dtype))
    if branch is not None:
        x = (x + (branch if gate is None else gate[:, None] * branch)).to(x.dtype)
    normed = F.layer_norm(x, x.shape[-1:], weight, eps=eps)
    return Normed(x, normed if scale is None or shift is None else normed * (1 + scale[:, None]) + shift[:, None])


if triton is not None:

    @triton.jit
    def _add_norm_kernel(
        x, branch, gate, weight, shift, scale, summed, normed, count, dim,
        gate_stride, shift_stride, scale_stride,
        eps: tl.constexpr, GATED: tl.constexpr, MODULATED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        image = row // count
        columns = tl.arange(0, BLOCK)
        inside = columns < dim
        value = tl.load(x + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
        added = tl.load(branch + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            added *= tl.load(gate + image * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        # rounded first: the norm and its backward see the stream as it is stored
        value = (value + added).to(summed.dtype.element_ty).to(tl.float32)
        tl.store(summed + row * dim + columns, value.to(summed.dtype.element_ty), mask=inside)
        centred = tl.where(inside, value - tl.sum(value) / dim, 0.0)
        result = centred * tl.rsqrt(tl.sum(centred * centred) / dim + eps)
        result *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        if MODULATED:
            result *= 1 + tl.load(scale + image * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
            result += tl.load(shift + image * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + row * dim + columns, result.to(normed.dtype.element_ty), mask=inside)

    @triton.jit
    def _add_norm_grad_kernel(
        summed, branch, gate, weight, scale, into_stream, into_normed, into_x, into_branch, sums, count, dim,
        gate_stride, scale_stride, programs, tokens_of_program, eps: tl.constexpr, GATED: tl.constexpr,
        MODULATED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Gradients of x and branch; sums[0..3] are this program's parts of those of weight, shift, scale, gate."""
        part, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
        columns = tl.arange(0, BLOCK)[None, :]
        inside = columns < dim
        factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        if MODULATED:
            factor *= 1 + tl.load(scale + image * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
        # without a gate the compiler drops what is read of it, and of the branch
        gates = tl.load(gate + image * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        zeros = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        of_products, of_shift, of_gate = zeros, zeros, zeros  # products: grad * normalised, for weight and scale
        end = min((part + 1) * tokens_of_program, count)
        for start in tl.range(part * tokens_of_program, end, ROWS, num_stages=STAGES):
            token = start + tl.arange(0, ROWS)[:, None]
            here = inside & (token < end)
            place = (image * count + token) * dim + columns
            value = tl.load(summed + place, mask=here, other=0.0).to(tl.float32)
            grad = tl.load(into_normed + place, mask=here, other=0.0).to(tl.float32)
            through = tl.load(into_stream + place, mask=here, other=0.0).to(tl.float32)
            added = tl.load(branch + place, mask=here, other=0.0).to(tl.float32)
            scaled = grad * factor
            # two reductions in the time of one; and nothing is read between them, which would have to wait
            mean, scaled_mean = tl.split(tl.sum(tl.join(value, scaled), 1) / dim)
            centred = tl.where(here, value - mean[:, None], 0.0)
            variance, product = tl.split(tl.sum(tl.join(centred * centred, centred * scaled), 1) / dim)
            inverse = tl.rsqrt(variance + eps)[:, None]
            normal = centred * inverse
            of_products += grad * normal
            of_shift += grad
            grad = inverse * (scaled - scaled_mean[:, None] - normal * (inverse * product[:, None])) + through
            tl.store(into_x + place, grad.to(into_x.dtype.element_ty), mask=here)
            if GATED:
                of_gate += grad * added
                grad *= gates
            tl.store(into_branch + place, grad.to(into_branch.dtype.element_ty), mask=here)
        products = tl.sum(of_products, 0, keep_dims=True)
        size = tl.num_programs(1) * programs * dim
        at = (image * programs + part) * dim + columns
        if MODULATED:
            modulation = 1 + tl.load(scale + image * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(sums + at, products * modulation, mask=inside)
            tl.store(sums + size + at, tl.sum(of_shift, 0, keep_dims=True), mask=inside)
            tl.store(sums + 2 * size + at, products * tl.load(weight + columns, mask=inside, other=0.0), mask=inside)
        else:
            tl.store(sums + at, products, mask=inside)
        if GATED:
            tl.store(sums + 3 * size + at, tl.sum(of_gate, 0, keep_dims=True), mask=inside)

    @torch.library.triton_op("micro_diffusion::add_norm", mutates_args=())
    def _add_norm(
        x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor, shift: Tensor | None, scale: Tensor | None,
        eps: float, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch, count, dim = x.shape
        stream, normed = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
        launcher(_add_norm_kernel)[(batch * count,)](
            x, branch, either(gate, x), weight, either(shift, x), either(scale, x), stream, normed, count, dim,
            _stride(gate), _stride(shift), _stride(scale), eps=eps, GATED=gate is not None,
            MODULATED=scale is not None, BLOCK=triton.next_power_of_2(dim), num_warps=WARPS,
        )  # fmt: skip
        return stream, normed

    @torch.library.triton_op("micro_diffusion::add_norm_backward", mutates_args=())
    def _add_norm_backward(
        stream: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor, scale: Tensor | None,
        into_stream: Tensor, into_normed: Tensor, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        batch, count, dim = stream.shape
        programs = triton.cdiv(count, TOKENS_OF_PROGRAM)
        into_x, into_branch = torch.empty_like(stream), torch.empty_like(branch)
        sums = stream.new_empty(4, batch, programs, dim, dtype=torch.float32)
        launcher(_add_norm_grad_kernel)[(programs, batch)](
            stream, branch, either(gate, stream), weight, either(scale, stream), into_stream, into_normed,
            into_x, into_branch, sums, count, dim, _stride(gate), _stride(scale), programs, TOKENS_OF_PROGRAM,
            eps=eps, GATED=gate is not None, MODULATED=scale is not None, ROWS=ROWS, STAGES=STAGES,
            BLOCK=triton.next_power_of_2(dim), num_warps=GRAD_WARPS,
        )  # fmt: skip
        return into_x, into_branch, sums

    def _context(ctx, inputs, output):
        _, branch, gate, weight, _, scale, ctx.eps, _ = inputs
        ctx.save_for_backward(output[0], branch, gate, weight, scale)

    def _gradients(ctx, into_stream, into_normed):
        _, _, gate, weight, scale = saved = ctx.saved_tensors
        *into, sums = _add_norm_backward(*saved, into_stream.contiguous(), into_normed.contiguous(), ctx.eps)
        into_weight = sums[0].sum((0, 1)).to(weight.dtype)
        into_gate = None if gate is None else sums[3].sum(1).to(gate.dtype)
        into_shift, into_scale = (None if scale is None else sums[i].sum(1).to(scale.dtype) for i in (1, 2))
        return *into, into_gate, into_weight, into_shift, into_scale, None, None

    _add_norm.register_autograd(_gradients, setup_context=_context)


def _stride(rows: Tensor | None) -> int:
    """Between rows of (b, d) vectors, which may be parts of a wider tensor."""
    return 0 if rows is None else rows.stride(0)
