"""Named model sizes. A new size is a line in `PRESETS`."""

from dataclasses import dataclass
from typing import Literal

from micro_diffusion.models.dit import DiTConfig


def linear_scaling(first: float, last: float, depth: int) -> tuple[float, ...]:
    """Layer-wise scaling: one multiplier a block, linear in depth (paper, section 3.2)."""
    return tuple(first + (last - first) * i / max(depth - 1, 1) for i in range(depth))


@dataclass(frozen=True)
class Preset:
    """A size of the paper's family: attention widths grow from 0.5 to 1 with depth, feed-forward widths from 0.5 to 4.

    Called with what latents and captions decide, it gives the configuration; what is left out is the preset's own.
    """

    about: str
    dim: int
    depth: int
    mixer_dim: int
    mixer_depth: int
    head_dim: int
    patch_size: int
    multiple_of: int
    num_experts: int
    input_size: int = 32
    caption_channels: int = 1024
    text_mask: Literal["none", "padding"] = "none"

    def __call__(
        self, *, input_size: int | tuple[int, int] | None = None, in_channels: int = 4,
        caption_channels: int | None = None, pos_interp_scale: float = 1.0,
        text_mask: Literal["none", "padding"] | None = None,
    ) -> DiTConfig:  # fmt: skip
        return DiTConfig(
            input_size=input_size or self.input_size, patch_size=self.patch_size, in_channels=in_channels,
            dim=self.dim, depth=self.depth, head_dim=self.head_dim, multiple_of=self.multiple_of,
            caption_channels=caption_channels or self.caption_channels, pos_interp_scale=pos_interp_scale,
            qkv_multipliers=linear_scaling(0.5, 1.0, self.depth), ffn_multipliers=linear_scaling(0.5, 4.0, self.depth),
            patch_mixer_depth=self.mixer_depth, patch_mixer_dim=self.mixer_dim, num_experts=self.num_experts,
            text_mask=text_mask or self.text_mask,
        )  # fmt: skip


PRESETS = {
    "MicroDiT_XL_2": Preset(
        "The paper's model: 1,165 M parameters.",
        dim=1024, depth=28, mixer_dim=768, mixer_depth=6, head_dim=64, patch_size=2, multiple_of=256, num_experts=8,
    ),
    "MicroDiT_Tiny_2": Preset(
        "The paper's small model: 201 M parameters.",
        dim=512, depth=16, mixer_dim=512, mixer_depth=4, head_dim=32, patch_size=2, multiple_of=256, num_experts=8,
    ),
    "MicroDiT_Small_2": Preset(
        "About 35 M parameters: the embedded drawings on one GPU, in minutes.",
        dim=320, depth=10, mixer_dim=256, mixer_depth=2, head_dim=32, patch_size=2, multiple_of=64, num_experts=4,
        input_size=16, caption_channels=384, text_mask="padding",
    ),
    "MicroDiT_Mini_2": Preset(
        "About 8 M parameters: fits in a package as float16, and draws in seconds on two CPU cores.",
        dim=192, depth=8, mixer_dim=160, mixer_depth=1, head_dim=32, patch_size=2, multiple_of=32, num_experts=4,
        input_size=16, caption_channels=384, text_mask="padding",
    ),
    "MicroDiT_Nano_4": Preset(
        "About 3 M parameters, patches of 4: two CPU cores, in minutes.",
        dim=160, depth=4, mixer_dim=128, mixer_depth=1, head_dim=32, patch_size=4, multiple_of=32, num_experts=4,
        input_size=16, caption_channels=384, text_mask="padding",
    ),
}  # fmt: skip
