"""Does the paper's run fit a GPU of so many GB? `python -m benchmarks.fits --out fits.json --gb 80`; also by torchrun.

The stages of paper-37m, each a few steps of 256 images a GPU long, go one after another through the package's own loop,
with what takes memory beside a step: averages, checkpoints, validation, sample grids of eight pictures that SDXL's
autoencoder decodes (with random weights), and the place that the text encoder takes. Latents and captions are random.
The allocator gets no more than `--gb`, less `--outside` for what CUDA, NCCL and CUDA graphs take beside it;
what they took is told as `outside_gb`, if nothing else runs on that GPU.

The JSON has a row for each stage, of rank 0, which draws: peaks of what was allocated and reserved, in steps and in
all that comes at a row of the log; and `trouble`, with what ended the run if it did not fit. It is rewritten after each
stage. Ranks that torchrun starts see all GPUs, and each compiles for its own.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import nn

from benchmarks.loader import write_store
from benchmarks.scaling_case import DOWNSCALE, TEXT_LENGTH, TEXT_WIDTH
from benchmarks.step import machine
from micro_diffusion.cli.train import SAMPLE_PROMPTS, SAMPLING
from micro_diffusion.data.loader import Loader
from micro_diffusion.data.store import Store
from micro_diffusion.models.autoencoders import Autoencoder
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.masking import TextFeatures
from micro_diffusion.models.model import LatentDiffusion
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.models.text_encoders import TextEncoder
from micro_diffusion.recipes.paper import paper_37m
from micro_diffusion.runtime.device import pick_device
from micro_diffusion.runtime.distributed import Stuck, World, join
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.report import grid, pictures
from micro_diffusion.training import loop
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.hooks import Hook, Moment, Row, Samples
from micro_diffusion.training.options import Options
from micro_diffusion.training.parallel import Parallel
from micro_diffusion.training.stages import State

TEXT_WEIGHTS = 354_000_000  # of DFN5B's text tower, in float32
SDXL_LAYERS: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 1024,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


class Text(nn.Module):
    """As large as the paper's text encoder, and gives random states."""

    name, width, max_length, text_mask_policy = "random", TEXT_WIDTH, TEXT_LENGTH, "none"

    def __init__(self, weights: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(weights), requires_grad=False)

    def encode(self, captions: Sequence[str], attention_mask: None = None) -> TextFeatures:
        states = torch.randn(len(captions), TEXT_LENGTH, TEXT_WIDTH, device=self.weights.device)
        return TextFeatures(states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device))


class Memory(Hook):
    """Peaks of each stage: of its steps, and of what other hooks do, since this one is the last."""

    def __init__(self, stages: dict[str, dict[str, float]], write: Callable[[], object]) -> None:
        self.stages, self.write = stages, write

    def after_step(self, state: State, moment: Moment) -> Row:
        row = self.stages.setdefault(moment.stage.name, {})
        row["rows"] = row.get("rows", 0) + 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            found = {
                "allocated_gb": torch.cuda.max_memory_allocated(), "reserved_gb": torch.cuda.max_memory_reserved(),
                "outside_gb": total - free - torch.cuda.memory_reserved(),
            }  # fmt: skip
            row |= {name: max(row.get(name, 0.0), round(bytes_ / 1e9, 2)) for name, bytes_ in found.items()}
            torch.cuda.reset_peak_memory_stats()
        print(moment.stage.name, row, flush=True)
        self.write()
        return {}


def recipe_of(args: argparse.Namespace, world: World) -> Recipe:
    """The paper's, each stage a few steps long; averages begin with their stage."""
    paper, batch = paper_37m(), args.batch * world.size
    stages = tuple(
        replace(stage, images=args.steps * batch, batch_size=batch, warmup_images=0, ema_start_images=0,
                micro_batch=stage.micro_batch if stage.micro_batch < batch else 0)
        for stage in (paper.stages[number - 1] for number in args.stages)
    )  # fmt: skip
    often = args.steps * batch
    return replace(
        paper, name="fits", model=PRESETS[args.preset](caption_channels=TEXT_WIDTH, text_mask="none"), stages=stages,
        precision="bf16" if args.gpu else "float32", compile=args.compile, log_every=often, checkpoint_every=often,
        sample_every=often, validate_every=often,
    )  # fmt: skip


