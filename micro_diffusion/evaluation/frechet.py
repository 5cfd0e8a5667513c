"""Statistics of features, and how far two sets of them are apart."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from micro_diffusion.models.pretrained import first_line
from micro_diffusion.runtime.files import atomic_file, user_error


@dataclass
class Moments:
    """Count, mean (d,) and scatter (d, d) of features that come in batches, in float64; Chan, Golub, LeVeque 1983."""

    made: dict[str, str] = field(default_factory=dict)  # what made the features
    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    scatter: Tensor = field(default_factory=lambda: torch.zeros(()))
    features: Tensor = field(default_factory=lambda: torch.zeros(0))  # (n, d); filled only by who wants to keep them

    def update(self, features: Float[Tensor, "b d"]) -> "Moments":
        """Take a batch in and return itself."""
        batch, total = features.cpu().double(), self.count + len(features)
        shift, centred = batch.mean(0) - self.mean, batch - batch.mean(0)
        between = torch.outer(shift, shift) * (self.count * len(batch) / total)
        self.scatter = self.scatter + centred.T @ centred + between
        self.mean, self.count = self.mean + shift * (len(batch) / total), total
        return self

    def save(self, path: Path) -> None:
        """Write reference statistics as safetensors; what made them is the metadata."""
        with atomic_file(path) as file:
            made = self.made | {"count": str(self.count)}
            save_file({"mean": self.mean, "scatter": self.scatter}, file, metadata=made)

    @classmethod
    def load(cls, path: Path) -> "Moments":
        """What `save` wrote; UserError for anything else."""
        message = f"{path} is no folder and no reference statistics ({{}})."
        kinds = OSError, SafetensorError, KeyError, TypeError  # no metadata is a TypeError
        with user_error(message, *kinds, told=first_line), safe_open(path, "pt") as file:
            made = dict(file.metadata())
            return cls(made, int(made.pop("count")), file.get_tensor("mean"), file.get_tensor("scatter"))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A^(1/2) B A^(1/2))^(1/2)), of two features or more each.

    The last trace is that of Heusel et al.'s (A B)^(1/2), from a symmetric matrix: its eigenvalues stay real.
    """
    first, second = a.scatter / (a.count - 1), b.scatter / (b.count - 1)
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * cross)


def rbf_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], *, sigma: float = 10.0) -> float:
    """MMD^2 with the kernel exp(-|x - y|^2 / (2 sigma^2)), the biased estimate (Gretton et al. 2012, equation 5)."""

    def mean(x: Tensor, y: Tensor) -> float:
        rows = (torch.cdist(part, y).square().div(-2 * sigma**2).exp().sum() for part in x.split(512))
        return float(sum(rows)) / (len(x) * len(y))

    a, b = a.double(), b.double()  # means near one, and nearly the same
    return mean(a, a) + mean(b, b) - 2 * mean(a, b)
