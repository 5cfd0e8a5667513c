"""FLOPs against torch's own counter and the paper; parameters against the paper."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from micro_diffusion.models.dit import DiT, DiTConfig
from micro_diffusion.models.flops import forward_flops, parameters
from micro_diffusion.models.layers import Modulation
from micro_diffusion.models.moe import ExpertChoiceMoE
from micro_diffusion.models.presets import PRESETS

SMALL = replace(
    PRESETS["MicroDiT_Nano_4"](input_size=(8, 12), caption_channels=24, text_mask="padding"),
    patch_size=2, dim=64, depth=4, head_dim=16, patch_mixer_dim=48, patch_mixer_depth=2,
)  # fmt: skip


def counted(config: DiTConfig, *, mask_ratio: float, text_length: int) -> int:
    """What torch counts in the operators of a forward pass of two images, without arithmetic, for one of them."""
    mask = torch.ones(2, text_length, dtype=torch.bool, device="meta")
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        DiT(config)(
            torch.zeros(2, config.in_channels, *config.latent_size),
            torch.zeros(2),
            torch.zeros(2, text_length, config.caption_channels),
            text_mask=mask,
            mask_ratio=mask_ratio,
        )
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_patch_mixer": False},
        {"patch_mixer_dim": 64, "patch_mixer_qkv_ratio": 0.6},
        {"num_experts": 0},
        {"num_experts": 3, "expert_capacity": 1.1, "experts_every_n": 1},
        {"expert_capacity": 9.0},
        {"text_mask": "none", "use_bias": True},
        {"input_size": 16, "in_channels": 5, "patch_size": 4},
    ],
)
@pytest.mark.parametrize(("mask_ratio", "text_length"), [(0.0, 5), (0.75, 5), (0.4, 1)])
def test_flops_are_torchs(changes: dict[str, object], mask_ratio: float, text_length: int) -> None:
    config = replace(SMALL, **changes)  # type: ignore[arg-type]
    wanted = counted(config, mask_ratio=mask_ratio, text_length=text_length)
    assert forward_flops(config, mask_ratio=mask_ratio, text_length=text_length) == wanted


@pytest.mark.parametrize(
    ("size", "mask_ratio", "giga"), [(32, 0.75, 94), (32, 0.0, 238), (64, 0.75, 356), (64, 0.0, 1001)]
)
def test_the_papers_four_stages(size: int, mask_ratio: float, giga: int) -> None:
    config = PRESETS["MicroDiT_XL_2"](input_size=size)
    flops = forward_flops(config, mask_ratio=mask_ratio, text_length=77)
    assert flops == counted(config, mask_ratio=mask_ratio, text_length=77)
    assert round(flops / 1e9) == giga


def test_what_cannot_run_has_no_cost() -> None:
    with pytest.raises(ValueError, match="take no token of 1"):
        forward_flops(SMALL, mask_ratio=0.95, text_length=5)
    with pytest.raises(ValueError, match="keeps 0 of 24 patches"):
        forward_flops(SMALL, mask_ratio=0.99, text_length=5)


def test_parameters_of_the_papers_models() -> None:
    total, active = parameters(PRESETS["MicroDiT_XL_2"]())
    assert total / 1e6 == pytest.approx(1165.4, abs=0.05) and active / 1e6 == pytest.approx(712, abs=1)
    assert parameters(PRESETS["MicroDiT_Tiny_2"]()).total / 1e6 == pytest.approx(201, abs=0.5)


def test_where_the_papers_parameters_are() -> None:
    with torch.device("meta"):
        dit = DiT(PRESETS["MicroDiT_XL_2"]())
    kinds = {"experts": ExpertChoiceMoE, "modulation": Modulation}
    counts = {
        name: sum(w.numel() for m in dit.modules() if isinstance(m, kind) for w in m.parameters())
        for name, kind in kinds.items()
    }
    mixer = [dit.patch_mixer, dit.patch_mixer_map_xin, dit.patch_mixer_map_xout, dit.patch_mixer_map_y]
    counts["mixer"] = sum(w.numel() for m in mixer for w in m.parameters())
    assert {name: round(count / 1e6) for name, count in counts.items()} == {
        "experts": 604, "modulation": 207, "mixer": 186,
    }  # fmt: skip


def test_active_parameters() -> None:
    with torch.device("meta"):
        dit = DiT(SMALL)
    experts = sum(m.w1.numel() + m.w2.numel() for m in dit.modules() if isinstance(m, ExpertChoiceMoE))
    total, active = parameters(SMALL)
    assert total == sum(weight.numel() for weight in dit.parameters())
    assert total - active == experts / 2  # four experts at a capacity factor of two
    for changes in ({"num_experts": 0}, {"expert_capacity": 5.0}):
        assert len(set(parameters(replace(SMALL, **changes)))) == 1  # type: ignore[arg-type]