def draw(args: argparse.Namespace, recipe: Recipe, vae: Autoencoder, text: Text, dit: DiT) -> Any:
    model = LatentDiffusion(
        dit, recipe.make_objective(recipe.stages[0]), load_vae=lambda: vae, text_length=TEXT_LENGTH,
        load_text_encoder=lambda: cast(TextEncoder, text), precision=recipe.precision,
    )  # fmt: skip
    captions = [f"caption {number}" for number in range(SAMPLE_PROMPTS)]
    settings = SAMPLING | ({} if args.gpu else {"num_inference_steps": 1})
    return grid(pictures(model.generate(captions, seed=0, **settings)), captions, columns=4)


class ByUnits(Parallel):
    """Compiles as FSDP does, by units of a few blocks, in every mode."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.by_block = self.compile


def work(args: argparse.Namespace, world: World) -> None:
    from diffusers import AutoencoderKL

    begun, device, scratch = time.monotonic(), pick_device("cuda" if args.gpu else "cpu"), Path(args.scratch)
    result: dict[str, Any] = {"machine": machine("cuda" if args.gpu else "cpu"), "preset": args.preset}
    result |= {"gpus": world.size, "mode": "single" if world.size == 1 else args.parallel, "images_a_gpu": args.batch}
    result |= {"limit_gb": args.gb, "cuda_graph": args.cuda_graph, "compiled_by_units": args.units, "stages": {}}
    if args.gpu:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (args.gb - args.outside) * 1e9 / total))
    if not world.rank and not (scratch / "store").exists():
        write_store(scratch / "store", rows=args.rows, tokens=TEXT_LENGTH, resolutions=(256, 512), dtype="float16")
    world.agree()
    recipe, run = recipe_of(args, world), scratch / f"fits-run-{args.out.stem}"
    store = Store.open(scratch / "store")
    loaders = {
        size: Loader([store], resolution=size, text_encoder="random", seed=recipe.seed, text_length=TEXT_LENGTH)
        for size in (256, 512)
    }
    hooks: list[Hook] = []

    def write() -> None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")

    if not world.rank:
        shutil.rmtree(run, ignore_errors=True)
        layers = SDXL_LAYERS if args.gpu else SDXL_LAYERS | {"block_out_channels": (4,) * 4, "norm_num_groups": 4}
        vae = Autoencoder(AutoencoderKL(**layers), name="random", sha256="").to(device)
        text = Text(TEXT_WEIGHTS if args.gpu else 1000).to(device)
        samples = Samples(partial(draw, args, recipe, vae, text), run / "samples", every=recipe.sample_every)
        hooks = [samples, Memory(result["stages"], write)]
    world.agree()
    options = Options(parallel=args.parallel, cuda_graph=args.cuda_graph, keep=1)
    try:
        with mock.patch.object(loop, "Parallel", ByUnits if args.units else Parallel):
            loop.train(recipe, run=run, loaders=loaders, validation=loaders, downscale=DOWNSCALE, device=device,
                       release=lambda folder, state: None, hooks=hooks, options=options, world=world)  # fmt: skip
    except (UserError, Stuck, torch.OutOfMemoryError) as error:
        result["trouble"] = f"{type(error).__name__}: {str(error).split('. ')[0]}"
    result["seconds"] = round(time.monotonic() - begun, 1)
    if not world.rank or "trouble" in result:
        print(json.dumps(result), flush=True)
    if not world.rank:
        write()
        shutil.rmtree(run, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gb", type=float, default=85.0, help="of the GPU, in 1e9 bytes; an H100 of 80 GB has 85.0")
    parser.add_argument("--outside", type=float, default=2.0, help="of these, for what is not torch's")
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_argument("--parallel", default="ddp", choices=("ddp", "fsdp", "hybrid"))
    parser.add_argument("--units", action="store_true", help="compile by units of a few blocks, as FSDP2 does")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4], help="of the recipe")
    parser.add_argument("--steps", type=int, default=16, help="of each stage")
    parser.add_argument("--batch", type=int, help="images of a step on each GPU; default: 256, or 8 without a GPU")
    parser.add_argument("--preset", choices=PRESETS, help="default: MicroDiT_XL_2, or MicroDiT_Nano_4 without a GPU")
    parser.add_argument("--rows", type=int, default=4096, help="of the store")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--scratch", default="/tmp/scaling-benchmark", help="store and checkpoints; the store stays")
    args = parser.parse_args()
    args.gpu = torch.cuda.is_available()
    args.preset = args.preset or ("MicroDiT_XL_2" if args.gpu else "MicroDiT_Nano_4")
    args.batch = args.batch or (256 if args.gpu else 8)
    args.compile = args.gpu if args.compile is None else args.compile
    with join("auto", timeout=600.0) as world:
        work(args, world)


if __name__ == "__main__":
    main()
