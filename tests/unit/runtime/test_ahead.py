"""Work in threads: in order, ahead, with as many cores as it is given."""

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from micro_diffusion.runtime.ahead import Late, ahead


def test_results_come_in_order_and_an_error_in_its_turn() -> None:
    def fail() -> int:
        raise ValueError("third")

    calls: list[Callable[[], int]] = [lambda: 1, lambda: 2, fail, lambda: 4]
    results = ahead(calls, depth=3, workers=2, name="test")
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(results)


def test_so_many_calls_are_begun_before_they_are_asked_for() -> None:
    begun = list[int]()
    results = ahead((partial(begun.append, number) for number in range(10)), depth=3, name="test")
    next(results)
    results.close()
    assert begun == [0, 1, 2, 3][: len(begun)] and begun


@pytest.mark.parametrize("cores", [1, 2])
def test_torch_has_the_cores_that_it_is_given_there_and_what_it_had_here(cores: int) -> None:
    here = torch.get_num_threads()
    seen = list(ahead([torch.get_num_threads] * 3, depth=2, name="test", cores=cores))
    assert seen == [cores] * 3
    assert torch.get_num_threads() == here


def test_a_late_call_is_told_and_closing_stops_the_others() -> None:
    stop, go_on = threading.Event(), threading.Event()
    results = ahead([lambda: go_on.wait(20)], depth=0, name="test", stop=stop, timeout=0.05)
    began = time.perf_counter()
    with pytest.raises(Late):
        next(results)
    assert stop.is_set() and time.perf_counter() - began < 10
    go_on.set()
