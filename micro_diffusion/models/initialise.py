"""Initial weights (paper, appendix A; `docs/paper.md`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn
from torch.nn.init import normal_, trunc_normal_, xavier_uniform_, zeros_

from micro_diffusion.models.layers import Modulation, SwiGLU
from micro_diffusion.models.moe import ExpertChoiceMoE

if TYPE_CHECKING:
    from micro_diffusion.models.dit import Block, DiT

STD = 0.02


def initialise(dit: DiT) -> None:
    """Give every weight of the model its initial value."""
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            xavier_uniform_(module.weight)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            zeros_(module.bias)
    xavier_uniform_(dit.x_embedder.proj.weight.view(dit.config.dim, -1))
    for perceptron in (dit.t_embedder.mlp, dit.y_embedder, dit.pooled_y_emb_process):
        for module in perceptron.modules():
            if isinstance(module, nn.Linear):
                normal_(module.weight, std=STD)
    for block in dit.patch_mixer:
        _initialise_block(cast("Block", block), STD / (2 * dit.config.depth) ** 0.5)
    for index, block in enumerate(dit.blocks):
        depth = index + 1 if dit.config.depth_init else dit.config.depth
        _initialise_block(cast("Block", block), STD / (2 * depth) ** 0.5)
    refiner = dit.y_emb_preprocess
    for layer in (refiner.attn.proj, refiner.mlp.w3, dit.final_layer.linear):
        zeros_(layer.weight)
    for module in dit.modules():
        if isinstance(module, Modulation):
            zeros_(module.get_parameter("1.weight"))


def _initialise_block(block: Block, output_std: float) -> None:
    """Truncated normal: input-side matrices at 0.02, output-side ones smaller with depth."""
    inputs = [block.attn.qkv.weight, block.cross_attn.q_linear.weight, block.cross_attn.kv_linear.weight]
    outputs = [block.attn.proj.weight, block.cross_attn.proj.weight]
    if isinstance(block.mlp, SwiGLU):
        inputs += [block.mlp.w1.weight]
        outputs += [block.mlp.w2.weight, block.mlp.w3.weight]
    elif isinstance(block.mlp, ExpertChoiceMoE):
        inputs += [block.mlp.gate.weight, block.mlp.w1]
        outputs += [block.mlp.w2]
    for weight in inputs:
        trunc_normal_(weight, std=STD, a=-2.0, b=2.0)
    for weight in outputs:
        trunc_normal_(weight, std=output_std, a=-2.0, b=2.0)
