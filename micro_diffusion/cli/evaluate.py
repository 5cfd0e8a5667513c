"""`micro-diffusion evaluate`: pictures of a benchmark's prompts or your own, scored by metrics, with a report."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from micro_diffusion.cli.generate import Sampling
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.parse import choose, read_json

if TYPE_CHECKING:
    import torch

    from micro_diffusion.evaluation.pictures import Benchmark, PictureFolder, Prompt, Scores
    from micro_diffusion.models.dit import DiT
    from micro_diffusion.models.model import LatentDiffusion
    from micro_diffusion.runtime.distributed import World

Score = Callable[["PictureFolder"], "Scores"]
PATIENCE = 7200.0  # seconds that ranks wait for each other
PAPER: dict[str, Any] = {"metrics": ("fid", "clip-score"), "limit": 30_000, "resize": 256, "guidance": (5.0,)}


def emoji(weights: Mapping[str, str], prompts: Path | None) -> "Benchmark":
    from micro_diffusion.evaluation.emoji import EmojiBenchmark, load_network

    load_network("judge")  # before anything is drawn
    return EmojiBenchmark()


def scenes(weights: Mapping[str, str], prompts: Path | None) -> "Benchmark":
    from micro_diffusion.evaluation.scenes import ScenesBenchmark, load_network

    load_network("detector")
    return ScenesBenchmark()


def geneval(weights: Mapping[str, str], prompts: Path | None) -> "Benchmark":
    from micro_diffusion.evaluation.geneval import GenEval, read_metadata

    return GenEval(weights, truths=read_metadata(prompts) if prompts else ())


# each made from the places of weights and a file of prompts
BENCHMARKS = {"emoji": emoji, "scenes": scenes, "geneval": geneval}


@dataclass(frozen=True)
class Evaluate(Sampling):
    """Draw pictures for prompts once, score them and report; the same command goes on. Or compare two reports."""

    model: Annotated[Positional[Path | None], arg(metavar="NAME_OR_PATH")] = None
    """What generate --model takes."""
    benchmark: str | None = None
    """emoji, scenes or geneval: prompts that come with their own score."""
    prompts: Path | None = None
    """In its place: a text file, one prompt a line, a CSV, JSONL or Parquet with captions, COCO's JSON, or a store."""
    metrics: tuple[str, ...] = ()
    """Scores of any pictures, such as fid kid clip-score; see docs/evaluation.md."""
    reference: Path | None = None
    """The true pictures that metrics compare with: a folder, or statistics that were saved of one."""
    preset: Literal["paper"] | None = None
    """paper: 30,000 captions of COCO 2014 (--prompts, --reference) at 256 px; docs/evaluation.md says how."""
    pictures: Path | None = None
    """Score the pictures in this folder, and draw none."""
    limit: int | None = None
    """Only so many of the prompts, spread over all of them."""
    guidance: tuple[float, ...] = ()
    """Guidance scale; several are a sweep. Default: 3."""
    seed: int = 0
    """Other noise than that of seed 0."""
    resize: int | None = None
    """Scale pictures, drawn and true, to squares of so many pixels before metrics see them."""
    weights: tuple[str, ...] = ()
    """Where networks of metrics and benchmarks lie, as NAME=PATH."""
    compare: tuple[Path, Path] | None = None
    """Two folders that evaluate wrote: put their numbers and pictures side by side."""
    out: Path = Path("evaluation")
    """Folder for pictures, report.html and results.json."""

    def __call__(self) -> None:
        from micro_diffusion.evaluation.pictures import PictureFolder
        from micro_diffusion.evaluation.results import COMPARISON, REPORT, Point, compare, write_report
        from micro_diffusion.runtime.distributed import join

        if self.compare:
            for name, (first, second, difference) in compare(*self.compare, self.out).items():
                print(f"{name}: {first}, {second} ({difference})")
            return print(f"The comparison is {self.out / COMPARISON}")
        asked = self.with_preset()
        prompts, scorers = asked.prepared()
        with join(self.device, timeout=PATIENCE) as world:
            folders = {"pictures": self.pictures} if self.pictures else asked.draw(prompts, world)
        if world.rank:
            return
        points = {}
        for label, folder in folders.items():
            pictures = PictureFolder(folder)
            points[label] = Point(pictures, {name: score(pictures) for name, score in scorers.items()})
            for name, scores in points[label].scores.items():
                print(f"{label}, {name} ({scores.protocol}):")
                for number, value in scores.numbers.items():
                    print(f"  {value:<10.4g} {number}")
                for warning in scores.warnings:
                    print(f"{label}, {name}: not comparable: {warning}", file=sys.stderr)
        write_report(self.out, points)
        print(f"The report is {self.out / REPORT}")

    def with_preset(self) -> "Evaluate":
        """With the preset's settings where none are given; UserError for what cannot be measured, or does nothing."""
        given = {name: getattr(self, name) or value for name, value in PAPER.items()} if self.preset else {}
        asked = replace(self, **({"guidance": self.guidance or (3.0,)} | given))
        asks, own, fixed = asked.benchmark or asked.metrics, self.benchmark or self.prompts, self.pictures
        least = min(self.steps, self.batch_size, 1 if self.limit is None else self.limit)
        for wrong, words in (
            (not asks, "There is nothing to measure: name a --benchmark, or --metrics."),
            (self.preset and not ((own or fixed) and self.reference), "The preset needs --prompts and --reference."),
            (fixed and (self.model or self.prompts or self.limit), "--pictures need no model, --prompts or --limit."),
            (not fixed and not (self.model and own), "Name a model and a --benchmark or --prompts, or --pictures."),
            (self.benchmark not in (None, "geneval") and self.prompts, "A --benchmark has its own prompts."),
            (not all("=" in place for place in self.weights), "--weights must be written as NAME=PATH."),
            (least < 1, "--steps, --batch-size and --limit must be at least 1."),
        ):
            if wrong:
                raise UserError(words)
        return asked

    def prepared(self) -> "tuple[list[Prompt], dict[str, Score]]":
        """What to draw, and by metric what scores a folder; UserError for an unknown name or missing prompts."""
        from micro_diffusion.evaluation.pictures import PictureFolder, Prompt
        from micro_diffusion.runtime.device import pick_device
        from micro_diffusion.runtime.random import derive_seed

        device, scorers = pick_device(self.device), dict[str, Score]()
        places = dict(place.split("=", 1) for place in self.weights)
        if self.benchmark:
            benchmark = choose(BENCHMARKS, self.benchmark, "benchmark")(places, self.prompts)
            scorers[self.benchmark] = partial(benchmark.score, device=device)
            prompts = [] if self.pictures else benchmark.prompts()
        else:
            texts = captions(self.prompts) if self.prompts else []
            prompts = [Prompt(text, index) for index, text in enumerate(texts)]
        if self.metrics:
            from micro_diffusion.evaluation.metrics import METRICS, Moments, Settings

            settings, true = Settings(device, self.batch_size, places, self.resize), self.reference
            reference = (PictureFolder(true) if true.is_dir() else Moments.load(true)) if true else None
            chosen = {name: choose(METRICS, name, "metric") for name in self.metrics}
            for name in (name for name in METRICS if name in chosen):
                scorers[name] = partial(chosen[name], reference=reference, settings=settings)
        if self.seed:
            prompts = [prompt._replace(seed=derive_seed(self.seed, prompt.seed)) for prompt in prompts]
        return spread(prompts, self.limit), scorers

    def draw(self, prompts: "Sequence[Prompt]", world: "World") -> dict[str, Path]:
        """A folder of pictures for each guidance, by its label."""
        from micro_diffusion.evaluation.generate import Drawing, draw_prompts

        def tell(share: float) -> None:
            if not world.rank and sys.stderr.isatty():
                print(f"\r{folder}: {share:.1%} drawn", end="\n" * (share == 1), file=sys.stderr, flush=True)

        model, folders = self.load(str(self.model)), dict[str, Path]()
        for guidance in self.guidance:
            folder = folders[f"guidance {guidance:g}"] = self.out / f"guidance-{guidance:g}"
            draw_prompts(
                model, prompts, folder, name=str(self.model), batch_size=self.batch_size, world=world, on_batch=tell,
                drawing=Drawing(self.steps, guidance, self.guidance_interval, self.sampler),
            )  # fmt: skip
        return folders


