"""A whole training step as one CUDA graph: the host starts it, and launches no kernel itself."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from micro_diffusion.runtime.files import UserError

T = TypeVar("T")
EAGER = 3  # calls before the capture, which needs what they leave: compiled kernels, workspaces, no gradient


@contextlib.contextmanager
def beside(side: torch.cuda.Stream) -> Iterator[None]:
    """Launch on another stream, in order with the work of this one."""
    current = torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


class Graphed(Generic[T]):
    """`work`, after `eager` calls replayed as a CUDA graph.

    It takes tensors, which are copied to where the graph reads them, must not wait for the device, and what it returns
    holds until the next call. `draws` are the generators that it draws from. All calls before the capture are on the
    stream `side`, as the capture is. UserError if memory does not suffice for that.
    """

    def __init__(self, work: Callable[..., T], draws: Sequence[torch.Generator] = (), *,
                 eager: int = EAGER, side: torch.cuda.Stream | None = None) -> None:  # fmt: skip
        self.work, self.draws, self.calls, self.eager, self.side = work, draws, 0, eager, side or torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> T:
        self.calls += 1
        if self.calls <= self.eager:
            with beside(self.side):
                return self.work(*inputs)
        if self.calls == self.eager + 1:
            self.graph, self.inputs = torch.cuda.CUDAGraph(), [each.clone() for each in inputs]
            for generator in self.draws:
                self.graph.register_generator_state(generator)
            try:  # others load and save meanwhile
                with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local"):
                    self.found = self.work(*self.inputs)
            except RuntimeError as error:
                if not isinstance(error.__context__ or error, torch.OutOfMemoryError):  # the end of a capture hides it
                    raise
                raise UserError("out of memory for a CUDA graph of a step: set a smaller --micro-batch") from error
            del self.work  # nothing of it is needed any more, and what it holds may hold this
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.found
