"""Random draws that depend on seed, purpose and position only, never on batches, ranks or what was drawn before."""

import hashlib
import json
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 64  # positions that share a generator


def derive_seed(seed: int, *parts: str | int) -> int:
    """A seed of 63 bits from another one and any names and numbers: same parts, same seed, on every machine."""
    # JSON keeps 1 from "1" and ("ab", "c") from ("a", "bc")
    text = json.dumps([seed, *parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def draw_normal(
    seed: int, purpose: str, positions: Int[Tensor, " b"], shape: tuple[int, ...] = ()
) -> Float[Tensor, "b *shape"]:
    """Standard normal float32 draws, one of the given shape for each position; on the CPU, the same everywhere."""
    return _draw(np.random.Generator.standard_normal, seed, purpose, positions, shape)


def draw_uniform(
    seed: int, purpose: str, positions: Int[Tensor, " b"], shape: tuple[int, ...] = ()
) -> Float[Tensor, "b *shape"]:
    """Like `draw_normal`, but uniform in [0, 1)."""
    return _draw(np.random.Generator.random, seed, purpose, positions, shape)


def _draw(
    fill: Callable[..., np.ndarray], seed: int, purpose: str, positions: Int[Tensor, " b"], shape: tuple[int, ...]
) -> Float[Tensor, "b *shape"]:
    draws = torch.empty(len(positions), *shape)
    order = positions.argsort()
    blocks, counts = torch.unique_consecutive(positions[order] // BLOCK, return_counts=True)
    for block, rows in zip(blocks.tolist(), order.split(counts.tolist()), strict=True):
        # Philox takes the whole key; torch's CPU generator keeps 32 bits of it, which a long run would repeat
        source = np.random.Generator(np.random.Philox(key=derive_seed(seed, purpose, block)))
        draws[rows] = torch.from_numpy(fill(source, (BLOCK, *shape), np.float32))[positions[rows] % BLOCK]
    return draws
