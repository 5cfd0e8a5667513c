"""Mixture of experts in which each expert chooses its tokens."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from micro_diffusion.kernels.expert_choice import combine, dispatch, slots_of
from micro_diffusion.models.layers import round_up


class Routing(NamedTuple):
    """Which tokens each expert took, and with what weight."""

    weights: Float[Tensor, "b e k"]
    tokens: Int[Tensor, "b e k"]


def expert_capacity(tokens: int, num_experts: int, capacity_factor: float) -> int:
    """Tokens of an image that each expert takes; raises ValueError when that is none."""
    capacity = int(capacity_factor * tokens / num_experts)
    if capacity < 1:
        raise ValueError(
            f"{num_experts} experts with capacity factor {capacity_factor} take no token of {tokens}: "
            "use fewer experts, a larger capacity factor or a lower mask ratio"
        )
    return min(capacity, tokens)


class ExpertChoiceMoE(nn.Module):
    """Expert-choice feed-forward (arXiv 2202.09368): in each image, every expert takes its best tokens.

    A token's output is the sum over the experts that took it of probability times expert(x); zero if none did. Tokens
    are gathered by index and expert outputs added back by index: no one-hot matrix is ever built.
    """

    def __init__(self, dim: int, ratio: float, multiple_of: int, num_experts: int, capacity_factor: float) -> None:
        super().__init__()
        hidden = round_up(int(dim * ratio), multiple_of)
        self.num_experts, self.capacity_factor = num_experts, capacity_factor
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, dim))

    def route(self, x: Float[Tensor, "b t d"]) -> Routing:
        """Softmax over experts for each token, then each expert's top tokens in each image."""
        probabilities = self.gate(x).float().softmax(dim=-1)
        capacity = expert_capacity(x.shape[1], self.num_experts, self.capacity_factor)
        return Routing(*probabilities.transpose(1, 2).topk(capacity, dim=-1, sorted=False))

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        weights, tokens = self.route(x)
        slots = slots_of(tokens, x.shape[1])
        taken = dispatch(x, tokens, slots)
        hidden = F.gelu(torch.bmm(taken, self.w1.to(taken.dtype)))
        output = torch.bmm(hidden, self.w2.to(hidden.dtype))
        return combine(output, weights, tokens, slots)
