"""Named model sizes. A new size is one function and its line in `PRESETS`."""

from collections.abc import Callable
from typing import Literal

from micro_diffusion.models.dit import DiTConfig


def linear_scaling(first: float, last: float, depth: int) -> tuple[float, ...]:
    """Layer-wise scaling: one multiplier a block, linear in depth (paper, section 3.2)."""
    return tuple(first + (last - first) * i / max(depth - 1, 1) for i in range(depth))


def preset(
    *,
    dim: int,
    depth: int,
    mixer_dim: int,
    mixer_depth: int,
    head_dim: int,
    patch_size: int,
    multiple_of: int,
    num_experts: int,
    input_size: int | tuple[int, int],
    in_channels: int,
    caption_channels: int,
    pos_interp_scale: float,
    text_mask: Literal["none", "padding"],
) -> DiTConfig:
    """The paper's family: attention widths grow from 0.5 to 1, feed-forward widths from 0.5 to 4."""
    return DiTConfig(
        input_size=input_size,
        patch_size=patch_size,
        in_channels=in_channels,
        dim=dim,
        depth=depth,
        head_dim=head_dim,
        multiple_of=multiple_of,
        caption_channels=caption_channels,
        qkv_multipliers=linear_scaling(0.5, 1.0, depth),
        ffn_multipliers=linear_scaling(0.5, 4.0, depth),
        pos_interp_scale=pos_interp_scale,
        patch_mixer_depth=mixer_depth,
        patch_mixer_dim=mixer_dim,
        num_experts=num_experts,
        text_mask=text_mask,
    )


def micro_dit_xl_2(
    *,
    input_size: int | tuple[int, int] = 32,
    in_channels: int = 4,
    caption_channels: int = 1024,
    pos_interp_scale: float = 1.0,
    text_mask: Literal["none", "padding"] = "none",
) -> DiTConfig:
    """The paper's model: 1,165 M parameters."""
    return preset(
        dim=1024,
        depth=28,
        mixer_dim=768,
        mixer_depth=6,
        head_dim=64,
        patch_size=2,
        multiple_of=256,
        num_experts=8,
        input_size=input_size,
        in_channels=in_channels,
        caption_channels=caption_channels,
        pos_interp_scale=pos_interp_scale,
        text_mask=text_mask,
    )


def micro_dit_tiny_2(
    *,
    input_size: int | tuple[int, int] = 32,
    in_channels: int = 4,
    caption_channels: int = 1024,
    pos_interp_scale: float = 1.0,
    text_mask: Literal["none", "padding"] = "none",
) -> DiTConfig:
    """The paper's small model: 201 M parameters."""
    return preset(
        dim=512,
        depth=16,
        mixer_dim=512,
        mixer_depth=4,
        head_dim=32,
        patch_size=2,
        multiple_of=256,
        num_experts=8,
        input_size=input_size,
        in_channels=in_channels,
        caption_channels=caption_channels,
        pos_interp_scale=pos_interp_scale,
        text_mask=text_mask,
    )


def micro_dit_small_2(
    *,
    input_size: int | tuple[int, int] = 16,
    in_channels: int = 4,
    caption_channels: int = 384,
    pos_interp_scale: float = 1.0,
    text_mask: Literal["none", "padding"] = "padding",
) -> DiTConfig:
    """About 35 M parameters: the embedded drawings on one GPU, in minutes."""
    return preset(
        dim=320,
        depth=10,
        mixer_dim=256,
        mixer_depth=2,
        head_dim=32,
        patch_size=2,
        multiple_of=64,
        num_experts=4,
        input_size=input_size,
        in_channels=in_channels,
        caption_channels=caption_channels,
        pos_interp_scale=pos_interp_scale,
        text_mask=text_mask,
    )


def micro_dit_nano_4(
    *,
    input_size: int | tuple[int, int] = 16,
    in_channels: int = 4,
    caption_channels: int = 384,
    pos_interp_scale: float = 1.0,
    text_mask: Literal["none", "padding"] = "padding",
) -> DiTConfig:
    """About 3 M parameters, patches of 4: two CPU cores, in minutes."""
    return preset(
        dim=160,
        depth=4,
        mixer_dim=128,
        mixer_depth=1,
        head_dim=32,
        patch_size=4,
        multiple_of=32,
        num_experts=4,
        input_size=input_size,
        in_channels=in_channels,
        caption_channels=caption_channels,
        pos_interp_scale=pos_interp_scale,
        text_mask=text_mask,
    )


PRESETS: dict[str, Callable[..., DiTConfig]] = {
    "MicroDiT_XL_2": micro_dit_xl_2,
    "MicroDiT_Tiny_2": micro_dit_tiny_2,
    "MicroDiT_Small_2": micro_dit_small_2,
    "MicroDiT_Nano_4": micro_dit_nano_4,
}
