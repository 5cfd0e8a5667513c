"""Time the experts by their kernels, by index and with one-hot matrices: `python -m benchmarks.moe --out FILE`.

`move` takes tokens to the experts and back and leaves out what the experts do; `layer` is all of it, with the router,
at the middle width of MicroDiT_XL_2's layers. Weights are kept in bf16 here, so that no cast is timed. See
benchmarks/twins.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.one_hot import OneHotMoE
from benchmarks.twins import Maker, Work, main, twins
from micro_diffusion.kernels.expert_choice import combine, dispatch, slots_of
from micro_diffusion.models.moe import ExpertChoiceMoE

EXPERTS, CAPACITY, RATIO, MULTIPLE = 8, 2.0, 2.25, 256


def cases(make: Maker, images: int, tokens: int, dim: int) -> dict[str, dict[str, Work]]:
    taken = int(CAPACITY * tokens / EXPERTS)
    chosen = torch.rand(images, EXPERTS, tokens, device=make.device).argsort()[:, :, :taken]

    def move(x: Tensor, weights: Tensor) -> Sequence[Tensor]:
        slots = slots_of(chosen, tokens)
        return [combine(dispatch(x, chosen, slots), weights, chosen, slots)]

    def one_hot_move(x: Tensor, weights: Tensor) -> Sequence[Tensor]:
        matrix = torch.nn.functional.one_hot(chosen, tokens).to(x.dtype)
        moved = torch.einsum("bekt,btd->bekd", matrix, x)
        return [torch.einsum("bekt,bekd->btd", matrix * weights[..., None], moved)]

    layer = ExpertChoiceMoE(dim, RATIO, MULTIPLE, EXPERTS, CAPACITY).to(make.device, make.dtype)
    for parameter in (layer.w1, layer.w2):
        torch.nn.init.normal_(parameter, std=0.02)
    one_hot = OneHotMoE(layer)
    x, weights = make.leaf(images, tokens, dim), make.leaf(images, EXPERTS, taken)
    moving = twins(Work(move, [x, weights]))
    layers = twins(Work(lambda x: [layer(x)], [x], layer))
    return {
        "move": moving | {"one-hot": Work(one_hot_move, [x, weights])},
        "layer": layers | {"one-hot": Work(lambda x: [one_hot(x)], [x], one_hot)},
    }


if __name__ == "__main__":
    main(__doc__, cases)
