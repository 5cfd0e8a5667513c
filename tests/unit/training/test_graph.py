import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from micro_diffusion.runtime.files import UserError
from micro_diffusion.training.graph import Graphed

Calls = list[str]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What is asked of stand-ins for the streams and graphs of CUDA."""
    told: Calls = []

    @contextlib.contextmanager
    def capture(graph: Any, **settings: Any) -> Iterator[None]:
        told.append("capture")
        try:
            yield
        except RuntimeError:
            raise RuntimeError("the capture was not joined")  # noqa: B904 (as torch does)

    stream = Mock(spec=torch.cuda.Stream, wait_stream=lambda other: told.append("wait"))
    for name, stands_in in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": contextlib.nullcontext, "graph": capture,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: told.append("replay")),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stands_in)
    return told


def test_launched_then_captured_then_replayed_from_where_the_graph_reads(calls: Calls) -> None:
    seen: list[Tensor] = []
    graphed = Graphed(lambda x: seen.append(x) or len(seen), eager=2)  # type: ignore[func-returns-value]
    found = [graphed(torch.full((), float(number))) for number in range(5)]
    assert found == [1, 2, 3, 3, 3]
    assert calls == ["wait"] * 4 + ["capture"] + ["replay"] * 3
    assert seen[2].item() == 4.0  # the last input lies where the captured step reads


def test_too_little_memory_is_one_sentence_and_other_errors_stay(calls: Calls) -> None:
    def work(error: RuntimeError) -> Graphed[None]:
        def fail(x: Tensor) -> None:
            raise error

        return Graphed(fail, eager=0)

    with pytest.raises(UserError, match="out of memory for a CUDA graph.*--micro-batch"):
        work(torch.OutOfMemoryError("CUDA out of memory"))(torch.zeros(()))
    with pytest.raises(RuntimeError, match="not joined"):
        work(RuntimeError("a shape does not fit"))(torch.zeros(()))
