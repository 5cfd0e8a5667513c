"""How a kernel is reached: by Triton on a GPU, or by Triton's interpreter, which the tests switch on."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.runtime.jit import JITFunction
except ImportError:  # no Triton for this system: the plain twins serve
    triton = tl = None

_plain = False
INTERPRETED = False  # tests set it, with TRITON_INTERPRET=1, to run kernels on the CPU, slowly


def usable(x: Tensor) -> bool:
    """Whether kernels can work on this tensor; where not, the plain twin does."""
    return not _plain and triton is not None and (x.is_cuda or INTERPRETED)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside, every kernel's plain twin serves: for comparison."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def launcher(kernel: Any) -> Any:
    """The kernel in a form that torch.compile sees through."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def either(x: Tensor | None, other: Tensor) -> Tensor:
    """x, or something to point at where a kernel does not look."""
    return other if x is None else x
