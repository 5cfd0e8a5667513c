"""Each Triton kernel, interpreted, against its plain twin: outputs and gradients, on odd sizes too."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from micro_diffusion.kernels import add_norm as norms
from micro_diffusion.kernels import attention as heads
from micro_diffusion.kernels import launch
from micro_diffusion.kernels.add_norm import add_norm
from micro_diffusion.kernels.attention import attention
from micro_diffusion.kernels.expert_choice import combine, dispatch, slots_of

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    torch.manual_seed(0)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def assert_twins(compute: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
    """The same outputs, and the same gradients of an uneven function of them, with kernels and without."""

    def everything() -> list[Tensor]:
        outputs = compute()
        uneven = [(out.sin() * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum() for out in outputs]
        return [*outputs, *torch.autograd.grad(torch.stack(uneven).sum(), inputs)]

    with launch.plain():
        wanted = everything()
    found = everything()
    assert any("micro_diffusion" in str(out.grad_fn) for out in compute()), "no kernel ran"
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "count", "experts", "capacity", "dim"), [(3, 16, 4, 8, 24), (2, 7, 3, 5, 33)])
def test_experts(batch: int, count: int, experts: int, capacity: int, dim: int) -> None:
    x, weights = leaf(batch, count, dim), torch.rand(batch, experts, capacity, requires_grad=True)
    tokens = torch.rand(batch, experts, count).argsort()[:, :, :capacity]
    slots = slots_of(tokens, count)

    def compute() -> list[Tensor]:
        taken = dispatch(x, tokens, slots)
        return [taken, combine(taken.cos(), weights, tokens, slots)]

    assert_twins(compute, [x, weights])


def test_slots_are_the_inverse_of_tokens() -> None:
    tokens = torch.rand(2, 3, 9).argsort()[:, :, :4]
    slots = slots_of(tokens, 9)
    for image in range(2):
        for expert in range(3):
            taken = tokens[image, expert].tolist()
            for token in range(9):
                assert slots[image, token, expert] == (taken.index(token) if token in taken else -1)


@pytest.mark.parametrize(("batch", "count", "dim"), [(3, 18, 24), (2, 33, 17), (1, 5, 64)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
def test_add_norm(batch: int, count: int, dim: int, gated: bool, modulated: bool) -> None:
    x, branch, weight, cond = leaf(batch, count, dim), leaf(batch, count, dim), leaf(dim), leaf(batch, 3 * dim)

    def compute() -> list[Tensor]:
        shift, scale, gate = cond.chunk(3, dim=1)  # rows that are parts of wider ones, as in a block
        modulation = (shift, scale) if modulated else (None, None)
        return list(add_norm(x, branch, gate if gated else None, weight, *modulation, eps=1e-6))

    assert_twins(compute, [x, branch, weight, *([cond] if gated or modulated else [])])


@pytest.mark.parametrize(("tokens", "rows", "stages"), [(4, 1, 2), (8, 2, 1), (16, 4, 3), (2, 4, 2)])
def test_launch_settings_of_add_norm(monkeypatch: pytest.MonkeyPatch, tokens: int, rows: int, stages: int) -> None:
    for name, value in {"TOKENS_OF_PROGRAM": tokens, "ROWS": rows, "STAGES": stages}.items():
        monkeypatch.setattr(norms, name, value)
    test_add_norm(2, 19, 17, gated=True, modulated=True)
    test_add_norm(2, 19, 17, gated=False, modulated=False)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "head_dim"), [(2, 64, 64, 2, 16), (1, 70, 77, 2, 32), (2, 5, 24, 1, 16)]
)
def test_attention(batch: int, queries: int, keys: int, heads: int, head_dim: int, masked: bool) -> None:
    q, kv = leaf(batch, queries, heads * head_dim), leaf(batch, keys, 2 * heads * head_dim)
    mask = torch.rand(batch, keys).argsort() < keys // 2 if masked else None
    assert_twins(lambda: [attention(q, *kv.chunk(2, dim=-1), head_dim=head_dim, mask=mask)], [q, kv])


@pytest.mark.parametrize(("name", "keys"), [("", 24), ("LONG_", 77)])
@pytest.mark.parametrize(("queries", "stages"), [(16, 2), (32, 1), (128, 3)])
def test_launch_settings_of_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, keys: int, queries: int, stages: int
) -> None:
    for constant, value in {"QUERIES": queries, "GRAD_QUERIES": queries, "GRAD_STAGES": stages}.items():
        monkeypatch.setattr(heads, name + constant, value)
    test_attention(2, 70, keys, 2, 16, masked=True)


def test_many_keys_are_left_to_torch() -> None:
    q, kv = leaf(1, 4, 16), leaf(1, 129, 16)
    out = attention(q, kv, kv, head_dim=16)
    wanted = torch.softmax(q @ kv.transpose(1, 2) / 4, -1) @ kv
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    assert "micro_diffusion" not in str(out.grad_fn)
