"""Work done in threads before its result is asked for."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")


class Late(Exception):
    """A call took longer than the timeout; its thread may still hang."""


def ahead(calls: Iterable[Callable[[], T]], *, depth: int, workers: int = 1, name: str, cores: int = 1,
          stop: threading.Event | None = None, timeout: float | None = None) -> Generator[T, None, None]:  # fmt: skip
    """The calls' results in order, `depth` of them made ahead; an error is raised in its turn, Late after `timeout` s.

    Closing the iterator sets `stop`, which tells calls to end early, and waits for those that have begun. torch may use
    `cores` of them in a thread. With more than one, OpenMP counts more threads than the machine has, and lets all sleep
    between operations: on two cores a training step then takes a quarter longer.
    """
    pending: deque[Future[T]] = deque()
    pool, alive = ThreadPoolExecutor(workers, name, torch.set_num_threads, (cores,)), True

    def result() -> T:
        nonlocal alive
        first = pending.popleft()
        if not (alive := bool(wait([first], timeout).done)):
            raise Late
        return first.result()

    try:
        for call in calls:
            pending.append(pool.submit(call))
            if len(pending) > depth:
                yield result()
        while pending:
            yield result()
    finally:
        if stop:
            stop.set()
        pool.shutdown(wait=alive, cancel_futures=True)
