"""Small networks that look at pictures: two judges of single drawings and a detector of scenes (`embedded/judges`).

`scripts/train_judges.py` trains them on real pictures only, and neither is ever a teacher of a generator.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

import micro_diffusion.embedded
from micro_diffusion.runtime.files import UserError

FOLDER = Path(micro_diffusion.embedded.__path__[0], "judges")
STRIDE = 8  # pixels to a cell of the detector
BLOCK = 256  # pictures at once


class Opinion(NamedTuple):
    """What a judge says of pictures."""

    concept: Float[Tensor, "b concepts"]  # logits
    style: Float[Tensor, "b styles"]  # logits
    features: Float[Tensor, "b 128"]  # of which distances between pictures are taken


class Cells(NamedTuple):
    """What the detector says of each cell of 8 x 8 pixels."""

    centre: Float[Tensor, "b h w"]  # logit: an object's centre lies here
    box: Float[Tensor, "b h w 4"]  # from the cell's middle to left, top, right, bottom, in cells
    concept: Float[Tensor, "b h w concepts"]  # logits
    colour: Float[Tensor, "b h w colours"]  # logits; the first is "own", without a tint


class Judge(nn.Module):
    """Concept and style of a drawing on white: what it is at 64 x 64 pixels, and for the style its texture at 128."""

    SIZE = 128

    def __init__(self, concepts: Sequence[str], styles: Sequence[str]) -> None:
        super().__init__()
        self.names = {"concepts": list(concepts), "styles": list(styles)}
        self.trunk = nn.Sequential(
            _layer(3, 32, 4, stride=2), _layer(32, 64, stride=2), _layer(64, 64), _layer(64, 128, stride=2),
            _layer(128, 128), _layer(128, 192, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 128),
        )  # fmt: skip
        self.texture = nn.Sequential(
            _layer(3, 16, 4, stride=2), _layer(16, 32, stride=2), _layer(32, 48, stride=2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.concept = nn.Linear(128, len(concepts))
        self.style = nn.Sequential(nn.Linear(128 + 48, 64), nn.SiLU(), nn.Linear(64, len(styles)))

    def forward(self, pictures: Float[Tensor, "b 3 height width"]) -> Opinion:
        """Takes pictures in [0, 1] of any size."""
        large = _scaled(pictures - 0.5, self.SIZE)
        features = self.trunk(_scaled(large, self.SIZE // 2))
        style = self.style(torch.cat([features, self.texture(large)], 1))
        return Opinion(self.concept(features), style, features)


class Detector(nn.Module):
    """Objects of a scene of 128 x 128 pixels: where their centres lie, their boxes, concepts and tints."""

    SIZE = 128

    def __init__(self, concepts: Sequence[str], colours: Sequence[str], width: int = 96) -> None:
        super().__init__()
        self.names = {"concepts": list(concepts), "colours": list(colours)}
        self.trunk = nn.Sequential(
            _layer(3, 32, 4, stride=2), _layer(32, 64, stride=2), _layer(64, width, stride=2), _layer(width, width),
            *(_layer(width, width, dilation=2**i) for i in (1, 2, 0)),
        )  # fmt: skip
        self.head = nn.Conv2d(width, 1 + 4 + len(concepts) + len(colours), 1)

    def forward(self, pictures: Float[Tensor, "b 3 height width"]) -> Cells:
        """Takes pictures in [0, 1] of any size."""
        out = self.head(self.trunk(_scaled(pictures - 0.5, self.SIZE))).permute(0, 2, 3, 1)
        concepts, colours = map(len, self.names.values())
        centre, box, concept, colour = out.split((1, 4, concepts, colours), -1)
        return Cells(centre[..., 0], F.softplus(box), concept, colour)


def _scaled(pictures: Float[Tensor, "b 3 height width"], size: int) -> Float[Tensor, "b 3 s s"]:
    scaled = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
    return scaled.contiguous(memory_format=torch.channels_last)


def _layer(channels: int, out: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel - 1) // 2
    convolution = nn.Conv2d(channels, out, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.SiLU())


NETWORKS = {"judge": Judge, "second": Judge, "detector": Detector}


@cache
def load_network(name: str, folder: Path = FOLDER) -> nn.Module:
    """One of `NETWORKS`, ready to look: `judge`, `second` (which never saw a held-out drawing) or `detector`."""
    from safetensors import safe_open

    file = folder / f"{name}.safetensors"
    if not file.is_file():
        raise UserError(f"The {name} is not in this package ({file}): scripts/train_judges.py trains it.")
    with safe_open(file, "pt") as content:
        names = json.loads(content.metadata()["names"])
        network: nn.Module = NETWORKS[name](*names.values())
        network.load_state_dict({key: content.get_tensor(key) for key in content.keys()})  # noqa: SIM118
    return network.float().eval().requires_grad_(False)


def to_tensor(pictures: Sequence[Image.Image]) -> Float[Tensor, "b 3 height width"]:
    """Pictures of one size, in [0, 1]."""
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
