"""The expert layer as a textbook has it: tokens dispatched and combined with one-hot matrices.

The same mathematics as `micro_diffusion.models.moe`, but moving tokens to experts and back costs matrix products with a
tokens x capacity matrix for each expert. The oracle of the tests, and the baseline of the benchmark.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from micro_diffusion.models.dit import Block, DiT
from micro_diffusion.models.moe import ExpertChoiceMoE


class OneHotMoE(nn.Module):
    """A twin of an expert-choice layer: its parameters, under the same names."""

    def __init__(self, twin: ExpertChoiceMoE) -> None:
        super().__init__()
        self.gate, self.w1, self.w2 = twin.gate, twin.w1, twin.w2
        self.capacity_factor = twin.capacity_factor

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        tokens, experts = x.shape[1], self.w1.shape[0]
        capacity = min(int(self.capacity_factor * tokens / experts), tokens)
        probabilities = self.gate(x).softmax(dim=-1).transpose(1, 2)
        weights, chosen = probabilities.topk(capacity, dim=-1)
        dispatch = F.one_hot(chosen, tokens).to(x.dtype)
        taken = torch.einsum("bekt,btd->bekd", dispatch, x)
        hidden = F.gelu(torch.einsum("bekd,edh->bekh", taken, self.w1))
        output = torch.einsum("bekh,ehd->bekd", hidden, self.w2)
        return torch.einsum("bekt,bekd->btd", dispatch * weights[..., None], output)


def use_one_hot_experts(dit: DiT) -> DiT:
    """Replace every expert-choice layer by its twin, in place; the state dict stays the same."""
    for block in dit.modules():
        if isinstance(block, Block) and isinstance(block.mlp, ExpertChoiceMoE):
            block.mlp = OneHotMoE(block.mlp)
    return dit
