"""Time whole training steps of the paper's four stages: `python -m benchmarks.step --out step.json`.

Forward, loss, backward, clipping and AdamW on random latents: as the model does it (`fast`), with the plain twin of
every kernel (`plain`: experts by index), and with the plain one-hot experts (`one-hot`, benchmarks/one_hot.py), all in
the same run. Each case has a process of its own, so that peak memory is its own. After the clock stops, a few more
steps are profiled: launches, and milliseconds by kind of kernel (benchmarks/breakdown.py). On a CPU the default is a
smaller model, whose ratios are of interest and not its seconds.

On a GPU steps are timed as training runs them, one after the other without a wait: an event before the first and after
each, and a step takes what lies between two neighbours. `synchronised_step_seconds` is the median of five with a wait
before and after each, as all steps were timed before; the GPU then idles while the host starts the next. On a CPU the
clock is read before and after each.

    python -m benchmarks.step --out step.json --stages 256:0.75 256:0 --paths fast one-hot
    python -m benchmarks.step --out step.json --inductor coordinate_descent_tuning=True --repeat 2

`--inductor` compiles with other values of entries of torch._inductor.config, or of activation_memory_budget. With
`--repeat 2` the second process finds the first's compilations in the cache: `first_three_steps_each` has both,
everything else is the last one's.
"""

import argparse
import ast
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
import torch._functorch.config as functorch
import torch._inductor.config as inductor
from torch import Tensor

from benchmarks.breakdown import breakdown
from benchmarks.one_hot import use_one_hot_experts
from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.kernels.launch import plain
from micro_diffusion.models.dit import DiT, DiTConfig, conditioned
from micro_diffusion.models.flops import forward_flops
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.runtime.device import pick_device
from micro_diffusion.runtime.hardware import gpu_of
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.graph import Graphed
from micro_diffusion.training.optim import guarded_step, make_optimizer

TEXT_LENGTH, TEXT_WIDTH = 77, 1024
# Images of a forward pass on a GPU of 80 GB at 256 px, by mask ratio; at 512 px a quarter: an image has four times the
# patches. Where it does not fit it is halved.
MICRO_BATCH = {0.0: 64, 0.5: 128, 0.75: 256, 0.875: 256}
PIXELS = 8  # to a latent
BUDGET = (
    "activation_memory_budget"  # of torch._functorch.config: below 1 the backward pass computes again what is cheap
)
SYNCHRONISED = 5  # steps that are timed with a wait


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
    profiled_steps: int
    inductor: dict[str, Any] = field(default_factory=dict)
    graph: bool = False


def measure(case: Case) -> dict[str, Any]:
    """Images a second (median step), peak memory, launches and milliseconds by kind of kernel."""
    with contextlib.nullcontext() if case.path == "fast" else plain():
        return _measure(case)


def _measure(case: Case) -> dict[str, Any]:
    device = pick_device(case.device)
    gpu = device.type == "cuda"
    torch.manual_seed(0)
    config = PRESETS[case.preset](
        input_size=case.latent_size, pos_interp_scale=case.latent_size / 32, caption_channels=TEXT_WIDTH,
        text_mask="none",
    )  # fmt: skip
    step = make_step(case, config, device)
    first = sum(waited(step, 3, gpu=gpu))
    waited(step, 2 * case.graph, gpu=gpu)  # the capture
    seconds = streamed(step, case.steps) if gpu else waited(step, case.steps, gpu=gpu)
    synchronised = statistics.median(waited(step, SYNCHRONISED, gpu=gpu)) if gpu else None
    memory = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images = case.batch_size / statistics.median(seconds)
    flops = images * 3 * forward_flops(config, mask_ratio=case.mask_ratio, text_length=TEXT_LENGTH)
    peak = gpu_of(device)
    return dataclasses.asdict(case) | {
        "images_per_second": images,
        "tflops_per_second": flops / 1e12,
        "utilisation": flops / peak.peak_flops("bf16") if peak else None,
        "step_seconds": [round(value, 5) for value in seconds],
        "synchronised_step_seconds": synchronised and round(synchronised, 5),
        "first_three_steps_seconds": round(first, 1),
        "peak_memory_gb": memory / 1e9,
        "profile": breakdown(step, steps=case.profiled_steps, gpu=gpu) if case.profiled_steps else None,
    }


def streamed(step: Callable[[], object], steps: int) -> list[float]:
    """Seconds of each step on the GPU, the host running ahead."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def waited(step: Callable[[], object], steps: int, *, gpu: bool) -> list[float]:
    """Seconds of each step by the host's clock, which waits for the GPU before and after."""

    def now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = []
    for _ in range(steps):
        before = now()
        step()
        seconds.append(now() - before)
    return seconds


