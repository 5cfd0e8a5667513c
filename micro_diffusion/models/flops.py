"""What a model costs: FLOPs of a forward pass, in closed form, and parameters."""

from typing import NamedTuple

import torch

from micro_diffusion.models.dit import DiT, DiTConfig
from micro_diffusion.models.layers import NoiseEmbedder, attention_width, swiglu_width
from micro_diffusion.models.masking import kept_patches
from micro_diffusion.models.moe import ExpertChoiceMoE, expert_capacity, expert_width


class Parameters(NamedTuple):
    """How many there are, and how many a token meets on average: of the experts, `expert_capacity` of `num_experts`."""

    total: int
    active: int


def parameters(config: DiTConfig) -> Parameters:
    """Trainable parameters of a configuration; takes no memory."""
    with torch.device("meta"):
        dit = DiT(config)
    total = sum(weight.numel() for weight in dit.parameters())
    experts = sum(m.w1.numel() + m.w2.numel() for m in dit.modules() if isinstance(m, ExpertChoiceMoE))
    idle = 1 - min(1.0, config.expert_capacity / config.num_experts) if experts else 0.0
    return Parameters(total, total - round(experts * idle))


def forward_flops(config: DiTConfig, *, mask_ratio: float, text_length: int) -> int:
    """FLOPs of a forward pass for one image: 2 a multiply-add, every matrix product and attention, text included.

    Choosing experts costs the router's product and nothing else. Training costs about three times as much. Raises
    ValueError where the forward pass would: when the mask or an expert leaves no patch.
    """
    c, dim, patch = config, config.dim, config.patch_size**2 * config.in_channels
    patches, mixer_dim = c.grid[0] * c.grid[1], c.patch_mixer_dim if c.use_patch_mixer else dim
    kept = kept_patches(patches, mask_ratio)
    refiner = _self_attention(text_length, dim, dim) + _swiglu(text_length, dim, 4.0, c)
    text = _linear(text_length, c.caption_channels, dim) + _linear(text_length, dim, dim) + refiner
    condition = 2 * _linear(1, dim, dim) + _linear(1, NoiseEmbedder.WIDTH, dim) + _linear(1, dim, dim)
    ends = _linear(patches, patch, dim) + _linear(1, dim, 2 * dim) + _linear(kept, dim, patch)
    between = _linear(patches + text_length + kept, dim, mixer_dim) if mixer_dim != dim else 0
    mixer = sum(
        _block(c, mixer_dim, patches, text_length, c.patch_mixer_qkv_ratio, c.patch_mixer_mlp_ratio, c.is_expert(i))
        for i in range(c.patch_mixer_depth if c.use_patch_mixer else 0)
    )
    backbone = sum(
        _block(c, dim, kept, text_length, qkv, ffn, c.is_expert(i) and i != c.depth - 1)
        for i, (qkv, ffn) in enumerate(zip(c.qkv_multipliers, c.ffn_multipliers, strict=True))
    )
    return text + condition + ends + between + mixer + backbone


def _block(c: DiTConfig, dim: int, tokens: int, text: int, qkv_ratio: float, ffn_ratio: float, experts: bool) -> int:
    modulation = _linear(1, c.dim, 6 * dim)
    attention = _self_attention(tokens, dim, attention_width(dim, qkv_ratio, c.head_dim))
    cross = 2 * _linear(tokens, dim, dim) + _linear(text, dim, 2 * dim) + _attention(tokens, text, dim)
    if not experts:
        return modulation + attention + cross + _swiglu(tokens, dim, ffn_ratio, c)
    taken = c.num_experts * expert_capacity(tokens, c.num_experts, c.expert_capacity)
    hidden = expert_width(dim, ffn_ratio, c.multiple_of)
    return modulation + attention + cross + _linear(tokens, dim, c.num_experts) + 2 * _linear(taken, dim, hidden)


def _self_attention(tokens: int, dim: int, width: int) -> int:
    return _linear(tokens, dim, 3 * width) + _attention(tokens, tokens, width) + _linear(tokens, width, dim)


def _swiglu(tokens: int, dim: int, ratio: float, c: DiTConfig) -> int:
    return 3 * _linear(tokens, dim, swiglu_width(dim, ratio, c.multiple_of))


def _attention(queries: int, keys: int, width: int) -> int:
    """Scores, and their sum of values."""
    return 2 * 2 * queries * keys * width


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs
