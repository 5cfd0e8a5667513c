"""Patches kept and put back; captions dropped."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from micro_diffusion.models.masking import (
    gather_patches,
    kept_patches,
    null_caption,
    random_patch_mask,
    scatter_patches,
)


@given(patches=st.integers(1, 24), kept=st.integers(1, 24), batch=st.integers(1, 3))
def test_the_lowest_noise_is_kept(patches: int, kept: int, batch: int) -> None:
    kept = min(kept, patches)
    ratio = 1 - (kept + 0.5) / patches if kept < patches else 0.0
    noise = torch.rand(batch, patches)
    mask = random_patch_mask(noise, ratio)
    for image in range(batch):
        lowest = sorted(range(patches), key=lambda i: noise[image, i].item())[:kept]
        assert mask.kept[image].tolist() == lowest
        assert [i for i in range(patches) if not mask.dropped[image, i]] == sorted(lowest)


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"), [(256, 0.75, 64), (1024, 0.75, 256), (16, 0.9, 1), (15, 0.5, 7), (9, 0.0, 9)]
)
def test_count_is_rounded_down(patches: int, ratio: float, kept: int) -> None:
    assert kept_patches(patches, ratio) == kept


@pytest.mark.parametrize(("patches", "ratio"), [(16, 0.95), (4, 1.0), (4, -0.5)])
def test_impossible_ratios(patches: int, ratio: float) -> None:
    with pytest.raises(ValueError, match=f"mask_ratio={ratio} keeps"):
        random_patch_mask(torch.rand(1, patches), ratio)


def test_every_patch_is_kept_equally_often() -> None:
    noise = torch.rand(4000, 8, generator=torch.Generator().manual_seed(0))
    shares = (~random_patch_mask(noise, 0.75).dropped).float().mean(0)
    torch.testing.assert_close(shares, torch.full((8,), 0.25), rtol=0, atol=0.03)  # 4 standard deviations


def test_kept_patches_return_to_their_places() -> None:
    x, fill = torch.randn(3, 10, 4), torch.full((1, 1, 4), 7.0)
    mask = random_patch_mask(torch.rand(3, 10), 0.6)
    part = gather_patches(x, mask.kept)
    for image in range(3):
        assert torch.equal(part[image], x[image, mask.kept[image]])
    full = scatter_patches(part, mask.kept, fill, 10)
    assert torch.equal(full, torch.where(mask.dropped[:, :, None], fill, x))


def test_gradients_reach_kept_patches_alone() -> None:
    x = torch.randn(2, 6, 3, requires_grad=True)
    mask = random_patch_mask(torch.rand(2, 6), 0.5)
    weights = torch.randn(2, 6, 3)
    (scatter_patches(gather_patches(x, mask.kept), mask.kept, torch.zeros(1, 1, 3), 6) * weights).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weights.masked_fill(mask.dropped[:, :, None], 0))


def test_dropped_captions_are_zeros_and_one_token() -> None:
    states = torch.randn(3, 4, 5)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [True, False, False, False]])
    dropped = torch.tensor([False, True, False])
    found = null_caption(states, mask, dropped)
    assert found.mask.tolist() == [mask[0].tolist(), [True, False, False, False], mask[2].tolist()]
    assert torch.equal(found.states[[0, 2]], states[[0, 2]]) and not found.states[1].any()
