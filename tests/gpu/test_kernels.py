"""Triton kernels on CUDA: no further from float64 than their plain twins in bf16, deterministic, and compiled."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from micro_diffusion.kernels import launch
from micro_diffusion.kernels.add_norm import add_norm
from micro_diffusion.kernels.attention import attention
from micro_diffusion.kernels.expert_choice import combine, dispatch, slots_of

TOKENS = torch.rand(3, 8, 70, generator=torch.Generator().manual_seed(0)).argsort()[:, :, :17]
Compute = Callable[..., Sequence[Tensor]]


def experts(x: Tensor, y: Tensor, weights: Tensor) -> list[Tensor]:
    tokens = TOKENS.to(x.device)
    slots = slots_of(tokens, 70)
    return [dispatch(x, tokens, slots), combine(y, weights[:, :, :17], tokens, slots)]


def norms(x: Tensor, branch: Tensor, cond: Tensor, weight: Tensor) -> list[Tensor]:
    shift, scale, gate = cond.chunk(3, dim=1)
    first = add_norm(x, branch, gate, weight, shift, scale, eps=1e-6)
    return [*first, *add_norm(first.stream, branch, None, weight, eps=1e-6)]


def heads(q: Tensor, kv: Tensor, allowed: Tensor) -> list[Tensor]:
    mask = allowed[:, :, 0] > -0.5
    k, v = kv.chunk(2, dim=-1)
    return [attention(q, k, v, head_dim=64, mask=mask), attention(q, q, q, head_dim=32)]


CASES: dict[str, tuple[Compute, list[tuple[int, ...]]]] = {
    "experts": (experts, [(3, 70, 200), (8, 51, 200), (3, 8, 70)]),
    "norms": (norms, [(3, 70, 200), (3, 70, 200), (3, 600), (200,)]),
    "heads": (heads, [(3, 100, 128), (3, 77, 256), (3, 77, 1)]),
}


def everything(compute: Compute, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of an uneven function of them."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = compute(*leaves)
    uneven = [(out * torch.linspace(-1, 2, out.numel(), device="cuda").view(out.shape)).sum() for out in outputs]
    gradients = torch.autograd.grad(torch.stack([term.double() for term in uneven]).sum(), leaves, allow_unused=True)
    return [*outputs, *(gradient for gradient in gradients if gradient is not None)]


def errors(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    return [
        ((ours.double() - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(found, wanted, strict=True)
    ]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("compiled", [False, True])
def test_as_near_to_float64_as_the_plain_twin(name: str, compiled: bool) -> None:
    compute, shapes = CASES[name]
    torch.manual_seed(0)
    # what bf16 can hold, so that rounding the inputs is nobody's error
    inputs = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
    with launch.plain():
        wanted = everything(compute, inputs, torch.float64)
        plain = everything(compute, inputs, torch.bfloat16)
    fast = torch.compile(compute, fullgraph=True, dynamic=False) if compiled else compute
    found, again = (everything(fast, inputs, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True)), "not deterministic"
    for ours, theirs in zip(errors(found, wanted), errors(plain, wanted), strict=True):
        assert ours <= 1.1 * theirs + 1e-4
    torch.compiler.reset()