def make_step(case: Case, config: DiTConfig, device: torch.device) -> Callable[[], None]:
    """A step on random latents, the same at every call: micro-batches, clipping, AdamW."""
    with torch.device(device):
        dit = DiT(config)
    if case.path == "one-hot":
        use_one_hot_experts(dit)
    stage = Stage("benchmark", resolution=PIXELS * case.latent_size, images=case.batch_size, batch_size=case.batch_size,
                  learning_rate=1e-4, mask_ratio=case.mask_ratio)  # fmt: skip
    optimizer = make_optimizer(dit, Recipe("benchmark", config, (stage,)))
    # options and not torch._inductor.config itself: what is set there may hold for a thread only, and a GPU's backward
    # pass is compiled in another
    options = {name: value for name, value in case.inductor.items() if name != BUDGET} or None
    functorch.activation_memory_budget = case.inductor.get(BUDGET, 1.0)  # the graph is cut in two in this thread
    compiled = torch.compile(dit, dynamic=False, fullgraph=True, options=options) if case.compile else dit
    network_module = cast(DiT, compiled)
    count, objective, precision = case.micro_batch, EDM(), "bf16" if device.type == "cuda" else "float32"

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

    batches = [batch() for _ in range(case.batch_size // count)]

    def step() -> None:
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

    return Graphed(step) if case.graph else step


def machine(device: str) -> dict[str, Any]:
    """Hardware, versions, commit and day. Where the code is no git checkout, the commit is the environment's COMMIT."""
    gpu = pick_device(device).type == "cuda"
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or asked.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rewritten after each case")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--model", nargs="+", default=["MicroDiT_XL_2" if gpu else "MicroDiT_Small_2"], choices=PRESETS)
    parser.add_argument(
        "--stages", nargs="+", default=["256:0.75", "256:0", "512:0.75", "512:0"], metavar="PIXELS:MASK"
    )
    parser.add_argument("--paths", nargs="+", default=["fast", "one-hot"], choices=["fast", "plain", "one-hot"])
    parser.add_argument("--batch-size", type=int, default=256 if gpu else 8)
    parser.add_argument("--micro-batch", type=int, help="images of a forward pass; default: what fits XL in 80 GB")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profiled-steps", type=int, default=2, help="0 profiles nothing")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu)
    parser.add_argument("--inductor", nargs="+", type=setting, default=[], metavar="NAME=VALUE")
    parser.add_argument("--graph", action="store_true", help="replay whole steps as a CUDA graph")
    parser.add_argument("--repeat", type=int, default=1, help="processes of each case, one after the other")
    args = parser.parse_args()
    if args.inductor and not args.compile:
        parser.error("--inductor asks for --compile")
    rows: list[dict[str, Any]] = []
    for preset, stage, path in itertools.product(args.model, args.stages, args.paths):
        pixels, _, mask = stage.partition(":")
        latent_size, mask_ratio = int(pixels) // PIXELS, float(mask or 0)
        micro = args.micro_batch or max(1, MICRO_BATCH.get(mask_ratio, 64) * 32**2 // latent_size**2)
        case = Case(preset, latent_size, mask_ratio, path, args.batch_size, min(args.batch_size, micro),
                    args.steps, args.device, args.compile, args.profiled_steps, dict(args.inductor),
                    args.graph)  # fmt: skip
        rows.append(repeated(case, args.repeat))
        print(line(rows[-1]), flush=True)
        result = {"machine": machine(args.device), "rows": rows}
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def setting(text: str) -> tuple[str, Any]:
    """An entry of torch._inductor.config, or the memory budget, and its value."""
    name, _, value = text.partition("=")
    if name != BUDGET and name not in inductor.get_config_copy():
        raise argparse.ArgumentTypeError(f"torch._inductor.config has no {name!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(f"{value!r}, of {name}, is no Python literal") from None


def repeated(case: Case, times: int) -> dict[str, Any]:
    """The last of so many measurements, with the first steps of all."""
    first = []
    for _ in range(times):
        row = measure_alone(case)
        first.append(row["first_three_steps_seconds"])
        case = dataclasses.replace(case, micro_batch=row["micro_batch"])
    return row | {"first_three_steps_each": first}


def measure_alone(case: Case) -> dict[str, Any]:
    """In a process of its own, with micro-batches that fit."""
    while True:
        try:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                return pool.apply(measure, (case,))
        except torch.OutOfMemoryError:
            print(f"out of memory with micro-batches of {case.micro_batch}", flush=True)
            if case.micro_batch == 1:
                raise
            case = dataclasses.replace(case, micro_batch=case.micro_batch // 2)


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    first = ", ".join(f"{seconds:.0f}" for seconds in row["first_three_steps_each"])
    text = (
        f"{row['preset']} {PIXELS * row['latent_size']} px, mask {row['mask_ratio']:5.3f}  {row['path']:7}  "
        f"{row['images_per_second']:8.1f} images/s  {row['peak_memory_gb']:5.1f} GB  "
        f"{row['tflops_per_second']:6.1f} TFLOP/s  first steps {first} s"
    )
    if row["inductor"]:
        text += f"  {row['inductor']}"
    if profile := row["profile"]:
        kinds = "  ".join(f"{kind} {ms:.0f}" for kind, ms in profile["kinds_ms"].items())
        text += f"\n    {profile['launches']} launches, {profile['kernel_ms']:.0f} ms: {kinds}"
    return text


if __name__ == "__main__":
    main()