def spread(prompts: "Sequence[Prompt]", limit: int | None) -> "list[Prompt]":
    """As many of the prompts, evenly spread; UserError if there are fewer."""
    if limit is None or limit == len(prompts) or not prompts:
        return list(prompts)
    if limit > len(prompts):
        raise UserError(f"There are {len(prompts):,} prompts, fewer than the {limit:,} that are wanted.")
    return [prompts[index * len(prompts) // limit] for index in range(limit)]


def captions(path: Path) -> list[str]:
    """The prompts in a text file, the captions in a table, COCO's JSON or a store: one a picture, the first."""
    from micro_diffusion.data.sources.tables import CAPTION_COLUMNS, READERS, captions_of
    from micro_diffusion.data.store import Store

    if path.is_dir():
        store = Store.open(path)
        texts = [each[0] for i in range(len(store.parts)) for each in store.rows(i)["captions"].to_pylist()]
    elif not path.is_file():
        raise UserError(f"There is no file of prompts {path}.")
    elif path.suffix == ".json":
        rows = read_json(path.read_text(encoding="utf-8"), str(path)).get("annotations", [])
        texts = list({row["image_id"]: row["caption"] for row in reversed(rows)}.values())
    elif path.suffix in READERS:
        columns, rows = READERS[path.suffix](path)
        name = next((column for column in CAPTION_COLUMNS if column in columns), "")
        found = [caption.text for row in rows for caption in captions_of(row.get(name))[:1]]
        texts = [text.decode(errors="replace") if isinstance(text, bytes) else text for text in found]
    else:
        texts = path.read_text(encoding="utf-8").splitlines()
    if texts := [text.strip() for text in texts if text.strip()]:
        return texts
    raise UserError(f"{path} has no captions: give a text file, or a table with one of {', '.join(CAPTION_COLUMNS)}.")


def during_training(asked: str, make: "Callable[[DiT], LatentDiffusion]", folder: Path, *,
                    device: "torch.device") -> "Callable[[DiT], Mapping[str, float]]":  # fmt: skip
    """What `train --evaluate NAME,PROMPTS` logs of the weights of the moment.

    Scores blank pictures first, so that a benchmark that lacks something is refused before training starts.
    """
    from PIL import Image

    from micro_diffusion.evaluation.generate import Drawing, draw_prompts
    from micro_diffusion.evaluation.pictures import PROMPTS, PictureFolder, file_name, prompts_text

    name, _, count = asked.partition(",")
    if not count.isdecimal() or not int(count):
        raise UserError(f"--evaluate {asked}: write it as NAME,PROMPTS, as in emoji,16.")
    benchmark = choose(BENCHMARKS, name, "benchmark")({}, None)
    prompts = spread(benchmark.prompts(), int(count))
    with tempfile.TemporaryDirectory() as blank:
        Path(blank, PROMPTS).write_text(prompts_text(prompts))
        for index in range(len(prompts)):
            Image.new("RGB", (64, 64), "white").save(Path(blank, file_name(index)))
        benchmark.score(PictureFolder(Path(blank)), device)

    def score(dit: "DiT") -> Mapping[str, float]:
        shutil.rmtree(folder, ignore_errors=True)  # of other weights
        draw_prompts(make(dit), prompts, folder, name="training", drawing=Drawing(steps=20, guidance=2.0))
        return benchmark.score(PictureFolder(folder), device).numbers

    return score
