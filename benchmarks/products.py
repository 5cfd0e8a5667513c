"""Which matrix products a model's forward pass has, and which of them to measure for all."""

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.step import TEXT_LENGTH, TEXT_WIDTH
from micro_diffusion.kernels.launch import plain
from micro_diffusion.models.dit import DiT, conditioned
from micro_diffusion.models.moe import ExpertChoiceMoE, expert_capacity
from micro_diffusion.models.presets import PRESETS

LATENT_SIZE, MASK_RATIO = 32, 0.75
REACH = 0.7  # sum of the logarithms of the dimensions' ratios, up to which two shapes share a measurement


class Shape(NamedTuple):
    """Of a product: (experts, rows, fan_in) times (experts, fan_in, fan_out)."""

    experts: int
    rows: int
    fan_in: int
    fan_out: int

    @property
    def macs(self) -> int:
        """Multiply-adds, half the FLOPs."""
        return math.prod(self)


def layers(preset: str, images: int) -> Counter[Shape]:
    """The products of a forward pass, and how many there are of each."""
    found = Counter[Shape]()

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if isinstance(module, nn.Linear):
            found[Shape(1, inputs[0].shape[:-1].numel(), module.in_features, module.out_features)] += 1
        elif isinstance(module, ExpertChoiceMoE):
            capacity = expert_capacity(inputs[0].shape[1], module.num_experts, module.capacity_factor)
            found.update(Shape(len(w), images * capacity, *w.shape[1:]) for w in (module.w1, module.w2))

    with torch.device("meta"), plain(), torch.no_grad():
        dit = DiT(PRESETS[preset](input_size=LATENT_SIZE, caption_channels=TEXT_WIDTH, text_mask="none"))
        for module in dit.modules():
            module.register_forward_pre_hook(note)
        network = conditioned(dit, torch.randn(images, TEXT_LENGTH, TEXT_WIDTH), precision="float32",
                              mask_ratio=MASK_RATIO, mask_noise=torch.rand(images, dit.num_patches))  # fmt: skip
        network(torch.randn(images, dit.config.in_channels, *dit.config.latent_size), torch.rand(images))
    return found


def representatives(counts: Counter[Shape]) -> dict[Shape, float]:
    """The shapes to measure, those with most FLOPs first, and for how many of itself each stands."""
    copies: dict[Shape, float] = {}
    for shape in sorted(counts, key=lambda one: -counts[one] * one.macs):
        far = {one: sum(abs(math.log(a / b)) for a, b in zip(one, shape, strict=True))
               for one in copies if one.experts == shape.experts}  # fmt: skip
        chosen = min(far, key=far.__getitem__) if far and min(far.values()) <= REACH else shape
        copies[chosen] = copies.get(chosen, 0) + counts[shape] * shape.macs / chosen.macs
    return copies
