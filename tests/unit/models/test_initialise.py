"""Initial values of every weight, as `docs/paper.md` has them."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from micro_diffusion.models.dit import DiT
from micro_diffusion.models.presets import PRESETS

CONFIG = replace(
    PRESETS["MicroDiT_Nano_4"](caption_channels=96), dim=128, patch_mixer_dim=96, patch_mixer_depth=2, use_bias=True
)
INPUT = r"(attn\.qkv|cross_attn\.(q_linear|kv_linear)|mlp\.gate)\.weight|mlp\.w1(\.weight)?"
OUTPUT = r"(attn|cross_attn)\.proj\.weight|mlp\.(w2|w3)(\.weight)?"


def wanted_std(name: str, weight: Tensor) -> float | str:
    """Standard deviation of a normal weight, or "zero", "one" or "xavier"."""
    if name.endswith(".bias") or re.search(r"adaLN_modulation|final_layer\.linear", name):
        return "zero"
    if weight.ndim == 1:
        return "one"  # of a norm
    if re.match(r"(t_embedder|y_embedder|pooled_y_emb_process)\.", name):
        return 0.02
    if re.fullmatch(r"y_emb_preprocess\.(attn\.proj|mlp\.w3)\.weight", name):
        return "zero"
    if found := re.fullmatch(rf"(blocks|patch_mixer)\.(\d+)\.(({INPUT})|({OUTPUT}))", name):
        if re.fullmatch(INPUT, found[3]):
            return 0.02
        depth = int(found[2]) + 1 if found[1] == "blocks" else CONFIG.depth
        return 0.02 / (2 * depth) ** 0.5
    return "xavier"


@pytest.fixture(scope="module")
def dit() -> DiT:
    torch.manual_seed(0)
    return DiT(CONFIG)


def test_every_weight(dit: DiT) -> None:
    xavier = []
    for name, weight in dit.named_parameters():
        wanted = wanted_std(name, weight)
        if wanted == "zero":
            assert not weight.any(), name
        elif wanted == "one":
            assert (weight == 1).all(), name
        elif wanted == "xavier":
            xavier.append(name)
            fans = weight[0].numel() + len(weight)
            assert weight.abs().max() <= (6 / fans) ** 0.5, name
            assert weight.std().item() == pytest.approx((2 / fans) ** 0.5, rel=5 / weight.numel() ** 0.5), name
        else:
            assert isinstance(wanted, float)
            spread = weight.numel() ** 0.5
            assert abs(weight.mean().item()) < 5 * wanted / spread, name
            assert weight.std().item() == pytest.approx(wanted, rel=5 / spread), name
            assert weight.abs().max() > 2.3 * wanted, name  # a normal's tails
    assert set(xavier) == {
        "x_embedder.proj.weight", "y_emb_preprocess.attn.qkv.weight", "y_emb_preprocess.mlp.w1.weight",
        "y_emb_preprocess.mlp.w2.weight", "patch_mixer_map_xin.1.weight", "patch_mixer_map_xout.1.weight",
        "patch_mixer_map_y.1.weight",
    }  # fmt: skip


def test_outputs_can_start_alike_in_all_blocks() -> None:
    torch.manual_seed(0)
    dit = DiT(replace(CONFIG, depth_init=False))
    stds = [block.attn.proj.weight.std().item() for block in dit.blocks]
    assert stds == pytest.approx([0.02 / (2 * CONFIG.depth) ** 0.5] * CONFIG.depth, rel=0.05)


def test_a_new_model_answers_zero_whatever_it_is_asked(dit: DiT) -> None:
    sample, _ = dit(torch.randn(2, 4, 16, 16), torch.randn(2), torch.randn(2, 3, 96))
    assert not sample.any()
