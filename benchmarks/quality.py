"""The measuring stick: what a recipe is worth at equal GPU-seconds.

    python -m benchmarks.quality --out quality.jsonl --data DIR --recipes baseline no-mixer --seeds 0 1

Every stage of a recipe is timed on throw-away weights, once it is compiled; then its stages are scaled together so
that training takes `--seconds` of one GPU. The model of each run, or its averages, is scored: loss at fixed noise on a
slice of the training drawings that was kept aside, on held-out pairs and on held-out scenes; held-out and seen pairs by
the embedded judges, and scenes of six tasks by the embedded detector. A line is appended to the file after each run,
and what is there is not run again. Without --recipes the data are only prepared, with --probe the stages only timed.
"""

import argparse
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.quality_data import RESOLUTION, Data, hold, prepare_data
from benchmarks.quality_train import MODES, Trainer, at_rate, fitted
from benchmarks.step import machine
from micro_diffusion.cli.train import override
from micro_diffusion.models.autoencoders import Autoencoder, load_autoencoder
from micro_diffusion.models.checkpoints import ModelCard, Part, write_folder
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.flops import parameters
from micro_diffusion.models.model import LatentDiffusion
from micro_diffusion.models.text_encoders import EMBEDDED, TextEncoder, load_text_encoder
from micro_diffusion.recipes.recipe import RECIPES
from micro_diffusion.runtime.device import pick_device
from micro_diffusion.runtime.files import UserError, write_atomic
from micro_diffusion.runtime.log import read_log
from micro_diffusion.training.config import Recipe

if TYPE_CHECKING:
    from benchmarks.quality_score import Sampling

CUTS: dict[str, bool | str] = {"none": False, "both": True, "style": "style"}
SPARE = 75.0  # seconds that a run may need besides training: to compile, validate, score


@dataclass(frozen=True)
class Job:
    """One run: a line of the results."""

    recipe: str
    rate: float | None  # of the first stage, the others in proportion; None is the recipe's own
    seed: int
    seconds: float
    scenes: float  # share of the images
    settings: tuple[str, ...]
    cut: bool | str = False  # whether some captions leave out the style or the concept; "style": the concept only

    def asked(self) -> dict[str, Any]:
        """As it is written down, and found again."""
        return {**vars(self), "settings": list(self.settings)}

    def make(self) -> Recipe:
        """The recipe, before it is fitted to the seconds; UserError for one that this command cannot run."""
        recipe = override(RECIPES[self.recipe](), [*self.settings, f"seed={self.seed}"])
        odd = any(stage.resolution != RESOLUTION or stage.mask_schedule for stage in recipe.stages)
        if odd or any(stage.start != "all_but_schedule" for stage in recipe.stages[1:]):
            raise UserError(
                f"{self.recipe}: this needs stages at {RESOLUTION} px without mask_schedule, each after the one before."
            )
        return recipe if self.rate is None else at_rate(recipe, self.rate)


