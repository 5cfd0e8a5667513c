"""Several GPUs, little memory and the cost of safety: `python -m benchmarks.parallel --out parallel.json`.

Whole training steps on random latents through the loop's own parts (share of the batch, micro-batches, gradient,
guarded step). One process (or torchrun) a case; JSON is rewritten after each. `24gb-*` run without compiling, because
each halving of the micro-batch would compile anew.

Checkpoints: `ddp` writes one, `fsdp` goes on from it and writes another, `back` goes on from that with DDP; each
compares sums over weights and moments, and the loss of the same next batch.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from micro_diffusion.models.dit import DiT
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.runtime.device import pick_device
from micro_diffusion.runtime.distributed import World, join
from micro_diffusion.training import checkpoint
from micro_diffusion.training.checkpoint import Saver
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.feed import Examples
from micro_diffusion.training.loop import add_gradient
from micro_diffusion.training.optim import guarded_step
from micro_diffusion.training.options import Options
from micro_diffusion.training.parallel import Parallel
from micro_diffusion.training.stages import State, first_state

TEXT_LENGTH, TEXT_WIDTH, DOWNSCALE = 77, 1024, 8
CASES = ("single", "ddp", "fsdp", "back", "24gb-1", "24gb-1-ac", "24gb-3", "24gb-3-ac")


class Run:
    """A stage's network, optimizer and random batches, as the loop would have them."""

    def __init__(
        self, args: argparse.Namespace, world: World, options: Options, *, resolution: int, compiled: bool
    ) -> None:  # fmt: skip
        self.device, self.world = pick_device("cuda" if args.gpu else "cpu"), world
        config = PRESETS[args.preset](caption_channels=TEXT_WIDTH, text_mask="none")
        stage = Stage("benchmark", resolution=resolution, images=1000 * args.batch * world.size,
                      batch_size=args.batch * world.size, learning_rate=1e-4, mask_ratio=0.75, start="scratch",
                      pos_interp_scale=resolution / 256)  # fmt: skip
        self.recipe = Recipe("benchmark", config, (stage,), text_length=TEXT_LENGTH, compile=compiled,
                             precision="bf16" if args.gpu else "float32")  # fmt: skip
        self.stage, self.parallel = stage, Parallel(options, world, self.recipe, self.device)

    def begin(self, state: State | None = None) -> State:
        """A random state, or the one given, ready to train."""
        self.state = state or first_state(
            self.recipe, downscale=DOWNSCALE, device=self.device, shard=self.parallel.shard
        )
        self.use(self.parallel.network(self.state.dit, self.stage))
        self.examples = self.batch(0)
        self.micro = self.parallel.micro_batch(self.stage)
        return self.state

    def use(self, network: DiT) -> None:
        """Train through this form of the model from now on."""
        self.network = network
        self.backward = partial(
            add_gradient, network, self.recipe.make_objective(self.stage), self.recipe,
            self.stage.mask_ratio, self.stage.batch_size // self.world.size,
        )  # fmt: skip

    def batch(self, seed: int) -> Examples:
        """This rank's share of a random batch: a slice of the same one for any number of ranks."""
        generator = torch.Generator(self.device).manual_seed(seed)
        size, side = self.stage.batch_size, self.stage.resolution // DOWNSCALE
        normal = partial(torch.randn, generator=generator, device=self.device)
        channels, patches = self.recipe.model.in_channels, (side // self.recipe.model.patch_size) ** 2
        everything = Examples(
            latents=normal(size, channels, side, side),
            text=normal(size, TEXT_LENGTH, TEXT_WIDTH),
            text_scale=torch.ones(size, TEXT_LENGTH, device=self.device),
            text_mask=torch.ones(size, TEXT_LENGTH, dtype=torch.bool, device=self.device),
            caption_dropped=torch.zeros(size, dtype=torch.bool, device=self.device),
            sigma_normal=normal(size),
            noise=normal(size, channels, side, side),
            mask_noise=torch.rand(size, patches, generator=generator, device=self.device),
        )
        share = size // self.world.size
        return Examples(*(column[self.world.rank * share :][:share].clone() for column in everything))

    def gradient(self, examples: Examples) -> torch.Tensor:
        loss = torch.zeros((), device=self.device)
        for part in self.parallel.split(self.network, examples, self.micro):
            loss += self.backward(part).sum() * self.world.size / self.stage.batch_size
        return self.world.mean(loss)

    def step(self) -> torch.Tensor:
        loss = self.gradient(self.examples)
        guarded_step(self.state.optimizer, loss, lr=1e-4, clip_norm=0.25)
        self.world.agree()
        return loss

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            before = self.now()
            self.step()
            found.append(self.now() - before)
        return found

    def peak(self) -> float:
        gpu = self.device.type == "cuda"
        return torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def measure(self, steps: int) -> dict[str, Any]:
        """Images a second, and peak memory of each rank."""
        begun = self.now()
        self.seconds(2)
        warm, seconds = self.now() - begun, self.seconds(steps)
        peaks = [
            self.world.agree(int(self.peak()) if self.world.rank == rank else 0) for rank in range(self.world.size)
        ]
        return {
            "images_per_second": self.stage.batch_size / statistics.median(seconds),
            "micro_batch": self.micro,
            "ranks": self.world.size,
            "peak_gb": [round(peak / 1e9, 2) for peak in peaks],
            "first_two_steps_seconds": round(warm, 1),
            "step_seconds": [round(value, 4) for value in seconds],
        }


def sums(state: State) -> list[float]:
    """One number a tensor of weights and moments."""
    tensors = [*state.dit.parameters()]
    tensors += [state.optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq") for parameter in tensors]
    whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return [tensor.detach().double().abs().sum().item() for tensor in whole]


def saved(run: Run, folder: Path) -> dict[str, Any]:
    """Write two checkpoints while training, with what is to be found in the second; the first takes host memory."""
    median, saver = statistics.median(run.seconds(4)), Saver(folder, run.recipe, world=run.world, keep=1)

    def write() -> tuple[float, float, float]:
        """Seconds that the copy takes, that the rest takes in the background, and that training loses."""
        run.state.images += run.stage.batch_size  # a folder of its own
        before = run.now()
        saver.save(run.state)
        copied = run.now() - before
        while_writing, begun, writing = list[float](), time.perf_counter(), saver._pending
        while writing is not None and not run.world.agree(writing.done()):
            while_writing += run.seconds(1)
        saver.wait()
        wrote = time.perf_counter() - begun
        return copied, wrote, copied + sum(while_writing) - median * len(while_writing)

    first = write()
    loss = run.gradient(run.examples).item()
    run.state.optimizer.zero_grad()
    expected = sums(run.state)
    copied, wrote, cost = write()
    if run.world.rank == 0:
        folder.with_suffix(".json").write_text(json.dumps(expected))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    saver.close()
    return {
        "loss_of_the_next_batch": loss,
        "checkpoint_gb": round(size / 1e9, 2),
        "first_lost_seconds": round(first[-1], 3),
        "copy_seconds": round(copied, 3),
        "background_seconds": round(wrote, 1),
        "training_lost_seconds": round(cost, 3),
        "percent_at_one_in_600_s": round(100 * cost / 600, 3),
    }


def resumed(run: Run, folder: Path) -> dict[str, Any]:
    """Load what the other mode wrote; the sums must be those it had."""
    first = partial(first_state, run.recipe, downscale=DOWNSCALE, device=run.device, shard=run.parallel.shard)
    state = checkpoint.load_newest(folder, run.recipe, first, world=run.world)
    assert state is not None
    expected, found = json.loads(folder.with_suffix(".json").read_text()), sums(state)
    worst = max(abs(one - other) / max(abs(one), 1e-30) for one, other in zip(expected, found, strict=True))
    run.begin(state)
    loss = run.gradient(run.examples).item()
    run.state.optimizer.zero_grad()
    return {"resumed_from": folder.name, "largest_relative_difference": worst, "resumed_loss": loss}


def guard_cost(run: Run, times: int = 20) -> dict[str, float]:
    """Milliseconds of the guarded step, and of the same AdamW without clipping or guard."""

    def timed(guarded: bool) -> float:
        found = []
        for _ in range(times):
            for parameter in run.state.dit.parameters():
                parameter.grad = torch.zeros_like(parameter)
            before = run.now()
            if guarded:
                guarded_step(run.state.optimizer, torch.zeros((), device=run.device), lr=0.0, clip_norm=0.25)
            else:
                nn.utils.clip_grad_norm_(run.state.dit.parameters(), 0.25)
                run.state.optimizer.step()
            found.append(run.now() - before)
        return round(1000 * statistics.median(found), 3)

    for group in run.state.optimizer.param_groups:
        group |= {"fused": True, "capturable": True}  # as the guarded one is
    plain, guarded = timed(False), timed(True)
    run.state.optimizer.zero_grad()
    return {"plain_step_ms": plain, "guarded_step_ms": guarded}


def work(args: argparse.Namespace, world: World) -> Iterator[dict[str, Any]]:
    """The rows of one case, as they are known."""
    case, folder = args.case, Path(args.scratch)
    if case.startswith("24gb"):
        if args.gpu:
            torch.cuda.set_per_process_memory_fraction(24e9 / torch.cuda.get_device_properties(0).total_memory)
        options = Options(activation_checkpointing=case.endswith("ac"), micro_batch="auto")
        run = Run(args, world, options, resolution=512 if "-3" in case else 256, compiled=False)
        run.begin()
        run.micro = run.parallel.fit(run.network, run.examples, run.stage, run.backward)
        yield {"limit_gb": 24, "compiled": False} | run.measure(max(2, args.steps // 3))
        return
    mode = {"single": "auto", "ddp": "ddp", "fsdp": "fsdp", "back": "ddp"}[case]
    options = Options(parallel=mode, micro_batch=args.micro_batch, reshard=args.reshard)  # type: ignore[arg-type]
    compiled = args.compile and case != "back"
    run = Run(args, world, options, resolution=256, compiled=compiled)
    # a mode that goes on from a checkpoint is given the recipe that it was saved with
    run.recipe = replace(run.recipe, compile=args.compile)
    if case == "back":
        yield resumed(run, folder / "fsdp")
        return
    run.begin()
    row = run.measure(args.steps)
    yield row
    if case == "single":
        yield row | guard_cost(run)
    if case == "ddp":
        row |= saved(run, folder / "ddp")
        yield row
    if case == "fsdp":
        row |= resumed(run, folder / "ddp")
        yield row
        yield row | saved(run, folder / "fsdp")


def write(path: Path, case: str, row: dict[str, Any]) -> None:
    """Put the row into the result, with efficiencies against one GPU."""
    result = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "cases": {}}
    result["cases"][case] = row
    if base := result["cases"].get("single"):
        for each in result["cases"].values():
            if each.get("ranks", 1) > 1:
                speedup = each["images_per_second"] / base["images_per_second"]
                each["efficiency_against_single"] = round(speedup / each["ranks"], 4)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{case}: {json.dumps({key: value for key, value in row.items() if key != 'step_seconds'})}", flush=True)


def machine() -> dict[str, Any]:
    """Hardware, versions and commit."""
    here = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    revision = os.environ.get("COMMIT") or here
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": revision,
    }


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rewritten after each case")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--preset", default="MicroDiT_XL_2" if gpu else "MicroDiT_Nano_4", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=512 if gpu else 8, help="images of a step on each rank")
    parser.add_argument("--micro-batch", type=int, default=256 if gpu else 4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu)
    parser.add_argument("--reshard", action="store_true", help="of FSDP2, as in micro-diffusion train")
    parser.add_argument("--scratch", default="/tmp/parallel-benchmark", help="folder for checkpoints; removed")
    parser.add_argument("--seconds", type=float, default=530, help="cases that would begin after this are left out")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.gpu = gpu
    if args.case:
        with join("auto", timeout=600) as world:
            for row in work(args, world):
                if world.rank == 0:
                    write(args.out, args.case, row)
        return
    args.out.unlink(missing_ok=True)
    shutil.rmtree(args.scratch, ignore_errors=True)
    begun = time.monotonic()
    for case in args.cases:
        if time.monotonic() - begun > args.seconds:
            print(f"{case}: left out, out of time", flush=True)
            continue
        ranks = args.ranks if case in ("ddp", "fsdp", "back") else 1
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        threads = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "8")}
        command = [sys.executable, *launch, "-m", "benchmarks.parallel", *sys.argv[1:], "--case", case]
        code = subprocess.run(command, env=threads).returncode
        print(f"{case}: exit code {code}, {time.monotonic() - begun:.0f} s since the start", flush=True)
    shutil.rmtree(args.scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
