"""Experts dispatched by index against the one-hot twin, a loop over tokens, and the rules of capacity."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.one_hot import OneHotMoE
from micro_diffusion.models.moe import ExpertChoiceMoE, expert_capacity


def layer(*, dim: int = 12, num_experts: int = 4, capacity_factor: float = 2.0) -> ExpertChoiceMoE:
    torch.manual_seed(0)
    moe = ExpertChoiceMoE(dim, 1.5, 8, num_experts, capacity_factor)
    for weight in moe.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return moe


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(4, 17),
    num_experts=st.integers(1, 5),
    capacity_factor=st.floats(1.25, 2.75),
    dim=st.sampled_from([1, 7, 12]),
)
def test_output_and_gradients_are_the_twins(
    batch: int, tokens: int, num_experts: int, capacity_factor: float, dim: int
) -> None:
    moe = layer(dim=dim, num_experts=num_experts, capacity_factor=min(capacity_factor, num_experts))
    twin = OneHotMoE(copy.deepcopy(moe))
    assert twin.state_dict().keys() == moe.state_dict().keys()
    x, upstream = torch.randn(2, batch, tokens, dim)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = moe(found), twin(wanted)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.backward(upstream)
    torch.testing.assert_close(found.grad, wanted.grad)
    for (name, ours), theirs in zip(moe.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


def by_hand(moe: ExpertChoiceMoE, image: Tensor) -> Tensor:
    """One image, one expert and one token at a time."""
    probabilities = torch.stack([F.softmax(moe.gate.weight @ token, dim=0) for token in image])
    capacity = int(moe.capacity_factor * len(image) / moe.num_experts)
    output = torch.zeros_like(image)
    for expert in range(moe.num_experts):
        best = sorted(range(len(image)), key=lambda i: -probabilities[i, expert].item())[:capacity]
        for i in best:
            output[i] += probabilities[i, expert] * (F.gelu(image[i] @ moe.w1[expert]) @ moe.w2[expert])
    return output


def test_output_is_that_of_a_loop_over_tokens() -> None:
    moe, x = layer(), torch.randn(3, 11, 12)
    with torch.no_grad():
        torch.testing.assert_close(moe(x), torch.stack([by_hand(moe, image) for image in x]))


def test_a_token_that_nobody_took_gets_zero_and_no_gradient() -> None:
    moe, x = layer(capacity_factor=1.0), torch.randn(2, 13, 12, requires_grad=True)
    routing = moe.route(x)
    taken = torch.zeros(2, 13, dtype=torch.bool)
    for image in range(2):
        taken[image, routing.tokens[image].flatten()] = True
    assert not taken.all()
    output = moe(x)
    assert not output[~taken].any() and output[taken].any(dim=1).all()
    output.square().sum().backward()
    assert x.grad is not None and not x.grad[~taken].any() and x.grad[taken].any(dim=1).all()


def test_images_do_not_compete() -> None:
    moe, x = layer(), torch.randn(4, 9, 12)
    torch.testing.assert_close(moe(x), torch.cat([moe(image[None]) for image in x]))


def test_routing_weights_are_the_experts_probabilities() -> None:
    moe, x = layer(), torch.randn(2, 8, 12)
    weights, tokens = moe.route(x)
    probabilities = F.softmax(x @ moe.gate.weight.T, dim=-1)
    assert weights.shape == tokens.shape == (2, 4, 4)
    for image in range(2):
        for expert in range(4):
            chosen = tokens[image, expert]
            assert len(set(chosen.tolist())) == 4
            torch.testing.assert_close(weights[image, expert], probabilities[image, chosen, expert])
            others = [i for i in range(8) if i not in chosen.tolist()]
            assert probabilities[image, others, expert].max() <= weights[image, expert].min()


def test_every_expert_takes_all_tokens_at_the_largest_capacity() -> None:
    moe, x = layer(capacity_factor=4.0), torch.randn(2, 5, 12)
    dense = torch.einsum(
        "bte,bted->btd", moe.gate(x).softmax(-1),
        torch.einsum("bteh,ehd->bted", F.gelu(torch.einsum("btd,edh->bteh", x, moe.w1)), moe.w2),
    )  # fmt: skip
    torch.testing.assert_close(moe(x), dense)


@pytest.mark.parametrize(
    ("tokens", "num_experts", "factor", "capacity"),
    [
        (256, 8, 2.0, 64),
        (64, 8, 2.0, 16),
        (15, 4, 2.0, 7),
        (7, 3, 1.0, 2),
        (7, 2, 1.5, 5),
        (4, 8, 2.0, 1),
        (4, 1, 2.0, 4),
    ],
)
def test_capacity_is_rounded_down(tokens: int, num_experts: int, factor: float, capacity: int) -> None:
    assert expert_capacity(tokens, num_experts, factor) == capacity


def test_an_expert_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="8 experts with capacity factor 2.0 take no token of 3"):
        layer(num_experts=8)(torch.randn(1, 3, 12))


def test_nothing_is_paid_for_moving_tokens() -> None:
    moe, x = layer(), torch.randn(2, 16, 12)
    with FlopCounterMode(display=False) as counter:
        moe(x)
    hidden = moe.w1.shape[2]
    assert counter.get_total_flops() == 2 * 2 * (16 * 12 * 4 + 4 * 8 * 2 * 12 * hidden)
    with FlopCounterMode(display=False) as counter:
        OneHotMoE(moe)(x)
    assert counter.get_total_flops() == 2 * 2 * (16 * 12 * 4 + 4 * 8 * 2 * 12 * (hidden + 16))
