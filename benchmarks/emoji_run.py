"""The real run: `python -m benchmarks.emoji_run --out DIR` trains the recipe `emoji` on the whole embedded split.

Prepares the stores (each drawing with varied copies, and scenes), trains the four stages, draws held-out pairs and a
table of subjects by styles at several guidance scales, and leaves pictures, curves and results.json. With --seconds the
stages are tried first, for a few steps each, and all made longer or shorter together, so that training takes about as
long. Run again, it goes on.
"""

import argparse
import itertools
import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.quality_data import Data, composed
from benchmarks.step import machine
from micro_diffusion.cli.prepare import SourceOptions
from micro_diffusion.cli.quickstart import compare, scaled
from micro_diffusion.cli.train import override, train_recipe
from micro_diffusion.data.prepare import prepare
from micro_diffusion.data.records import Record, decode_image, resize_crop
from micro_diffusion.data.sources.emoji import emoji_records
from micro_diffusion.models.autoencoders import load_autoencoder
from micro_diffusion.models.flops import parameters
from micro_diffusion.models.model import LatentDiffusion
from micro_diffusion.models.text_encoders import load_text_encoder
from micro_diffusion.recipes.recipe import RECIPES
from micro_diffusion.runtime.device import pick_device
from micro_diffusion.runtime.log import read_log
from micro_diffusion.runtime.report import curve_svg, pairs_grid, pictures, png_bytes, table_grid
from micro_diffusion.training.config import Recipe

PAIRS, STEPS, SEED = 40, 30, 0
STYLES = ("noto", "noto v1", "fluent flat", "fluent gradient", "fluent 3d", "twemoji", "emojione")
SUBJECTS = ("a red apple", "a fox", "an octopus", "a sailboat", "a birthday cake", "a robot", "a castle")


def true_picture(record: Record) -> Image.Image:
    """The drawing as training sees it."""
    return Image.fromarray(resize_crop(decode_image(record), 128))


