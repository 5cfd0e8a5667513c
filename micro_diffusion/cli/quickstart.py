"""`micro-diffusion quickstart`: a model from scratch in minutes, and a page that shows what it learnt."""

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from micro_diffusion.cli.generate import Sampling
from micro_diffusion.cli.prepare import AutoencoderName, Device, Prepare
from micro_diffusion.cli.train import train_recipe
from micro_diffusion.runtime.files import UserError, write_atomic

if TYPE_CHECKING:
    from PIL import Image

    from micro_diffusion.training.config import Recipe, Stage

RESOLUTION, STEPS, GUIDANCE, SEED = 128, 20, 1.5, 0
STAGE_PROMPTS = 8
MEMORISES = (
    "At this size the model memorises: it has seen each of these pictures again and again, and draws them from memory "
    "when it is given their captions. That shows that every part works, from the pictures to the sampler. It does not "
    "show that the model can draw what it never saw: that takes more pictures and more time, as in the commands below."
)
WITHIN = "Stages differ in resolution and masking, so losses compare within a stage only."


@dataclass(frozen=True)
class Quickstart:
    """Train a small model from scratch through four stages on 150 drawings, and report. Run again, it goes on."""

    out: Annotated[Path, arg(metavar="FOLDER")] = Path("quickstart")
    """Folder for the store, the run, the pictures and report.html."""
    length: float = 1.0
    """Length of training, as a multiple of the recipe's (about five minutes of two CPU cores)."""
    autoencoder: AutoencoderName = "embedded"
    device: Device = "auto"

    def __call__(self) -> None:
        from micro_diffusion.recipes.recipe import RECIPES
        from micro_diffusion.runtime.log import read_log
        from micro_diffusion.runtime.report import loss_curve, pairs_grid, png_bytes, table_grid

        if self.length <= 0:
            raise UserError("--length must be above 0.")
        recipe = replace(scaled(RECIPES["quickstart"](), self.length), autoencoder=self.autoencoder)
        run, store, seconds, started = self.out / "run", self.out / "store", dict[str, float](), time.monotonic()
        source = Prepare("emoji", store, subset="quickstart", autoencoder=self.autoencoder, device=self.device)
        source()
        seconds["prepare"] = time.monotonic() - started
        train_recipe(recipe, [str(store)], run, device=self.device)
        seconds["train"] = time.monotonic() - started - sum(seconds.values())
        captions, true = true_pictures(source)
        some = [i * len(captions) // STAGE_PROMPTS for i in range(STAGE_PROMPTS)]
        drawn = draw(run / "model", captions, device=self.device)
        stages = {
            stage.name: draw(run / f"model-stage-{number}", [captions[i] for i in some], device=self.device)
            for number, stage in enumerate(recipe.stages, 1)
        }
        seconds["draw"] = time.monotonic() - started - sum(seconds.values())
        nearest, psnr = compare(drawn, true)
        results: dict[str, Any] = {
            "pictures": len(captions),
            "nearest_is_own": sum(i == n for i, n in enumerate(nearest)) / len(captions),
            "median_psnr_db": statistics.median(psnr),
            "images_seen": recipe.images,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "peak_memory_gb": peak_memory_gb(),
            "machine": machine(self.device),
            "each": [
                {"caption": caption, "psnr_db": round(value, 2), "nearest": captions[n]}
                for caption, value, n in zip(captions, psnr, nearest, strict=True)
            ],
        }
        marks = [(end - stage.images, stage.name) for stage, end in zip(recipe.stages, recipe.ends, strict=True)]
        rows = [[*(drawings[k] for drawings in stages.values()), true[i]] for k, i in enumerate(some)]
        figures: dict[str, Image.Image | str] = {
            "grid.png": pairs_grid(drawn, true, captions),
            "stages.png": table_grid(rows, [captions[i] for i in some], [*stages, "true picture"]),
            "loss.svg": loss_curve({"training loss": read_log(run / "log.jsonl")}, marks=marks),
        }
        for name, picture in figures.items():
            write_atomic(self.out / name, picture if isinstance(picture, str) else png_bytes(picture))
        write_atomic(self.out / "results.json", json.dumps(results, indent=2) + "\n")
        write_atomic(self.out / "report.html", page(recipe, results, figures, run=run))
        print(f"{verdict(results)} See {self.out / 'report.html'}")


def verdict(results: Mapping[str, Any]) -> str:
    """How well the pictures were learnt, in a sentence."""
    count, own, psnr = (results[name] for name in ("pictures", "nearest_is_own", "median_psnr_db"))
    return f"{own:.0%} of the {count} pictures are nearest to their own true picture; median PSNR {psnr:.1f} dB."


def scaled(recipe: "Recipe", length: float) -> "Recipe":
    """The recipe with every stage, warm-up and interval `length` times as long, in whole batches."""
    from micro_diffusion.training.config import INTERVALS

    def times(images: int, batch: int) -> int:
        return round(images * length / batch) * batch

    def longer(stage: "Stage") -> "Stage":
        batch = stage.batch_size
        return replace(
            stage, images=max(math.floor(stage.images * length / batch + 1e-9), 2) * batch,
            mask_schedule=tuple((times(start, batch), ratio) for start, ratio in stage.mask_schedule),
            warmup_images=times(stage.warmup_images, batch), ema_start_images=times(stage.ema_start_images, batch),
            ema_halflife_images=stage.ema_halflife_images and max(1, times(stage.ema_halflife_images, 1)),
        )  # fmt: skip

    if length == 1:
        return recipe
    shorter = replace(recipe, stages=tuple(map(longer, recipe.stages)))
    return replace(shorter, **{name: min(getattr(recipe, name), shorter.images) for name in INTERVALS})


def true_pictures(source: Prepare) -> "tuple[list[str], list[Image.Image]]":
    """Captions and pictures of the source, as training saw them."""
    from PIL import Image

    from micro_diffusion.data.records import decode_image, resize_crop

    records = list(source.open(source.source))
    squares = [Image.fromarray(resize_crop(decode_image(record), RESOLUTION)) for record in records]
    return [str(record.captions[0].text) for record in records], squares


def draw(model: Path, captions: Sequence[str], *, device: str) -> "list[Image.Image]":
    """One picture a caption."""
    from micro_diffusion.runtime.report import pictures

    generate = Sampling(device=device).load(str(model)).generate
    return pictures(generate(captions, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=SEED, batch_size=64))


def compare(drawn: "Sequence[Image.Image]", true: "Sequence[Image.Image]") -> tuple[list[int], list[float]]:
    """For each drawn picture the index of the nearest true one, in pixels, and its PSNR to its own, in dB."""
    import numpy as np

    a, b = (np.stack([np.asarray(picture, np.float32).ravel() / 255 for picture in some]) for some in (drawn, true))
    error = np.stack([np.square(row - b).mean(1) for row in a])
    return error.argmin(1).tolist(), (-10 * np.log10(np.maximum(error.diagonal(), 1e-10))).tolist()


def peak_memory_gb() -> float | None:
    """The most memory that this process has held; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def machine(device: str) -> dict[str, str]:
    """Hardware and versions."""
    import torch

    from micro_diffusion.runtime.device import pick_device
    from micro_diffusion.runtime.hardware import device_name

    return {
        "device": f"{platform.machine()} {device_name(pick_device(device))}",
        "cores": f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}",
        "system": f"{platform.system()}, Python {platform.python_version()}",
        **{package: version(package) for package in ("torch", "diffusers", "transformers")},
    }


def page(recipe: "Recipe", results: Mapping[str, Any], figures: "Mapping[str, Image.Image | str]", *, run: Path) -> str:
    """report.html."""
    from micro_diffusion.runtime.report import commands, facts, figure, html_page, paragraph

    model, minutes = recipe.model, sum(results["seconds"].values()) / 60
    lead = "A diffusion transformer, trained from scratch on drawings through the four stages of MicroDiT. "
    settings = {
        "model": f"{model.depth} blocks, {model.dim} wide, patches of {model.patch_size} x {model.patch_size} latents",
        "sampling": f"{STEPS} Heun steps, guidance {GUIDANCE:g}, seed {SEED}",
        "autoencoder, text encoder": f"{recipe.autoencoder}, {recipe.text_encoder}",
    }
    for number, stage in enumerate(recipe.stages, 1):
        rates = f"{stage.mask_ratio:.0%} of the patches dropped, learning rate {stage.learning_rate:g}"
        settings[f"stage {number}: {stage.name}"] = f"{stage.images:,} images, batch {stage.batch_size}, {rates}"
    used = {f"seconds to {name}": value for name, value in results["seconds"].items()}
    used |= {"peak memory": f"{results['peak_memory_gb']} GB", **results["machine"]}
    go_on = [
        f'micro-diffusion generate --model {run} --template "{{}}, in {{}} style" --fill "a red apple|a cat" '
        '--fill "noto|twemoji"',
        "micro-diffusion prepare emoji --out emoji-store",
        "micro-diffusion train emoji --store emoji-store --run emoji-run     # one GPU",
        "micro-diffusion prepare path/to/your/pictures --out my-store",
    ]
    grid = figure(figures["grid.png"], alt="Pairs of a drawn and a true picture, with the prompt under each pair",
                  caption="Left in each pair: drawn by the model from the prompt. Right: the true one.")  # fmt: skip
    stages = figure(figures["stages.png"], caption="The same prompts and noise after each of the four stages.",
                    alt="A row for each of some prompts, a column for each stage, the true picture last")  # fmt: skip
    sections = {
        "What it drew": paragraph(MEMORISES) + grid,
        "What each stage could draw": stages,
        "Loss": figure(figures["loss.svg"], alt="Training loss over images seen", caption=WITHIN),
        "Settings": facts(settings),
        f"Time and machine: {minutes:.1f} minutes": facts(used),
        "Go on from here": commands(go_on),
    }
    return html_page("A text-to-image model in minutes", lead + verdict(results), sections)
