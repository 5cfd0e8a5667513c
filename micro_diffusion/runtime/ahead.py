"""Work done in threads before its result is asked for."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(
    calls: Iterable[Callable[[], T]], *, depth: int, workers: int = 1, name: str, stop: threading.Event | None = None
) -> Generator[T, None, None]:
    """The calls' results in order, `depth` of them made ahead; an error is raised in its turn.

    Closing the iterator sets `stop`, which tells calls to end early, and waits for those that have begun.
    """
    pending: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    try:
        for call in calls:
            pending.append(pool.submit(call))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        if stop:
            stop.set()
        pool.shutdown(cancel_futures=True)
