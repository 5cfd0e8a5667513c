import multiprocessing
import time
from dataclasses import replace

import pytest
import torch

from micro_diffusion.data.loader import Batch, Loader
from micro_diffusion.runtime.distributed import Stuck, World
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.feed import Examples, feed

CPU = torch.device("cpu")
DATA = [(0, 16), (32, 48)]  # with a window left out


def batches(loaders: dict[int, Loader], recipe: Recipe, *, workers: int, world: World) -> list[Examples]:
    stage = recipe.stages[0]
    return list(feed(loaders[64], recipe, stage, patches=4, data=DATA, device=CPU, workers=workers, world=world))


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_make_what_a_thread_makes(loaders: dict[int, Loader], recipe: Recipe, rank: int) -> None:
    if rank:  # the shared loader of these tests knows no ranks: cut its batches here
        whole = batches(loaders, recipe, workers=0, world=World())
        alone = [Examples(*(column[4:] for column in each)) for each in whole]
    else:
        alone = batches(loaders, recipe, workers=0, world=World())
    apart = batches(loaders, recipe, workers=2, world=World(rank=rank, size=rank + 1))
    assert len(apart) == 4
    for ours, theirs in zip(apart, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stuck_loader_is_named(
    loaders: dict[int, Loader], recipe: Recipe, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def hang(self: Loader, start: int, count: int) -> Batch:
        time.sleep(3)
        raise AssertionError

    monkeypatch.setattr(type(loaders[64]), "batch", hang)
    with pytest.raises(Stuck, match="the data loader of rank 0 has given nothing for 1 s"):
        batches(loaders, recipe, workers=workers, world=replace(World(), timeout=1.0))


def test_an_error_in_a_process_is_an_error_here(
    loaders: dict[int, Loader], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Loader, start: int, count: int) -> Batch:
        raise OSError("no such disk")

    monkeypatch.setattr(type(loaders[64]), "batch", fail)
    with pytest.raises(OSError, match="no such disk"):
        batches(loaders, recipe, workers=1, world=World())


def test_a_process_outlives_a_signal_to_all_and_not_the_feed(loaders: dict[int, Loader], recipe: Recipe) -> None:
    """As at an interpreter's exit, which ends processes by SIGTERM and waits, even where a traceback keeps the feed."""
    others = multiprocessing.active_children()
    made = feed(loaders[64], recipe, recipe.stages[0], patches=4, data=DATA, device=CPU, workers=1, world=World())
    next(made)
    kept = made.gi_frame.f_locals["made"]  # the loader
    (child,) = set(multiprocessing.active_children()) - set(others)
    child.terminate()
    child.join(0.5)
    assert child.is_alive()
    next(made)
    made.close()
    child.terminate()
    child.join(10)
    assert not child.is_alive()
    del kept
