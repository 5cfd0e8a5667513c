"""How benchmarks/quality.py scores a model: loss at fixed noise, and what the embedded judges and detector say."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from benchmarks.quality_data import Held, in_slice
from micro_diffusion.data.sources.emoji import emoji_table
from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.evaluation.emoji import KINDS, EmojiBenchmark, opinion, right
from micro_diffusion.evaluation.geneval import task_scores, verdict
from micro_diffusion.evaluation.judges import Detector, Judge, load_network
from micro_diffusion.evaluation.pictures import Prompt
from micro_diffusion.evaluation.scenes import ScenesBenchmark, find
from micro_diffusion.models.dit import DiT, conditioned
from micro_diffusion.models.model import LatentDiffusion
from micro_diffusion.runtime.random import derive_seed, draw_normal
from micro_diffusion.runtime.report import pictures
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.meter import LEVELS

AT_ONCE = 512  # pictures
NOISE = EDM()  # of the paper, for every recipe: losses at other levels would not compare


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: a guidance scale, everywhere or between two noise levels."""

    guidance: float
    interval: tuple[float, float] | None = None
    steps: int = 30

    def __str__(self) -> str:
        within = " from {:g} to {:g}".format(*self.interval) if self.interval else ""
        return f"{self.steps} Heun steps, guidance {self.guidance:g}{within}"


@torch.no_grad()
def validation_loss(dit: DiT, held: Held, recipe: Recipe) -> float:
    """Mean loss without mask, first captions, at the midpoints of eight equally likely parts of the noise levels.

    The noise of a row is always the same, whatever the recipe and its seed.
    """
    device, total = held.latents.device, 0.0
    quantiles = torch.special.ndtri((torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS).float()
    for rows in torch.arange(len(held)).split(AT_ONCE):
        latents, text, mask = held.take(rows.to(device), torch.zeros(len(rows), device=device), recipe.text_length or 0)
        network = conditioned(dit, text, mask, precision=recipe.precision)
        for index, quantile in enumerate(quantiles):
            noise = draw_normal(0, "validation", rows * LEVELS + index, tuple(latents.shape[1:])).to(device)
            level = NOISE.noise_level(quantile.expand(len(rows))).to(device)
            loss = NOISE.loss(network, latents, level, noise, patch_size=recipe.model.patch_size)
            total += loss.per_image.double().sum().item()
    return total / (LEVELS * len(held))


@dataclass
class Judges:
    """The embedded networks and what they ask for: every prompt of the drawings' benchmark once, scenes of six tasks.

    And the slice, drawings for training that were kept aside, by which models are chosen. `limit` takes only so many of
    each.
    """

    device: torch.device
    folder: Path
    per_task: int
    limit: int | None = None
    drawings: Sequence[Prompt] = field(init=False)
    scenes: Sequence[Prompt] = field(init=False)

    def __post_init__(self) -> None:
        benchmark = EmojiBenchmark()
        rows = (row for row in emoji_table() if row["split"] == "train")
        aside = [row for row in rows if in_slice(f"{row['style']}/{row['concept']}", row["caption"])][: self.limit]
        seeds = (derive_seed(0, "slice prompt", index) for index in range(len(aside)))
        truths = ({"concept": row["concept"], "style": row["style"], "split": "slice"} for row in aside)
        kept = map(Prompt, [row["caption"] for row in aside], seeds, truths)
        self.drawings = [*benchmark.prompts()[: len(benchmark.rows)][: self.limit], *kept]
        self.scenes = ScenesBenchmark(per_task=self.per_task).prompts()[: self.limit]
        self.judges = {
            mark: cast(Judge, load_network(name, self.folder)).to(self.device)
            for name, mark in (("judge", ""), ("second", " (second judge)"))
        }
        self.detector = cast(Detector, load_network("detector", self.folder)).to(self.device)

    def score(self, model: LatentDiffusion, sampling: Sampling) -> dict[str, float]:
        """Shares right: concept, style and both by kind of pair, and each task of the scenes."""
        numbers = self.of_drawings(model, sampling)
        drawn, truths = draw(model, self.scenes, sampling), [prompt.truth for prompt in self.scenes]
        return numbers | task_scores(truths, list(map(verdict, truths, find(self.detector, drawn))))

    def of_drawings(self, model: LatentDiffusion, sampling: Sampling) -> dict[str, float]:
        """The first half of it."""
        drawn, truths = draw(model, self.drawings, sampling), [prompt.truth for prompt in self.drawings]
        numbers: dict[str, float] = {}
        for mark, judge in self.judges.items():
            hits = right(judge, opinion(judge, [drawn]), truths)
            for kind, words in {**KINDS, "slice": "slice"}.items():
                rows = [index for index, truth in enumerate(truths) if truth["split"] == kind]
                for measure, hit in hits.items() if rows else ():
                    numbers[f"{measure}, {words}{mark}"] = float(hit[rows].float().mean())
        return numbers


def draw(model: LatentDiffusion, prompts: Sequence[Prompt], sampling: Sampling) -> list[Image.Image]:
    """A picture a prompt, from the prompt's own noise."""
    images: list[Tensor] = []
    for start in range(0, len(prompts), AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        images.append(model.generate(
            [prompt.text for prompt in some], seed=[prompt.seed for prompt in some], batch_size=AT_ONCE,
            num_inference_steps=sampling.steps, guidance_scale=sampling.guidance,
            guidance_interval=sampling.interval, sampler="heun",
        ))  # fmt: skip
    return pictures(torch.cat(images))