def prepare_shard(out: Path, shard: int, args: argparse.Namespace) -> None:
    """Every n-th run of records, as many as a drawing and its copies, as a store of its own."""
    torch.set_num_threads(1 if args.shards > 1 else torch.get_num_threads())
    device = pick_device(args.device)
    autoencoder, text_encoder = load_autoencoder(args.autoencoder, device=device), load_text_encoder(device=device)
    records = itertools.islice(emoji_records(augment=args.augment), args.limit)
    group = args.augment + 1
    drawings = (record for index, record in enumerate(records) if index // group % args.shards == shard)
    composed_here = composed(Data(0, args.scenes, None, args.shards), shard)
    composed_here = (record for record in composed_here if record.split == "train")
    for name, some in (("emoji", drawings), ("emoji-scenes", composed_here)):
        if name == "emoji" or args.scenes:
            prepare(
                some, out / name, resolutions=(64, 128), encode_images=autoencoder.encode,
                encode_text=text_encoder.encode, info=SourceOptions().info(name, autoencoder, text_encoder),
                batch_size=256, workers=2, device=device,
            )  # fmt: skip
    print(f"{out} is prepared", flush=True)


def fitted(recipe: Recipe, stores: list[str], out: Path, args: argparse.Namespace) -> Recipe:
    """The recipe, its stages all scaled alike so that they take args.seconds; the speeds are kept in probe.json."""
    known = out / "probe.json"
    if not known.exists():
        stages = tuple(
            replace(stage, images=60 * stage.batch_size, warmup_images=0, ema_start_images=0) for stage in recipe.stages
        )
        short = replace(
            recipe, stages=stages, log_every=10 * stages[0].batch_size, sample_every=0, validate_every=0,
            checkpoint_every=sum(stage.images for stage in stages),
        )  # fmt: skip
        context = multiprocessing.get_context("spawn")  # a process of its own: the run compiles anew, from the cache
        trial = context.Process(
            target=train_recipe, args=(short, stores, out / "probe"), kwargs={"device": args.device}
        )
        trial.start()
        trial.join()
        if trial.exitcode:
            raise SystemExit(f"The trial of the stages ended with exit code {trial.exitcode}.")
        known.write_text(json.dumps(speeds(out / "probe", short), indent=2) + "\n")
    speed = json.loads(known.read_text())
    whole = sum(stage.images / speed[stage.name] for stage in recipe.stages)
    print(f"images/s by stage: {speed}; the recipe as it is would take {whole:.0f} s", flush=True)
    return scaled(recipe, args.seconds / whole)


def draw(model: LatentDiffusion, prompts: list[str], guidance: float) -> list[Image.Image]:
    """One picture a prompt, seeds in order."""
    images = model.generate(prompts, num_inference_steps=STEPS, guidance_scale=guidance, seed=SEED, batch_size=64)
    return pictures(images)


def curves(run: Path, recipe: Recipe) -> dict[str, str]:
    """Training and validation loss over images seen, as SVG."""
    rows = read_log(run / "log.jsonl")
    marks = [(end - stage.images, stage.name) for stage, end in zip(recipe.stages, recipe.ends, strict=True)]
    lines = {
        "training": [(row["images"], row["loss"]) for row in rows if row["loss"]],
        "held-out, no mask": [(row["images"], row["validation"]) for row in rows if "validation" in row],
    }
    return {"loss.svg": curve_svg(lines, title="Loss", x_label="images seen", y_label="loss", marks=marks)}


def speeds(run: Path, recipe: Recipe) -> dict[str, float]:
    """Median images a second of each stage's log rows (the first row of a stage compiles)."""
    found: dict[str, list[float]] = {stage.name: [] for stage in recipe.stages}
    for row in read_log(run / "log.jsonl"):
        found[row["stage"]].append(row["images_per_second"])
    return {name: sorted(values)[len(values) // 2] for name, values in found.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--autoencoder", default="embedded")
    parser.add_argument("--augment", type=int, default=15, help="varied copies of each drawing")
    parser.add_argument("--shards", type=int, default=1, help="processes that prepare, each a store of its own")
    parser.add_argument("--limit", type=int, help="only so many records, copies counted: a rehearsal")
    parser.add_argument("--scenes", type=int, default=60_000, help="composed scenes beside the drawings")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--length", type=float, default=1.0, help="times as long as the recipe")
    length.add_argument("--seconds", type=float, help="of training, compilation not counted")
    parser.add_argument("--set", nargs="*", default=[], help="changes of the recipe, as in micro-diffusion train")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 1.5, 5.0])
    args = parser.parse_args()
    recipe = replace(override(RECIPES["emoji"](), args.set), autoencoder=args.autoencoder)
    run, started = args.out / "run", time.monotonic()
    shards = [args.out / f"store-{shard}" for shard in range(args.shards)]
    with multiprocessing.get_context("spawn").Pool(args.shards) as pool:
        pool.starmap(prepare_shard, [(folder, shard, args) for shard, folder in enumerate(shards)])
    prepared = time.monotonic()
    stores = [str(folder / name) for name in ("emoji", "emoji-scenes") for folder in shards if (folder / name).exists()]
    recipe = fitted(recipe, stores, args.out, args) if args.seconds else scaled(recipe, args.length)
    tried = time.monotonic()
    train_recipe(recipe, stores, run, device=args.device)
    trained = time.monotonic()

    model = LatentDiffusion.from_checkpoint(str(run), device=pick_device(args.device))
    held_out = list(emoji_records(split="held_out_pair"))
    shown = [held_out[i * len(held_out) // PAIRS] for i in range(PAIRS)]
    seen = list(emoji_records(split="train"))
    seen = [seen[i * len(seen) // PAIRS] for i in range(PAIRS)]
    results: dict[str, Any] = {
        "machine": machine(model.device.type),
        "recipe": json.loads(recipe.to_json()),
        "parameters": parameters(recipe.model)._asdict(),
        "seconds": {"prepare": prepared - started, "try": tried - prepared, "train": trained - tried},
        "images_per_second": speeds(run, recipe),
        "images": recipe.images,
        "sampling": f"{STEPS} Heun steps, seed {SEED}",
        "nearest_is_own": {},
    }
    for name, svg in curves(run, recipe).items():
        (args.out / name).write_text(svg)
    for guidance in args.guidance:
        for name, records in (("held-out", shown), ("trained", seen)):
            prompts = [str(record.captions[0].text) for record in records]
            drawn, true = draw(model, prompts, guidance), [true_picture(record) for record in records]
            (args.out / f"{name}-{guidance:g}.png").write_bytes(png_bytes(pairs_grid(drawn, true, prompts)))
            nearest, _ = compare(drawn, true)
            own = sum(i == n for i, n in enumerate(nearest)) / PAIRS
            results["nearest_is_own"][f"{name}, guidance {guidance:g}"] = own
        prompts = [f"{subject}, in {style} style" for subject in SUBJECTS for style in STYLES]
        drawn = draw(model, prompts, guidance)
        rows = [drawn[i : i + len(STYLES)] for i in range(0, len(drawn), len(STYLES))]
        (args.out / f"styles-{guidance:g}.png").write_bytes(png_bytes(table_grid(rows, SUBJECTS, STYLES)))
        results["seconds"]["draw"] = time.monotonic() - trained
        (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({key: value for key, value in results.items() if key != "recipe"}, indent=2))


if __name__ == "__main__":
    main()
