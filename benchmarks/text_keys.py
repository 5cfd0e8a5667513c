"""Time keys and values of the text, layer by layer and all layers at once: `python -m benchmarks.text_keys --out FILE`.

MicroDiT_XL_2 has 28 cross-attentions in its backbone, each with a linear map of the same text tokens. One matrix for
all of them is one product instead of 28, and holds all keys and values at the same time. See benchmarks/twins.py; the
number of patches does not matter here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.twins import Maker, Work, main

TEXT_LENGTH, LAYERS = 77, 28


def cases(make: Maker, images: int, tokens: int, dim: int) -> dict[str, dict[str, Work]]:
    text, weights = make.leaf(images, TEXT_LENGTH, dim), [make.leaf(2 * dim, dim) for _ in range(LAYERS)]
    together = torch.cat([weight.detach() for weight in weights]).requires_grad_()

    def by_layer(text: Tensor, *weights: Tensor) -> Sequence[Tensor]:
        return [torch.nn.functional.linear(text, weight) for weight in weights]

    def at_once(text: Tensor, weight: Tensor) -> Sequence[Tensor]:
        return torch.nn.functional.linear(text, weight).chunk(LAYERS, dim=-1)

    return {"text keys": {"by layer": Work(by_layer, [text, *weights]), "at once": Work(at_once, [text, together])}}


if __name__ == "__main__":
    main(__doc__, cases)