class Bench:
    """The parts that all runs share, and where their results go."""

    def __init__(self, args: argparse.Namespace, sampling: "Sequence[Sampling]") -> None:
        from benchmarks.quality_score import Judges

        self.args, self.sampling, self.device = args, sampling, pick_device(args.device)
        self.judges = Judges(self.device, args.judges, args.per_task, args.limit)
        self.autoencoder = load_autoencoder(device=self.device)
        self.text_encoder = load_text_encoder(args.text_encoder, device=self.device)
        one = partial(hold, args.data, device=self.device)
        self.checked = {
            "slice": one("drawings", "slice"), "held-out pairs": one("drawings", "held_out_pair"),
            "held-out scenes": one("scenes", "scene"),
        }  # fmt: skip
        self.held = one("drawings", "train"), one("scenes", "train")
        self.trainer = self.fresh_trainer(args.mode)

    def fresh_trainer(self, mode: str) -> Trainer:
        """One that has compiled nothing yet."""
        return Trainer(self.held, (0.5, 0.5), self.device, mode=mode, profiled=self.args.profile)

    def check(self, dit: DiT, recipe: Recipe) -> dict[str, float]:
        """Validation losses of weights."""
        from benchmarks.quality_score import validation_loss

        return {name: validation_loss(dit, held, recipe) for name, held in self.checked.items()}

    def progress(self, dit: DiT, recipe: Recipe) -> dict[str, float]:
        """Validation losses on the way; if asked, also what the judges say of drawings."""
        losses = self.check(dit, recipe)
        return losses | (self.judges.of_drawings(self.model(dit, recipe), self.sampling[0]) if self.args.watch else {})

    def model(self, dit: DiT, recipe: Recipe) -> LatentDiffusion:
        """Weights with all that it takes to draw."""
        return LatentDiffusion(
            dit, recipe.make_objective(recipe.stages[-1]), load_vae=lambda: self.autoencoder,
            load_text_encoder=lambda: self.text_encoder, text_length=recipe.text_length, precision=recipe.precision,
        )  # fmt: skip

    def probe(self, job: Job) -> Iterator[dict[str, Any]]:
        """How fast each stage trains."""
        recipe = job.make()
        for stage in recipe.stages:
            speed = self.trainer.speed(recipe, stage)
            yield {"recipe": job.recipe, "stage": stage.name, "mode": self.trainer.mode, **speed._asdict()}

    def do(self, job: Job) -> dict[str, Any]:
        """Train and score; the line of the results."""
        recipe, began = job.make(), time.perf_counter()
        self.trainer.shares = 1 - job.scenes, job.scenes
        self.trainer.held = [each.keep(job.cut) for each in self.held]
        speeds = [self.trainer.speed(recipe, stage) for stage in recipe.stages]
        recipe = fitted(recipe, [speed.images_per_second for speed in speeds], job.seconds)
        state, rows, used = self.trainer.run(recipe, lambda state: self.progress(state.shown, recipe))
        trained = time.perf_counter()
        dits = {"weights": state.dit}
        if state.ema:
            widths = recipe.stages[-1].ema_sigma_rel or ["average"]
            dits = {str(width): dit for width, dit in zip(widths, state.ema.dits, strict=True)} | dits
        if self.args.save:
            self.save(self.args.save / name_of(job), recipe, state.shown.state_dict(), images=state.images, rows=rows)
        shown = [name for name in dits if name != "weights"] or ["weights"]
        scores = [score for name in shown for score in self.scores(dits[name], recipe, name)]
        return {
            "asked": job.asked(), "seconds_used": used, "seconds_besides": time.perf_counter() - began - used,
            "seconds_to_score": time.perf_counter() - trained, "images": recipe.images,
            "stages": [
                {"name": stage.name, "images": stage.images, **speed._asdict()}
                for stage, speed in zip(recipe.stages, speeds, strict=True)
            ],
            "validation": {name: self.check(dit, recipe) for name, dit in dits.items()},
            "scores": scores, "rows": rows, "recipe": json.loads(recipe.to_json()),
            "parameters": parameters(recipe.model).total, "machine": machine(self.device.type),
            "mode": self.trainer.mode,
        }  # fmt: skip

    def scores(self, dit: DiT, recipe: Recipe, name: str) -> Iterator[dict[str, Any]]:
        """What the judges say of a model, for each way of sampling."""
        model = self.model(dit, recipe)
        for sampling in self.sampling:
            yield {"weights": name, "sampling": str(sampling), **self.judges.score(model, sampling)}

    def rescore(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Score a saved model again."""
        model = LatentDiffusion.from_checkpoint(str(folder), device=self.device)
        for sampling in self.sampling:
            yield {"model": folder.name, "sampling": str(sampling), **self.judges.score(model, sampling)}

    def save(
        self, folder: Path, recipe: Recipe, weights: dict[str, torch.Tensor], *, images: int, rows: list[dict[str, Any]]
    ) -> None:
        """A run folder with its model in float16, recipe and log."""
        write_run(folder, recipe, weights, self.autoencoder, self.text_encoder, images=images, rows=rows)


def write_run(
    folder: Path, recipe: Recipe, weights: dict[str, torch.Tensor], autoencoder: Autoencoder,
    text_encoder: TextEncoder, *, images: int, rows: list[dict[str, Any]],
) -> None:  # fmt: skip
    """A run folder: the model in float16, the recipe, the log."""
    stage = recipe.stages[-1]
    card = ModelCard(
        dit=recipe.stage_model(stage, downscale=autoencoder.downscale), objective=recipe.make_objective(stage),
        autoencoder=Part(recipe.autoencoder, autoencoder.sha256),
        text_encoder=Part(recipe.text_encoder, text_encoder.sha256),
        resolution=stage.resolution, images_seen=images, recipe=recipe.name, text_length=recipe.text_length,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder / "model", {name: tensor.half() for name, tensor in weights.items()}, card=card)
    write_atomic(folder / "recipe.json", recipe.to_json())
    write_atomic(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def name_of(job: Job) -> str:
    """`baseline-0.0016-seed-1-95s-scenes-0.5`; other settings are told apart by their hash."""
    rate = [] if job.rate is None else [f"{job.rate:g}"]
    other = [hashlib.sha256(json.dumps(job.settings).encode()).hexdigest()[:6]] if job.settings else []
    other += [f"cut-{job.cut}" if isinstance(job.cut, str) else "cut"] if job.cut else []
    return "-".join([job.recipe, *rate, f"seed-{job.seed}", f"{job.seconds:g}s", f"scenes-{job.scenes:g}", *other])


def jobs(args: argparse.Namespace) -> list[Job]:
    """In the order in which they are worth most if the machine goes: all recipes and rates with one seed first."""
    return [
        Job(recipe, rate, seed, args.seconds, args.scenes, tuple(args.set), CUTS[cut])
        for seed, rate, recipe, cut in itertools.product(args.seeds, args.rates or [None], args.recipes, args.cut)
    ][args.share[0] :: args.share[1]]


def summary(row: dict[str, Any]) -> str:
    """A line for people."""
    asked, losses = row["asked"], next(iter(row["validation"].values()))
    told = (
        f"{asked['recipe']} rate {asked['rate'] or row['recipe']['stages'][0]['learning_rate']:g} seed {asked['seed']}"
    )
    told += f": {row['seconds_used']:.1f} s, {row['images']:,} images, loss "
    told += ", ".join(f"{value:.4f} ({name})" for name, value in losses.items())
    for score in row["scores"]:
        names = ("concept top-1, held-out pairs", "style, held-out pairs", "both, seen pairs", "both, slice", "overall")
        found = ", ".join(f"{name} {score[name]:.3f}" for name in names if name in score)
        told += f"\n    {score['weights']}, {score['sampling']}: {found}"
    return told


def append(file: Path, row: dict[str, Any]) -> None:
    """One whole line at once: two processes may share the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as out:
        out.write(f"{json.dumps(row)}\n".encode())


def share(text: str) -> tuple[int, int]:
    """`0/2` as (0, 2)."""
    part, parts = map(int, text.split("/"))
    return part, parts


def interval(text: str) -> tuple[float, float] | None:
    """`0.2:5` as (0.2, 5.0), `all` as None."""
    if text == "all":
        return None
    low, high = map(float, text.split(":"))
    return low, high


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What is prepared, and by how many processes."""
    parser.add_argument("--augment", type=int, default=11, help="varied copies of each drawing")
    parser.add_argument("--count", type=int, default=60_000, help="scenes to prepare")
    cores = os.cpu_count() or 4
    parser.add_argument("--processes", type=int, default=max(1, min(48, cores - 2)), help="that prepare")
    parser.add_argument("--limit", type=int, help="so many drawings, scenes and prompts only: a rehearsal")
    parser.add_argument("--text-encoder", default=EMBEDDED, help="such as embedded?layer=-2")


def data_of(args: argparse.Namespace) -> Data:
    """What these options ask for; the recipes learn of another text encoder."""
    if args.text_encoder != EMBEDDED:
        args.set = [*args.set, f"text_encoder={args.text_encoder}"]
    return Data(args.augment, args.count, args.limit, args.processes, args.text_encoder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared data; made if it is not there")
    parser.add_argument("--recipes", nargs="*", default=[], choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--rates", nargs="*", type=float, default=[], help="learning rates to try each recipe at")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of training alone")
    parser.add_argument("--set", nargs="*", default=[], help="changes of the recipes, as in micro-diffusion train")
    parser.add_argument("--scenes", type=float, default=0.5, help="share of the images that are scenes")
    parser.add_argument(
        "--cut",
        nargs="+",
        default=["none"],
        choices=CUTS,
        help="both: a quarter of the copies' captions lose the concept or the style; style: an eighth, the concept",
    )
    parser.add_argument("--guidance", nargs="+", type=float, default=[2.0], help="scales to score at")
    parser.add_argument(
        "--interval", nargs="+", type=interval, default=[None], help="noise levels to guide at: all, or LOW:HIGH"
    )
    parser.add_argument("--steps", type=int, default=30, help="sampling steps, of Heun's method")
    parser.add_argument("--per-task", type=int, default=64, help="scenes of each task")
    parser.add_argument("--watch", action="store_true", help="let the judges see drawings on the way, too")
    parser.add_argument("--save", type=Path, help="keep the models of the runs here, as float16")
    parser.add_argument("--rescore", nargs="*", type=Path, default=[], help="saved models to score, after the runs")
    parser.add_argument("--share", type=share, default=(0, 1), help="K/N: every N-th run from the K-th, on N GPUs")
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="begin no run that may end after these seconds"
    )
    parser.add_argument("--probe", action="store_true", help="time the stages of the recipes, train nothing")
    parser.add_argument(
        "--mode",
        default=MODES[0],
        choices=MODES,
        help="how a step runs: as one CUDA graph, or torch.compile's",
    )
    parser.add_argument(
        "--profile", action=argparse.BooleanOptionalAction, default=True, help="measure the GPU's idle time"
    )
    parser.add_argument("--judges", type=Path, help="folder of the judges; default: those of the package")
    parser.add_argument("--device", default="auto")
    add_data_options(parser)
    args = parser.parse_args()
    if not 0 <= args.scenes <= 1:
        parser.error("--scenes is a share, from 0 to 1")
    return args


def main() -> None:
    began, args = time.perf_counter(), arguments()
    device = pick_device(args.device)
    prepare_data(args.data, data_of(args), device.type)
    print(f"data are ready after {time.perf_counter() - began:.0f} s", flush=True)
    there = [row.get("asked") for row in read_log(args.out)]
    wanted = [job for job in jobs(args) if args.probe or job.asked() not in there]
    for job in wanted:
        job.make()  # what cannot run says so before anything does
    if not wanted and not args.rescore:
        print("nothing is left to run")
        return
    from benchmarks.quality_plan import graphs
    from benchmarks.quality_score import Sampling
    from micro_diffusion.evaluation.judges import FOLDER

    args.judges = args.judges or FOLDER
    bench = Bench(args, [
        Sampling(scale, bound, args.steps) for scale, bound in itertools.product(args.guidance, args.interval)
    ])  # fmt: skip
    print(f"held on the device after {time.perf_counter() - began:.0f} s", flush=True)
    compiled, besides = set[Any](), {True: SPARE, False: SPARE}  # seconds, by whether all is compiled that a run needs
    for job in wanted:
        ready = graphs(job) <= compiled
        if args.probe:
            for row in bench.probe(job):
                append(args.out, row)
                print(json.dumps(row), flush=True)
        elif time.perf_counter() - began + job.seconds + besides[ready] > args.until:
            print(f"{name_of(job)} is left for another time", flush=True)
        else:
            row = bench.do(job)
            compiled |= graphs(job)
            besides[ready] = max(besides[ready], row["seconds_besides"])
            append(args.out, row)
            print(summary(row), flush=True)
    for folder in args.rescore:
        for row in bench.rescore(folder):
            append(args.out, row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"quality: {error}") from None
