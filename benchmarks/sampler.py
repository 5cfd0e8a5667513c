"""Pictures a second of sampling, latents only: `python -m benchmarks.sampler --out sampler.json`.

Heun steps with guidance on random weights and random text features, at each size and batch in several modes: eager or
compiled, guidance as one call of twice the batch (`sample_latents` as it is) or as two calls, CUDA graphs
(`torch.compile(mode="reduce-overhead")`, as `generate --compile` does), weights kept in bf16. Each case has a process
of its own; JSON is rewritten after each. `difference` is that of the latents from those of the first mode of the same
size and batch.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step import PIXELS, machine
from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.diffusion.samplers import heun
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.masking import null_caption
from micro_diffusion.models.model import sample_latents, text_network
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.models.text_encoders import TextFeatures
from micro_diffusion.runtime.device import pick_device

GUIDANCE, TEXT_LENGTH, TEXT_WIDTH = 5.0, 77, 1024
LEAST_DRAWS, LEAST_SECONDS, MOST_DRAWS = 2, 3.0, 10


@dataclass(frozen=True)
class Mode:
    """How latents are drawn."""

    calls: int = 1
    """Of the network for a guided evaluation."""
    compile: str | None = None
    """A mode of torch.compile."""
    weights: str = "float32"


MODES = {
    "eager-two-calls": Mode(calls=2),
    "eager": Mode(),
    "compiled-two-calls": Mode(calls=2, compile="default"),
    "compiled": Mode(compile="default"),
    "graphs": Mode(compile="reduce-overhead"),
    "graphs-bf16": Mode(compile="reduce-overhead", weights="bf16"),
}
DEFAULT_MODES = ("eager-two-calls", "eager", "compiled-two-calls", "compiled", "graphs")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    preset: str
    pixels: int
    batch: int
    mode: str
    steps: int
    device: str


@torch.no_grad()
def measure(case: Case) -> tuple[dict[str, Any], Tensor]:
    """Pictures a second (median draw), seconds to the first picture, memory; and the latents."""
    device, mode = pick_device(case.device), MODES[case.mode]
    gpu = device.type == "cuda"
    dit = random_dit(case, device)
    if mode.weights == "bf16":
        dit = dit.bfloat16()
    draws = torch.Generator().manual_seed(1)
    states = torch.randn(case.batch, TEXT_LENGTH, TEXT_WIDTH, generator=draws).to(device)
    text = TextFeatures(states, torch.ones(states.shape[:2], dtype=torch.bool, device=device))
    shape = case.batch, dit.config.in_channels, *dit.config.latent_size
    noise = torch.randn(shape, generator=draws).to(device)
    if mode.compile:
        dit.compile(mode=mode.compile, dynamic=False, fullgraph=True)
    sample = sample_latents if mode.calls == 1 else two_calls

    def draw(steps: int) -> tuple[Tensor, float]:
        started = time.perf_counter()
        latents = sample(dit, EDM(), text, noise, num_inference_steps=steps, guidance_scale=GUIDANCE)
        latents = latents.cpu()  # waits
        return latents, time.perf_counter() - started

    _, first = draw(3)  # five calls: a graph is recorded at the second or third
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    while len(seconds) < LEAST_DRAWS or (sum(seconds) < LEAST_SECONDS and len(seconds) < MOST_DRAWS):
        latents, one = draw(case.steps)
        seconds.append(one)
    row = asdict(case) | asdict(mode) | {
        "pictures_per_second": case.batch / statistics.median(seconds),
        "seconds": [round(value, 4) for value in seconds],
        "first_three_steps_seconds": round(first, 1),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else None,
        "graphs_skipped": torch._dynamo.utils.counters["inductor"]["cudagraph_skips"],
    }  # fmt: skip
    return row, latents


def random_dit(case: Case, device: torch.device) -> DiT:
    """The model with no weight zero, so that every block counts."""
    torch.manual_seed(0)
    size = case.pixels // PIXELS
    config = PRESETS[case.preset](
        input_size=size, pos_interp_scale=size / 32, caption_channels=TEXT_WIDTH, text_mask="none"
    )
    with device:
        dit = DiT(config).eval().requires_grad_(False)
    for parameter in dit.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return dit


def null(text: TextFeatures) -> TextFeatures:
    return null_caption(*text, torch.ones_like(text.mask[:, 0]))


def two_calls(
    dit: DiT, objective: EDM, text: TextFeatures, noise: Tensor, *, num_inference_steps: int, guidance_scale: float
) -> Tensor:
    """`sample_latents` with a call of the network for the caption and one for the null caption."""
    conditional, unconditional = (text_network(dit, each, precision="bf16", keys=True) for each in (text, null(text)))

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        cond = objective.denoise(conditional, x, level).sample
        uncond = objective.denoise(unconditional, x, level).sample
        return uncond + guidance_scale * (cond - uncond)

    levels = objective.levels(num_inference_steps)
    return heun(denoise, objective.start(noise), levels, alpha=objective.alpha)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--model", default="MicroDiT_XL_2" if gpu else "MicroDiT_Small_2", choices=PRESETS)
    parser.add_argument("--pixels", type=int, nargs="+", default=[256, 512] if gpu else [128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--modes", nargs="+", default=DEFAULT_MODES if gpu else DEFAULT_MODES[:2], choices=MODES)
    parser.add_argument("--steps", type=int, default=30 if gpu else 5)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for pixels, batch in itertools.product(args.pixels, args.batches):
        reference: Tensor | None = None
        for mode in args.modes:
            case = Case(args.model, pixels, batch, mode, args.steps, args.device)
            row, latents = alone(measure, case)
            reference = latents if reference is None else reference
            rows.append(row | {"difference": ((latents - reference).norm() / reference.norm()).item()})
            print(
                f"{pixels} px, batch {batch:2}  {mode:18}  {row['pictures_per_second']:7.3f} pictures/s  first three "
                f"steps {row['first_three_steps_seconds']:5.1f} s  difference {rows[-1]['difference']:.4f}",
                flush=True,
            )
            args.out.write_text(json.dumps({"machine": machine(args.device), "rows": rows}, indent=2) + "\n")


def alone(work: Callable[[Case], tuple[dict[str, Any], Tensor]], case: Case) -> tuple[dict[str, Any], Tensor]:
    """In a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (case,))


if __name__ == "__main__":
    main()
