"""Named sizes."""

from dataclasses import replace

import pytest
import torch

from micro_diffusion.models.dit import DiT
from micro_diffusion.models.flops import parameters
from micro_diffusion.models.presets import PRESETS, linear_scaling

MILLIONS = {
    "MicroDiT_XL_2": 1165.4, "MicroDiT_Tiny_2": 201, "MicroDiT_Small_2": 35, "MicroDiT_Mini_2": 8, "MicroDiT_Nano_4": 3,
}  # fmt: skip


def test_linear_scaling() -> None:
    assert linear_scaling(0.5, 4.0, 8) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0])
    assert linear_scaling(0.5, 1.0, 1) == (0.5,)


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_are_as_described(name: str) -> None:
    assert MILLIONS.keys() == PRESETS.keys()
    assert parameters(PRESETS[name]()).total / 1e6 == pytest.approx(MILLIONS[name], rel=0.15)
    assert f"{MILLIONS[name]:,.0f} M" in PRESETS[name].about


def test_the_papers_models() -> None:
    xl, tiny = PRESETS["MicroDiT_XL_2"](), PRESETS["MicroDiT_Tiny_2"]()
    assert (xl.dim, xl.depth, xl.head_dim, xl.patch_mixer_dim, xl.patch_mixer_depth) == (1024, 28, 64, 768, 6)
    assert (tiny.dim, tiny.depth, tiny.head_dim, tiny.patch_mixer_dim, tiny.patch_mixer_depth) == (512, 16, 32, 512, 4)
    for config in (xl, tiny):
        assert (config.patch_size, config.multiple_of, config.num_experts, config.expert_capacity) == (2, 256, 8, 2.0)
        assert (config.qkv_multipliers[0], config.qkv_multipliers[-1]) == (0.5, 1.0)
        assert (config.ffn_multipliers[0], config.ffn_multipliers[-1]) == (0.5, 4.0)
        assert (config.input_size, config.caption_channels, config.text_mask) == (32, 1024, "none")


@pytest.mark.parametrize("name", PRESETS)
def test_choices_are_passed_on(name: str) -> None:
    choices = {
        "input_size": (8, 16), "in_channels": 5, "caption_channels": 6, "pos_interp_scale": 2.0, "text_mask": "none",
    }  # fmt: skip
    config = PRESETS[name](**choices)
    assert replace(PRESETS[name](), **choices) == config  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRESETS)
def test_it_runs(name: str) -> None:
    with torch.device("meta"):
        dit = DiT(PRESETS[name](input_size=(16, 32), in_channels=3, caption_channels=6))
        sample, dropped = dit(torch.zeros(2, 3, 16, 32), torch.zeros(2), torch.zeros(2, 5, 6), mask_ratio=0.75)
    assert sample.shape == (2, 3, 16, 32) and dropped is not None
