"""The embedded benchmark: does the picture of a held-out (concept, style) pair show that concept in that style?

A judge that has seen real drawings of all pairs decides; a second one, which never saw a held-out drawing, stands
beside it. True drawings are judged too: no model can be expected to do better than they.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from micro_diffusion.data.records import hash_share
from micro_diffusion.data.sources.emoji import drawing, emoji_table
from micro_diffusion.evaluation.frechet import Moments, frechet_distance
from micro_diffusion.evaluation.judges import BLOCK, FOLDER, Judge, Opinion, load_network, to_tensor
from micro_diffusion.evaluation.pictures import PictureFolder, Prompt, Scores
from micro_diffusion.runtime.files import sha256
from micro_diffusion.runtime.random import derive_seed

KINDS = {"held_out_pair": "held-out pairs", "held_out_concept": "held-out concepts", "train": "seen pairs"}
SEEN, REPEATS, REPEATED = 0.027, 4, 32  # share of the seen pairs asked for; pictures of each of the first prompts


class EmojiBenchmark:
    """Every held-out pair and concept, about as many seen pairs, and more pictures of some to see how they differ."""

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The drawings asked for, in an order that mixes the kinds."""
        rows = [row for row in emoji_table() if row["split"] != "train" or hash_share(f"seen/{row['caption']}", SEEN)]
        return sorted(rows, key=lambda row: derive_seed(0, "emoji benchmark", row["caption"]))

    def prompts(self) -> list[Prompt]:
        """The drawings' captions, then those of the first `REPEATED` again, from other noise."""
        asked = [*self.rows, *self.rows[:REPEATED] * (REPEATS - 1)]
        seeds = [derive_seed(0, "emoji prompt", index) for index in range(len(asked))]
        truths = [{name: row[name] for name in ("concept", "style", "split")} for row in asked]
        return list(map(Prompt, [row["caption"] for row in asked], seeds, truths))

    def true_picture(self, truth: Mapping[str, Any]) -> Image.Image:
        """The drawing that a prompt asks for."""
        asked = (row for row in self.rows if all(row[name] == truth[name] for name in ("concept", "style")))
        return drawing(next(asked)["image"])

    def score(self, pictures: PictureFolder, device: torch.device) -> Scores:
        """Shares right by kind and judge, distances to the true pictures in the judge's features, and memorisation."""
        prompts = pictures.prompts or []
        truths = [prompt.truth for prompt in prompts]
        true = [self.true_picture(truth) for truth in truths]
        numbers: dict[str, float] = {}
        judges = [cast(Judge, load_network(name)).to(device) for name in ("judge", "second")]
        said = [(opinion(judge, pictures.batches(BLOCK)), opinion(judge, [true])) for judge in judges]
        for judge, opinions, mark in zip(judges, said, ("", " (second judge)"), strict=True):
            for each, what in zip(opinions, ("", ", true pictures"), strict=True):
                hits = right(judge, each, truths)
                for kind, words in KINDS.items():
                    rows = [index for index, truth in enumerate(truths) if truth["split"] == kind]
                    for measure, hit in hits.items() if rows else ():
                        numbers[f"{measure}, {words}{what}{mark}"] = float(hit[rows].float().mean())
        judge, (drawn, real) = judges[0], said[0]
        numbers |= self.distances(judge, drawn, real, prompts)
        hashes = " and ".join(sha256(FOLDER / f"{name}.safetensors")[:12] for name in ("judge", "second"))
        protocol = f"{len(truths)} prompts, judged by the embedded networks (sha256 {hashes}) at {Judge.SIZE} px"
        sure = sureness(judge, drawn, truths, "concept") + sureness(judge, drawn, truths, "style")
        return Scores(protocol, numbers, {"sure": sure.tolist()}, notes=seen_as(judge, drawn), true=true)

    def distances(self, judge: Judge, drawn: Opinion, real: Opinion, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Frechet and kernel distance over held-out prompts, spread over seeds, and nearest drawings of training."""
        held = [index for index, prompt in enumerate(prompts) if prompt.truth["split"] != "train"]
        numbers: dict[str, float] = {}
        if len(held) > 1:
            fake, true = drawn.features[held].cpu().double(), real.features[held].cpu().double()
            numbers["Frechet distance, held-out"] = frechet_distance(Moments().update(fake), Moments().update(true))
            numbers["kernel distance, held-out"] = kernel_distance(fake, true)
        by_text: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_text.setdefault(prompt.text, []).append(index)
        spread = [torch.pdist(drawn.features[rows]).mean().item() for rows in by_text.values() if len(rows) > 1]
        if spread:
            numbers["diversity: distance between seeds"] = float(np.mean(spread))
            numbers["diversity: distance between true pictures"] = torch.pdist(real.features).mean().item()
        pairs = [index for index, prompt in enumerate(prompts) if prompt.truth["split"] == "held_out_pair"]
        if pairs:
            training = (drawing(row["image"]) for row in emoji_table() if row["split"] == "train")
            batches = iter(lambda: list(itertools.islice(training, BLOCK)), [])
            known = opinion(judge, batches).features
            nearest = torch.cdist(drawn.features[pairs], known).amin(1)
            own = (drawn.features[pairs] - real.features[pairs]).norm(dim=1)
            numbers["memorisation: held-out pairs nearer to a training drawing"] = float((nearest < own).float().mean())
            relative = nearest.median() / torch.cdist(real.features[pairs], known).amin(1).median()
            numbers["memorisation: distance to the nearest, relative to true pictures"] = float(relative)
        return numbers


@torch.no_grad()
def opinion(judge: Judge, batches: Iterable[Sequence[Image.Image]]) -> Opinion:
    """What the judge says of pictures of one size."""
    device = next(judge.parameters()).device
    cuts = (batch[i : i + BLOCK] for batch in batches for i in range(0, len(batch), BLOCK))
    parts = [judge(to_tensor(cut).to(device)) for cut in cuts]
    return Opinion(*map(torch.cat, zip(*parts, strict=True)))


def right(judge: Judge, said: Opinion, truths: Sequence[Mapping[str, Any]]) -> dict[str, Bool[Tensor, " b"]]:
    """Which pictures show the concept (as the first guess, or among five), the style, and both."""
    concept = torch.tensor([judge.names["concepts"].index(truth["concept"]) for truth in truths])
    style = torch.tensor([judge.names["styles"].index(truth["style"]) for truth in truths])
    best = said.concept.topk(5).indices.cpu() == concept[:, None]
    styled = said.style.argmax(-1).cpu() == style
    return {"concept top-1": best[:, 0], "concept top-5": best.any(1), "style": styled, "both": best[:, 0] & styled}


def sureness(judge: Judge, said: Opinion, truths: Sequence[Mapping[str, Any]], what: str) -> Float[Tensor, " b"]:
    """Log-probability of the true concept or style."""
    names = torch.tensor([judge.names[f"{what}s"].index(truth[what]) for truth in truths])
    return -torch.nn.functional.cross_entropy(getattr(said, what).cpu(), names, reduction="none")


def seen_as(judge: Judge, said: Opinion) -> list[str]:
    """What the judge takes each picture for."""
    best = zip(said.concept.argmax(-1).tolist(), said.style.argmax(-1).tolist(), strict=True)
    return [f"seen as {judge.names['concepts'][c]}, {judge.names['styles'][s]}" for c, s in best]


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x y / d + 1)^3 (arXiv 1801.01401, section 4)."""
    aa, bb, ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = [(values.sum() - values.trace()) / (len(values) * (len(values) - 1)) for values in (aa, bb)]
    return float(sum(within) - 2 * ab.mean())
