"""What the fast path costs in accuracy: `python -m benchmarks.numerics --out numerics.json`.

Two questions. Error against float32 (without TF32) of forward pass, loss and gradients, on the same inputs: of bf16
with the plain twin of every kernel, of bf16 with the kernels, and of that compiled; the ratio to the plain path's is to
be at most 1.25. And 200 steps of training on the embedded drawings (quickstart's 156 pictures) with kernels and
without: the last losses are to agree within 1%; a third run keeps the residual stream in float32. On a CPU both paths
are the plain one, and the JSON says so.

A store is made where --store names none; that needs the package's encoders, so make it beforehand for a machine that
lacks them: python -m benchmarks.numerics --store STORE --only-store
"""

import argparse
import contextlib
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks.step import PIXELS, machine
from micro_diffusion.data.loader import Loader
from micro_diffusion.data.store import Store
from micro_diffusion.diffusion.objectives import EDM, Prediction
from micro_diffusion.kernels.launch import plain
from micro_diffusion.models.dit import DiT, conditioned
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.recipes.emoji import emoji
from micro_diffusion.runtime.device import pick_device
from micro_diffusion.runtime.log import read_log
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.loop import train

TEXT_LENGTH, TEXT_WIDTH = 77, 1024
WINDOW = 20  # steps over which losses are averaged before they are compared


class Batch(NamedTuple):
    """Random inputs of a training step."""

    latents: Tensor
    noise: Tensor
    text: Tensor
    normal: Tensor
    mask_noise: Tensor


