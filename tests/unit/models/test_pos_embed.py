"""Positions against their closed form."""

import math

import pytest
import torch

from micro_diffusion.models.pos_embed import sincos_2d


@pytest.mark.parametrize(("dim", "height", "width", "scale"), [(8, 3, 3, 1.0), (16, 2, 5, 2.0), (4, 4, 1, 0.5)])
def test_every_number(dim: int, height: int, width: int, scale: float) -> None:
    """The column's sines, its cosines, the row's sines, its cosines; frequencies 10000^(-k / (dim/4))."""
    found = sincos_2d(dim, height, width, scale=scale)
    quarter = dim // 4
    wanted = [
        [
            wave(position / scale * 10000 ** (-k / quarter))
            for position in (patch % width, patch // width)
            for wave in (math.sin, math.cos)
            for k in range(quarter)
        ]
        for patch in range(height * width)
    ]
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.tensor(wanted, dtype=torch.float64).float())  # rounded once, from float64


def test_a_finer_grid_spans_the_coordinates_of_the_coarse_one() -> None:
    coarse = sincos_2d(16, 3, 4).unflatten(0, (3, 4))
    fine = sincos_2d(16, 6, 8, scale=2.0).unflatten(0, (6, 8))
    torch.testing.assert_close(fine[::2, ::2], coarse, rtol=0, atol=0)


def test_positions_differ() -> None:
    table = sincos_2d(32, 5, 7)
    assert (torch.cdist(table, table) + 9 * torch.eye(35)).min() > 0.1


def test_width_must_hold_four_waves() -> None:
    with pytest.raises(ValueError, match="divisible by 4, not 18"):
        sincos_2d(18, 2, 2)
