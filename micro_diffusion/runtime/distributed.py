"""The ranks of a run, which torchrun starts, and what they agree on. Without torchrun nothing is initialised."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


class Stuck(Exception):
    """A rank or the data loader gave no sign of life; threads may hang, so whoever catches this ends by `os._exit`."""


@dataclass(frozen=True)
class World:
    """This process among all of them. The two groups of gloo are for the main thread and for the one that saves."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    timeout: float = 600.0
    control: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None

    def agree(self, value: int = 0) -> int:
        """The largest of the ranks' values; Stuck names those that do not come here. The device goes on working."""
        if self.control is None:
            return value
        agreed = torch.tensor(value)
        try:
            dist.monitored_barrier(self.control, timedelta(seconds=self.timeout), wait_all_ranks=True)
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.control)
        except RuntimeError as error:
            raise Stuck(f"a rank is stuck or dead (seen from rank {self.rank}): {error}") from error
        return int(agreed)

    def mean(self, value: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The mean over the ranks, on the device, which the host does not wait for."""
        if self.control is None:
            return value
        total = value / self.size
        dist.all_reduce(total)  # gloo has no mean
        return total


ALONE = World()


@contextlib.contextmanager
def join(device: str, *, timeout: float) -> Iterator[World]:
    """Join the ranks that torchrun started; they wait `timeout` seconds for each other.

    Each has a GPU if `device` is "auto" or "cuda" and there are any.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(timeout=timeout)
        return
    if cuda := device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    patience = timedelta(seconds=timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)
    groups = [cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=patience)) for _ in range(2)]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    yield World(dist.get_rank(), dist.get_world_size(), local, timeout, *groups)
    dist.destroy_process_group()  # not after an error: it may wait for a rank that is gone
