"""How a run is carried out on the machines of the day; nothing here changes what is computed, nor needs torch."""

from dataclasses import dataclass
from typing import Literal

from micro_diffusion.runtime.files import UserError


@dataclass(frozen=True)
class Options:
    """Not part of the recipe: the same run may go on with others."""

    parallel: Literal["auto", "ddp", "fsdp", "hybrid"] = "auto"
    """With several ranks (torchrun): ddp keeps the model whole on each, fsdp shards it over all, hybrid over those of
    one machine; auto is ddp."""
    reshard: bool = False
    """fsdp and hybrid: free a block's whole weights after each use, in place of once a step: slower, less memory."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass: less memory, about a third more work."""
    cuda_graph: bool = False
    """CUDA: replay the whole step as one CUDA graph, communication included, which spares the host its launches; small
    models, and sharded ones, wait for nothing else."""
    micro_batch: int | Literal["auto"] | None = None
    """Images of one forward pass of a rank, in place of the recipe's; auto halves on out-of-memory, and is what CUDA
    does where the recipe says nothing."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Also keep the first checkpoint past every so many images."""
    deadline: float = 60.0
    """Seconds to save after SIGTERM or SIGINT."""
    timeout: float = 600.0
    """Seconds after which a rank or a data loader without a sign of life ends the run."""
    deterministic: bool = False
    """The same bits again on the same GPUs; slower."""

    def __post_init__(self) -> None:
        for name in ("keep", "deadline", "timeout"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} must be positive")


DEFAULTS = Options()
