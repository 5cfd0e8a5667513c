"""`micro-diffusion ema`: a weight average of any length, chosen after training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Ema:
    """Put an average of any width together from a run's snapshots (docs/training.md)."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """A run trained with ema_sigma_rel and snapshot_every."""
    sigma_rel: float
    """Width of the average, relative to the stage: 0.05 is short, 0.2 is long."""
    out: Path
    """Model folder to write."""

    def __call__(self) -> None:
        from micro_diffusion.training.ema import reconstruct

        missed = reconstruct(self.run, self.out, sigma_rel=self.sigma_rel)
        print(f"{self.out}: the average of width {self.sigma_rel}, its profile met to {1 - missed:.1%}")
