"""What a model costs: parameters, and FLOPs of a forward pass by the matrices that each token meets."""

import functools
from typing import NamedTuple

import torch
from torch import nn

from micro_diffusion.models.dit import DiT, DiTConfig
from micro_diffusion.models.layers import CrossAttention, Modulation, SelfAttention
from micro_diffusion.models.masking import kept_patches
from micro_diffusion.models.moe import ExpertChoiceMoE, expert_capacity


class Parameters(NamedTuple):
    """How many there are, and how many a token meets on average: of the experts, `expert_capacity` of `num_experts`."""

    total: int
    active: int


@functools.cache
def parameters(config: DiTConfig) -> Parameters:
    """Trainable parameters of a configuration; takes no memory."""
    with torch.device("meta"):
        dit = DiT(config)
    total = sum(weight.numel() for weight in dit.parameters())
    experts = sum(m.w1.numel() + m.w2.numel() for m in dit.modules() if isinstance(m, ExpertChoiceMoE))
    idle = 1 - min(1.0, config.expert_capacity / config.num_experts) if experts else 0.0
    return Parameters(total, total - round(experts * idle))


@functools.cache
def forward_flops(config: DiTConfig, *, mask_ratio: float, text_length: int) -> int:
    """FLOPs of a forward pass for one image: 2 a multiply-add, every matrix product and attention, text included.

    Choosing experts costs the router's product and nothing else. Training costs about three times as much. Raises
    ValueError where the forward pass would: when the mask or an expert leaves no patch.
    """
    with torch.device("meta"):
        dit = DiT(config)
    patches, text = dit.num_patches, text_length
    kept = kept_patches(patches, mask_ratio)
    rows: dict[nn.Module, int] = {dit.t_embedder: 1, dit.pooled_y_emb_process: 1, dit.x_embedder: patches}
    rows |= {dit.y_embedder: text, dit.y_emb_preprocess: text, dit.patch_mixer_map_y: text}
    rows |= {dit.patch_mixer_map_xin: patches, dit.patch_mixer: patches}
    rows |= {dit.patch_mixer_map_xout: kept, dit.blocks: kept, dit.final_layer: kept}
    return sum(_flops(module, tokens, text) for part, tokens in rows.items() for module in part.modules())


def _flops(module: nn.Module, tokens: int, text: int) -> int:
    """Of one module, its children not counted, on so many rows; for the children that see others, the difference."""
    match module:
        case nn.Linear() | nn.Conv2d():
            return 2 * tokens * module.weight.numel()
        case Modulation():
            return 2 * (1 - tokens) * module.get_parameter("1.weight").numel()
        case SelfAttention():  # scores, and their sum of values
            return 2 * 2 * tokens * tokens * module.proj.in_features
        case CrossAttention():
            scores = 2 * 2 * tokens * text * module.proj.in_features
            return scores + 2 * (text - tokens) * module.kv_linear.weight.numel()
        case ExpertChoiceMoE():
            taken = expert_capacity(tokens, module.num_experts, module.capacity_factor)
            return 2 * taken * (module.w1.numel() + module.w2.numel())
    return 0
