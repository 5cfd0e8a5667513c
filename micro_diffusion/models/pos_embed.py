"""Fixed two-dimensional sine-cosine positions."""

import torch
from jaxtyping import Float
from torch import Tensor


def sincos_2d(dim: int, height: int, width: int, *, scale: float = 1.0) -> Float[Tensor, "t dim"]:
    """Position of each patch of a height x width grid, row by row (MAE, arXiv 2111.06377, appendix A).

    The first half of the channels tells the column, the second the row; coordinates are divided by `scale`, so that a
    grid twice as fine (`scale=2`) spans the coordinates of the coarse one. `dim` must be divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"positions need a width divisible by 4, not {dim}")
    sides = (torch.arange(side, dtype=torch.float64) / scale for side in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.cat([_sincos(dim // 2, columns.flatten()), _sincos(dim // 2, rows.flatten())], dim=1).float()


def _sincos(dim: int, positions: Float[Tensor, " t"]) -> Float[Tensor, "t dim"]:
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
