"""Time and memory of training, from FLOPs and a speed that was measured here or on an H100."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from micro_diffusion.models.dit import DiT, DiTConfig
from micro_diffusion.models.flops import forward_flops, parameters
from micro_diffusion.models.masking import kept_patches
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.hardware import Gpu

OPTIMIZER_BYTES = 32  # a parameter: the norm reads its gradient; AdamW reads four float32 numbers and writes three
# From benchmarks/results/step-h200.json (XL, 256 and 512 px, bf16, compiled, torch 2.11, November 2026):
UTILISATION = {True: 0.408, False: 0.380}  # of the peak by forward and backward, with patches masked and without
# Bytes that compiled bf16 holds for the backward, of what eager float32 does (attention's scores apart):
COMPILED = 0.452
RESERVE = 0.1  # of the GPU's memory: the allocator, NCCL, what is alive for a moment only


class Work(NamedTuple):
    """A stage as the planner sees it; `spans` are (images, mask ratio), and the model has the stage's resolution."""

    name: str
    model: DiTConfig
    spans: tuple[tuple[int, float], ...]
    batch_size: int
    text_length: int
    precision: str
    compiled: bool
    averages: int = 0

    def flops(self, mask_ratio: float) -> int:
        """Of training on one image: three times a forward pass."""
        return 3 * forward_flops(self.model, mask_ratio=mask_ratio, text_length=self.text_length)

    def kind(self, mask_ratio: float) -> str:
        """What a measurement must share with a step to tell its speed."""
        return repr((self.model, mask_ratio, self.text_length, self.precision, self.compiled))


Speed = Sequence[float]  # FLOP/s of forward and backward on one device; seconds of the optimizer for a parameter


class Machine(NamedTuple):
    """GPUs of one kind, or a CPU; `shards` ranks share weights and moments, `measured` is by `Work.kind`."""

    gpu: Gpu | None
    gpus: int = 1
    shards: int = 1
    measured: Mapping[str, Speed] = {}

    def seconds(self, work: Work) -> float:
        """Of a stage: forward, backward, optimizer, gradients over NVLink. UserError if no speed is known.

        Communication runs beside the backward pass, and slows it down by as long as it takes: a ring's all-reduce of
        float32 at NVLink's speed is what a step lost on four H200 (benchmarks/results/scaling-graph-h200.json).
        """
        total, held, link = 0.0, parameters(work.model).total, self.gpu.nvlink * 1e9 if self.gpu else 0.0
        crossing = 8 * held * (1 - 1 / self.gpus) / link if link else 0.0
        for images, ratio in work.spans:
            if speed := self.measured.get(work.kind(ratio)):
                rate, optimizer = speed
            elif self.gpu:
                rate = self.gpu.peak_flops(work.precision) * UTILISATION[ratio > 0]
                optimizer = OPTIMIZER_BYTES / (self.gpu.bandwidth * 1e9)
            else:
                raise UserError("The speed of this machine is not known: run 'micro-diffusion bench RECIPE', or --gpu.")
            total += images * work.flops(ratio) / rate / self.gpus
            total += images / work.batch_size * (optimizer * held / self.shards + crossing)
        return total


def fit(work: Work, machine: Machine) -> tuple[int, float]:
    """The largest micro-batch that divides a GPU's share and leaves the reserve, 0 where none does; its gigabytes.

    Weights, gradients and two moments in float32, each average, bf16 copies of the weights, and activations.
    """
    share, copies = work.batch_size // machine.gpus, 2 if work.precision == "bf16" else 0
    held = parameters(work.model).total * (4 + copies + (12 + 4 * work.averages) / machine.shards)
    each = max(image_bytes(work, ratio) for _, ratio in work.spans)
    room = (1 - RESERVE) * machine.gpu.memory_gb * 1e9 if machine.gpu else float("inf")
    sizes = (size for size in range(1, share + 1) if share % size == 0 and held + size * each <= room)
    largest = max(sizes, default=0)
    return largest, (held + max(largest, 1) * each) / 1e9


@functools.cache
def image_bytes(work: Work, mask_ratio: float) -> float:
    """Held for the backward pass for one image, as autograd saves it: counted without arithmetic or memory."""
    images, saved, model = 2, dict[int, Tensor](), work.model
    with torch.device("meta"):
        dit, text = DiT(model), torch.empty(images, work.text_length, model.caption_channels)
        x, label = torch.empty(images, model.in_channels, *model.latent_size), torch.empty(images)
    own = {weight.untyped_storage()._cdata for weight in dit.parameters()}
    tokens = {dit.num_patches, kept_patches(dit.num_patches, mask_ratio), work.text_length}

    def note(tensor: Tensor) -> Tensor:
        scores = tensor.ndim > 2 and set(tensor.shape[-2:]) <= tokens and tensor.shape[:-2].numel() > images
        if not scores and tensor.untyped_storage()._cdata not in own:  # fused attention keeps no scores
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        dit(x, label, text, text_mask=torch.ones_like(text[..., 0], dtype=torch.bool), mask_ratio=mask_ratio)
    factor = COMPILED * (1 if work.precision == "bf16" else 2) if work.compiled else 1.0
    return factor * sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / images


def picture_bytes(works: Sequence[Work]) -> int:
    """Of one picture in a latent store: float16 latents of each resolution, and the states of its caption."""
    latents = sum({w.model.latent_size: w.model.in_channels * w.model.latent_size[0] ** 2 for w in works}.values())
    return 2 * (latents + works[0].text_length * works[0].model.caption_channels)