class Errors:
    """Of several paths against float32, on the same random batches."""

    def __init__(self, preset: str, *, pixels: int, mask_ratio: float, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device, self.mask_ratio, size = device, mask_ratio, pixels // PIXELS
        self.config = PRESETS[preset](
            input_size=size, pos_interp_scale=size / 32, caption_channels=TEXT_WIDTH, text_mask="none"
        )
        with device:
            self.dit = DiT(self.config)
        for parameter in self.dit.parameters():
            if not parameter.any():  # so that every block counts
                nn.init.normal_(parameter, std=0.02)

    def batch(self, images: int) -> Batch:
        """The next random batch."""
        shape = images, self.config.in_channels, *self.config.latent_size
        with self.device:
            latents, noise, text = torch.randn(shape), torch.randn(shape), torch.randn(images, TEXT_LENGTH, TEXT_WIDTH)
            return Batch(latents, noise, text, torch.randn(images), torch.rand(images, self.dit.num_patches))

    def outputs(self, network: DiT, batch: Batch, precision: str) -> dict[str, list[Tensor]]:
        """The network's answer, the loss of each image, all gradients."""
        objective, answers = EDM(), list[Tensor]()
        shown = conditioned(
            network, batch.text, precision=precision, mask_ratio=self.mask_ratio, mask_noise=batch.mask_noise
        )

        def watched(x: Tensor, label: Tensor) -> Prediction:
            prediction = shown(x, label)
            answers.append(prediction.sample.detach().float())
            return prediction

        level = objective.noise_level(batch.normal)
        losses = objective.loss(watched, batch.latents, level, batch.noise, patch_size=self.config.patch_size)
        losses.mean.backward()
        gradients = [cast(Tensor, parameter.grad) for parameter in self.dit.parameters()]
        self.dit.zero_grad(set_to_none=True)
        return {"forward": answers, "loss": [losses.per_image.detach()], "gradients": gradients}

    def measure(self, paths: Sequence[str], *, images: int, batches: int) -> dict[str, dict[str, float]]:
        """Relative errors by path and quantity: the norm of the difference over the norm, all batches together."""
        torch.compiler.reset()
        networks = {
            path: cast(DiT, torch.compile(self.dit, dynamic=False)) if "compiled" in path else self.dit
            for path in paths
        }
        off: dict[str, Counter[str]] = {path: Counter() for path in paths}
        whole, before = Counter[str](), torch.get_float32_matmul_precision()
        for _ in range(batches):
            batch = self.batch(images)
            torch.set_float32_matmul_precision("highest")
            with plain():
                exact = self.outputs(self.dit, batch, "float32")
            torch.set_float32_matmul_precision(before)
            for kind, tensors in exact.items():
                whole[kind] += squares(tensors)
            for path, network in networks.items():
                with plain() if path.startswith("plain") else contextlib.nullcontext():
                    found = self.outputs(network, batch, "bf16")
                for kind, tensors in found.items():
                    off[path][kind] += squares([a.float() - b for a, b in zip(tensors, exact[kind], strict=True)])
        return {path: {kind: (off[path][kind] / whole[kind]) ** 0.5 for kind in whole} for path in paths}


def squares(tensors: Sequence[Tensor]) -> Any:
    """Sum of the squares of all numbers."""
    return sum(tensor.square().sum().item() for tensor in tensors)


def compare_errors(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each model and mask ratio: errors, and their ratios to the plain path's."""
    rows = []
    for preset in args.model:
        for mask_ratio in args.masks:
            errors = Errors(preset, pixels=args.pixels, mask_ratio=mask_ratio, device=device)
            found = errors.measure(args.paths, images=args.images, batches=args.batches)
            ratios = {
                path: {kind: value / found["plain"][kind] for kind, value in values.items()}
                for path, values in found.items()
            }
            rows.append({"preset": preset, "mask_ratio": mask_ratio, "errors": found, "ratios": ratios})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def recipe_of(args: argparse.Namespace, device: torch.device) -> Recipe:
    """A stage of the recipe `emoji` at 128 px with another model and batch, every step logged."""
    gpu, batch, whole = device.type == "cuda", args.batch_size, emoji()
    model = PRESETS[args.train_model](in_channels=4, caption_channels=whole.model.caption_channels, text_mask="padding")
    stage = Stage("numerics", resolution=128, images=args.steps * batch, batch_size=batch, mask_ratio=args.train_mask,
                  learning_rate=args.rate, warmup_images=args.steps // 10 * batch, start="scratch",
                  pos_interp_scale=2.0)  # fmt: skip
    return replace(whole, model=model, stages=(stage,), log_every=batch, checkpoint_every=0, sample_every=0,
                   validate_every=0, compile=gpu, precision=args.precision)  # fmt: skip


def losses(recipe: Recipe, store: Store, device: torch.device, *, path: str) -> list[float]:
    """The training loss of every step, by the package's own loop."""
    (name,) = store.info.text_encoders
    loader = Loader(
        [store], resolution=128, text_encoder=name, seed=recipe.seed, split="train", text_length=recipe.text_length
    )
    torch.compiler.reset()
    if path == "float32 residual":
        recipe = replace(recipe, model=replace(recipe.model, float32_residual=True))
    with plain() if path == "plain" else contextlib.nullcontext(), tempfile.TemporaryDirectory() as folder:
        train(
            recipe, run=Path(folder), loaders={128: loader}, downscale=PIXELS, device=device,
            release=lambda *_: None,
        )  # fmt: skip
        return [row["loss"] for row in read_log(Path(folder) / "log.jsonl")]


def compare_training(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Losses of the paths from the same start on the same batches and draws, and how far the last ones lie apart."""
    recipe, store = recipe_of(args, device), Store.open(args.store)
    runs = {path: losses(recipe, store, device, path=path) for path in ("plain", "fast", "float32 residual")}
    last = {path: statistics.fmean(values[-WINDOW:]) for path, values in runs.items()}
    return {
        "preset": args.train_model, "batch_size": args.batch_size, "steps": args.steps, "mask_ratio": args.train_mask,
        "last_loss": last, "difference": last["fast"] / last["plain"] - 1,
        "of_float32_residual": last["float32 residual"] / last["fast"] - 1, "losses": runs,
    }  # fmt: skip


def make_store(folder: Path) -> None:
    """The quickstart's 156 drawings as a latent store; whole already, it is left alone."""
    if not (folder / "store.json").exists():
        from micro_diffusion.cli.prepare import Prepare

        Prepare("emoji", folder, subset="quickstart")()


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("numerics.json"))
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--store", type=Path, default=Path("numerics-store"), help="made where there is none")
    parser.add_argument("--only-store", action="store_true", help="make the store and end")
    parser.add_argument("--parts", nargs="+", default=["errors", "training"], choices=["errors", "training"])
    toy = ["MicroDiT_Nano_4"]
    parser.add_argument(
        "--model", nargs="+", default=["MicroDiT_Small_2", "MicroDiT_XL_2"] if gpu else toy, choices=PRESETS
    )
    parser.add_argument("--masks", type=float, nargs="+", default=[0.75])
    parser.add_argument("--pixels", type=int, default=256 if gpu else 128)
    parser.add_argument("--images", type=int, default=16 if gpu else 4, help="of a batch whose errors are measured")
    parser.add_argument("--batches", type=int, default=8 if gpu else 2)
    parser.add_argument("--paths", nargs="+", default=["plain", "fast", "fast, compiled"] if gpu else ["plain", "fast"])
    parser.add_argument("--train-model", default="MicroDiT_Small_2" if gpu else toy[0], choices=PRESETS)
    parser.add_argument("--train-mask", type=float, default=0.75 if gpu else 0.5)
    parser.add_argument("--batch-size", type=int, default=256 if gpu else 8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument(
        "--precision", default="bf16" if gpu else "float32", choices=["bf16", "float32"], help="of training"
    )
    args = parser.parse_args()
    make_store(args.store)
    if args.only_store:
        return
    device = pick_device(args.device)
    same = None if device.type == "cuda" else "no GPU here: both paths are the plain one"
    result: dict[str, Any] = {"machine": machine(args.device), "note": same}
    result |= {"pixels": args.pixels, "images": args.images, "batches": args.batches}
    for part in args.parts:
        result[part] = (compare_errors if part == "errors" else compare_training)(args, device)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if same:
        print(same)
    if "training" in result:
        print(f"last losses: {result['training']['last_loss']}, apart by {result['training']['difference']:+.2%}")


if __name__ == "__main__":
    main()
