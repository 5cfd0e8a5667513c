"""A whole training step as one CUDA graph: the host starts it, and launches no kernel itself."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
EAGER = 3  # calls before the capture, which needs what they leave: compiled kernels, workspaces, no gradient


class Graphed(Generic[T]):
    """`work`, from its fourth call on replayed as a CUDA graph.

    It takes tensors, which are copied to where the graph reads them, must not wait for the device, and what it returns
    holds until the next call. `draws` are the generators that it draws from.
    """

    def __init__(self, work: Callable[..., T], draws: Sequence[torch.Generator] = ()) -> None:
        # one stream for all calls before the capture: memory is kept by stream
        self.work, self.draws, self.calls, self.side = work, draws, 0, torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> T:
        self.calls += 1
        if self.calls <= EAGER:
            current = torch.cuda.current_stream()
            self.side.wait_stream(current)
            with torch.cuda.stream(self.side):  # as a capture has a stream of its own
                found = self.work(*inputs)
            current.wait_stream(self.side)
            return found
        if self.calls == EAGER + 1:
            self.graph, self.inputs = torch.cuda.CUDAGraph(), [each.clone() for each in inputs]
            for generator in self.draws:
                self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # others load and save meanwhile
                self.found = self.work(*self.inputs)
            del self.work  # nothing of it is needed any more, and what it holds may hold this
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.found
