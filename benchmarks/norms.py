"""Time residual, norm and modulation in one kernel and as the compiler has them.

`python -m benchmarks.norms --out FILE`; see benchmarks/twins.py.
"""

from collections.abc import Sequence

from torch import Tensor

from benchmarks.twins import Maker, Work, main, twins
from micro_diffusion.kernels.add_norm import add_norm

EPS = 1e-6


def cases(make: Maker, images: int, tokens: int, dim: int) -> dict[str, dict[str, Work]]:
    def modulated(x: Tensor, branch: Tensor, cond: Tensor, weight: Tensor) -> Sequence[Tensor]:
        shift, scale, gate = cond.chunk(3, dim=1)
        return add_norm(x, branch, gate, weight, shift, scale, eps=EPS)

    x, branch, weight = make.leaf(images, tokens, dim), make.leaf(images, tokens, dim), make.leaf(dim)
    return {
        "gated, modulated": twins(Work(modulated, [x, branch, make.leaf(images, 3 * dim), weight])),
        "plain": twins(Work(lambda x, b, w: add_norm(x, b, None, w, eps=EPS), [x, branch, weight])),
    }


if __name__ == "__main__":
    main(__doc__, cases)
