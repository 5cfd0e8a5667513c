"""Which patches stay, and which captions are dropped."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class PatchMask(NamedTuple):
    """The patches that the backbone sees."""

    kept: Int[Tensor, "b k"]
    dropped: Bool[Tensor, "b t"]


def kept_patches(patches: int, mask_ratio: float) -> int:
    """Patches of an image that are not dropped; raises ValueError when that is none."""
    keep = int(patches * (1 - mask_ratio))
    if not 1 <= keep <= patches:
        raise ValueError(f"mask_ratio={mask_ratio} keeps {keep} of {patches} patches")
    return keep


def random_patch_mask(noise: Float[Tensor, "b t"], mask_ratio: float) -> PatchMask:
    """Keep the `kept_patches` patches of each image with the lowest noise (paper, section 3.1)."""
    kept = noise.argsort(dim=1)[:, : kept_patches(noise.shape[1], mask_ratio)]
    dropped = torch.ones_like(noise, dtype=torch.bool).scatter(1, kept, False)
    return PatchMask(kept, dropped)


def gather_patches(x: Float[Tensor, "b t d"], kept: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """The kept patches of each image."""
    return x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))


def scatter_patches(
    x: Float[Tensor, "b k d"], kept: Int[Tensor, "b k"], fill: Float[Tensor, "1 1 d"], patches: int
) -> Float[Tensor, "b t d"]:
    """Put kept patches back in their places; `fill` stands in the others."""
    full = fill.to(x.dtype).expand(x.shape[0], patches, -1)
    return full.scatter(1, kept[:, :, None].expand_as(x), x)


class TextFeatures(NamedTuple):
    """States of a text encoder, zero where padded; the mask is True on tokens."""

    states: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]


def null_caption(
    states: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"], dropped: Bool[Tensor, " b"]
) -> TextFeatures:
    """Replace the captions where `dropped` by the null caption: zeros, of which a single one is a token."""
    single = torch.zeros_like(mask)
    single[:, 0] = True
    return TextFeatures(states.masked_fill(dropped[:, None, None], 0.0), torch.where(dropped[:, None], single, mask))
