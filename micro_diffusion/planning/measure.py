"""How fast this machine trains one kind of step: on a few of the model's blocks, scaled up by FLOPs."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import torch

from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.models.dit import DiT, DiTConfig, conditioned
from micro_diffusion.models.flops import parameters
from micro_diffusion.planning.cost import Machine, Speed, Work, fit
from micro_diffusion.runtime.hardware import gpu_of

BLOCKS, COMPILED = (5, 2), (3, 1)  # of backbone and mixer; both kinds of feed-forward, and few enough to compile
WARM_UP, STEPS = 3, 15


def shallow(config: DiTConfig, blocks: tuple[int, int]) -> DiTConfig:
    """A few of the model's blocks, evenly spread over its depth, as wide as they are."""
    depth, mixer = map(min, (config.depth, config.patch_mixer_depth), blocks)
    some = [round(i * (config.depth - 1) / max(depth - 1, 1)) for i in range(depth)]
    qkv, ffn = (tuple(each[i] for i in some) for each in (config.qkv_multipliers, config.ffn_multipliers))
    return replace(config, depth=depth, patch_mixer_depth=mixer, qkv_multipliers=qkv, ffn_multipliers=ffn)


def measure(
    work: Work, mask_ratio: float, device: torch.device, optimizer: Callable[[DiT], Callable[[], object]]
) -> Speed:
    """Medians of whole forward and backward passes, and of `optimizer`'s steps; on a GPU compiled if the work is."""
    images, gpu, objective = min(work.batch_size, 256), gpu_of(device), EDM()
    if device.type == "cuda":  # as many as fit with the whole model
        images = max(1, fit(work._replace(batch_size=images), Machine(gpu))[0]) if gpu else 16
    compiled = work.compiled and device.type == "cuda"
    work = work._replace(model=shallow(work.model, COMPILED if compiled else BLOCKS))
    with torch.device(device):
        dit, text = DiT(work.model), torch.randn(images, work.text_length, work.model.caption_channels)
        latents, noise = torch.randn(2, images, work.model.in_channels, *work.model.latent_size)
        level, mask_noise = objective.noise_level(torch.randn(images)), torch.rand(images, dit.num_patches)
    torch.compiler.reset()  # after a few graphs of one function the compiler gives up silently
    step, mask = optimizer(dit), torch.ones_like(text[..., 0], dtype=torch.bool)
    network = cast(DiT, torch.compile(dit, dynamic=False)) if compiled else dit
    wait: Callable[[], object] = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, int)

    def backward() -> None:
        shown = conditioned(network, text, mask, precision=work.precision, mask_ratio=mask_ratio, mask_noise=mask_noise)
        objective.loss(shown, latents, level, noise, patch_size=work.model.patch_size).mean.backward()

    def mark() -> Any:  # a GPU's host runs ahead, as in training: by its clock a step takes as long as its launches
        if device.type == "cuda":
            return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
        wait()
        return time.perf_counter()

    def seconds() -> list[float]:
        marks = [mark()]
        for call in (backward, step):
            call()
            marks.append(mark())
        wait()
        return [a.elapsed_time(b) / 1e3 if device.type == "cuda" else b - a for a, b in pairwise(marks)]

    rows = [seconds() for _ in range(WARM_UP + STEPS)][WARM_UP:]
    passes, steps = map(statistics.median, zip(*rows, strict=True))
    return images * work.flops(mask_ratio) / passes, steps / parameters(work.model).total
