"""What launching a step costs the host, by the model's form: `python -m benchmarks.launch --out launch.json`.

A step of a model with XL's 34 blocks, so narrow that the work in them is little, in one rank that does as several
would: DDP with the model compiled by block, whole, or cut at buckets of gradients; FSDP2 by units of blocks, weights
kept until the step. Forward and backward pass are timed, and apart from them clipping and AdamW. Forms come one after
another. On a GPU the host is what such a step waits for.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from benchmarks.step import machine
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.runtime.device import pick_device
from micro_diffusion.runtime.distributed import ALONE
from micro_diffusion.training import parallel
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.optim import guarded_step, make_optimizer
from micro_diffusion.training.options import Options

# mode, whether blocks are compiled apart from each other, how many are together in a unit, buckets of gradients
FORMS: dict[str, tuple[str, bool, int, int]] = {
    "DDP, by block": ("ddp", True, 1, 24),
    "DDP, whole": ("ddp", False, 1, 1),
    "DDP, six buckets": ("ddp", False, 1, 6),
    "DDP, twelve buckets": ("ddp", False, 1, 12),
    "FSDP2, by block": ("fsdp", True, 1, 1),
    "FSDP2, four blocks": ("fsdp", True, 4, 1),
    "FSDP2, seven blocks": ("fsdp", True, 7, 1),
}
PRESET = replace(PRESETS["MicroDiT_XL_2"], dim=64, mixer_dim=48, head_dim=16, multiple_of=16, input_size=8)


def step_of(form: str, device: torch.device) -> Callable[[], tuple[float, float]]:
    """A step in that form, compiled by its first call; milliseconds of its passes, and of clipping and AdamW."""
    mode, by_block, unit, buckets = FORMS[form]
    torch.manual_seed(0)
    stage = Stage("launch", resolution=64, images=100, batch_size=1, learning_rate=1e-4, mask_ratio=0.75,
                  start="scratch")  # fmt: skip
    recipe = Recipe("launch", PRESET(caption_channels=32), (stage,), compile=True)
    with mock.patch.multiple(parallel, UNIT=unit, BUCKETS=buckets):
        spread = parallel.Parallel(Options(), ALONE, recipe, device)
        spread.mode, spread.by_block = cast(Any, mode), by_block
        network = spread.network(dit := spread.shard(DiT(recipe.model).to(device)), stage)
    if isinstance(network, FSDPModule):
        network.set_reshard_after_forward(False)
    optimizer = make_optimizer(dit, recipe)
    x, text, label = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 32), torch.randn(1)
    x, text, label, target, noise = (
        each.to(device) for each in (x, text, label, torch.randn_like(x), torch.rand(1, 16))
    )

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> tuple[float, float]:
        times = [now()]
        output, _ = network(x, label, text, mask_ratio=0.75, mask_noise=noise)
        loss = (output - target).square().mean()
        loss.backward()
        times.append(now())
        guarded_step(optimizer, loss.detach(), lr=1e-4, clip_norm=1.0)
        times.append(now())
        return 1000 * (times[1] - times[0]), 1000 * (times[2] - times[1])

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29613")}
    device = pick_device("auto")
    if device.type != "cuda":
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    result = {"machine": machine(device.type), "steps": args.steps, "forms": dict[str, Any]()}
    for form in args.forms:
        begun = time.monotonic()
        step = step_of(form, device)
        step()
        first = round(time.monotonic() - begun, 1)
        passes, updates = zip(*[step() for _ in range(5 + args.steps)][5:], strict=True)
        result["forms"][form] = {
            "first_step_seconds": first,
            "median_ms": round(statistics.median(passes), 2),
            "quickest_tenth_ms": round(statistics.quantiles(passes, n=10)[0], 2),
            "optimizer_ms": round(statistics.median(updates), 2),
        }
        print(f"{form}: {json.dumps(result['forms'][form])}", flush=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
