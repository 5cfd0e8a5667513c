"""Time whole training steps by mask ratio: `python -m benchmarks.step --out step.json`.

Forward, loss, backward, clipping and AdamW on random latents: as the model does it (`fast`), with the plain twin of
every kernel (`plain`: experts by index), and with the plain one-hot experts (`one-hot`, benchmarks/one_hot.py), all in
the same run. Each case has a process of its own, so that peak memory is its own. On a CPU the default is a smaller
model, whose ratios are of interest and not its seconds.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import platform
import resource
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.one_hot import use_one_hot_experts
from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.kernels.launch import plain
from micro_diffusion.models.dit import DiT, conditioned
from micro_diffusion.models.flops import forward_flops
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.runtime.device import pick_device
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.optim import guarded_step, make_optimizer

TEXT_LENGTH, TEXT_WIDTH = 77, 1024
# Images of a forward pass on a GPU of 80 GB: what the paper used at these mask ratios.
MICRO_BATCH = {0.0: 64, 0.5: 128, 0.75: 256, 0.875: 256}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    preset: str
    latent_size: int
    mask_ratio: float
    path: str
    batch_size: int
    micro_batch: int
    steps: int
    device: str
    compile: bool


def measure(case: Case) -> dict[str, Any]:
    """Images a second (median step) and peak memory."""
    with contextlib.nullcontext() if case.path == "fast" else plain():
        return _measure(case)


def _measure(case: Case) -> dict[str, Any]:
    device = pick_device(case.device)
    gpu = device.type == "cuda"
    torch.manual_seed(0)
    config = PRESETS[case.preset](input_size=case.latent_size, caption_channels=TEXT_WIDTH, text_mask="none")
    with torch.device(device):
        dit = DiT(config)
    if case.path == "one-hot":
        use_one_hot_experts(dit)
    stage = Stage("benchmark", resolution=8 * case.latent_size, images=case.batch_size, batch_size=case.batch_size,
                  learning_rate=1e-4, mask_ratio=case.mask_ratio)  # fmt: skip
    optimizer = make_optimizer(dit, Recipe("benchmark", config, (stage,)))
    network_module = cast(DiT, torch.compile(dit, dynamic=False, fullgraph=True)) if case.compile else dit
    count, objective, precision = case.micro_batch, EDM(), "bf16" if gpu else "float32"

    def batch() -> tuple[Tensor, ...]:
        latents, noise = torch.randn(2, count, config.in_channels, *config.latent_size, device=device)
        text = torch.randn(count, TEXT_LENGTH, TEXT_WIDTH, device=device)
        return (
            latents,
            noise,
            text,
            torch.randn(count, device=device),
            torch.rand(count, dit.num_patches, device=device),
        )

    def step(batches: list[tuple[Tensor, ...]]) -> None:
        total = torch.zeros((), device=device)
        for latents, noise, text, normal, mask_noise in batches:
            network = conditioned(
                network_module, text, torch.ones(text.shape[:2], dtype=torch.bool, device=device),
                precision=precision, mask_ratio=case.mask_ratio, mask_noise=mask_noise,
            )  # fmt: skip
            level = objective.noise_level(normal)
            loss = objective.loss(network, latents, level, noise, patch_size=config.patch_size).mean
            (loss / len(batches)).backward()
            total += loss.detach()
        guarded_step(optimizer, total, lr=1e-4, clip_norm=0.25)

    def wait() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    batches = [batch() for _ in range(case.batch_size // count)]
    started = wait()
    for _ in range(3):
        step(batches)
    warm = wait() - started
    seconds = []
    for _ in range(case.steps):
        before = wait()
        step(batches)
        seconds.append(wait() - before)
    median = statistics.median(seconds)
    flops = 3 * forward_flops(config, mask_ratio=case.mask_ratio, text_length=TEXT_LENGTH)
    memory = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dataclasses.asdict(case) | {
        "images_per_second": case.batch_size / median,
        "tflops_per_second": case.batch_size / median * flops / 1e12,
        "step_seconds": [round(value, 5) for value in seconds],
        "first_three_steps_seconds": round(warm, 1),
        "peak_memory_gb": memory / 1e9,
    }


def machine(device: str) -> dict[str, Any]:
    """Hardware, versions and commit."""
    gpu = pick_device(device).type == "cuda"
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": revision,
    }


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rewritten after each case")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--preset", default="MicroDiT_XL_2" if gpu else "MicroDiT_Small_2", choices=PRESETS)
    parser.add_argument("--latent-size", type=int, default=32, help="32 is 256 px")
    parser.add_argument("--masks", type=float, nargs="+", default=[0.75, 0.0, 0.5, 0.875])
    parser.add_argument("--paths", nargs="+", default=["fast", "one-hot"], choices=["fast", "plain", "one-hot"])
    parser.add_argument("--batch-size", type=int, default=256 if gpu else 8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for mask_ratio in args.masks:
        for path in args.paths:
            micro = min(args.batch_size, MICRO_BATCH.get(mask_ratio, 64))
            case = Case(args.preset, args.latent_size, mask_ratio, path, args.batch_size, micro,
                        args.steps, args.device, args.compile)  # fmt: skip
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (case,)))
            row = rows[-1]
            print(
                f"mask {mask_ratio:5.3f}  {path:7}  {row['images_per_second']:8.1f} images/s  "
                f"{row['peak_memory_gb']:5.1f} GB  {row['tflops_per_second']:6.1f} TFLOP/s  "
                f"first steps {row['first_three_steps_seconds']:.0f} s",
                flush=True,
            )
            result = {"machine": machine(args.device), "rows": rows}
            args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
