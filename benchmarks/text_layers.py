"""Which layer of the embedded text encoder lets a model draw pairs that it never saw? On a CPU, in minutes.

    python -m benchmarks.text_layers --out text_layers.json --layers 6 5 3 0

Drawings of 250 concepts in all their styles, at 64 px; every eighth (concept, style) pair is held out, so that its
concept and its style are known, and never together. A small model is trained on the rest, once for each layer (0 is the
embedding), from the same start and with the same draws; a layer's states are scaled to a standard deviation of one. One
process a layer, each on one thread. Then the loss at fixed noise, and what the embedded judge says of pictures of seen
and held-out pairs, scaled up to its 128 px (and of true ones, made so: 64 px are few, and it was not trained on that).

`alike` says how much a caption's other words show in its words: the mean cosine between a style's states beside two
concepts, and between a concept's beside two styles. At one the words are the same whatever stands beside them.
"""

import argparse
import copy
import itertools
import json
import math
import random
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.step import machine
from micro_diffusion.data.records import Record, decode_image, resize_crop
from micro_diffusion.data.sources.emoji import emoji_records
from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.evaluation.emoji import opinion, right
from micro_diffusion.evaluation.judges import Judge, load_network
from micro_diffusion.models.autoencoders import load_autoencoder
from micro_diffusion.models.dit import DiT, conditioned
from micro_diffusion.models.masking import null_caption
from micro_diffusion.models.model import sample_latents
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.models.text_encoders import TextFeatures, load_text_encoder
from micro_diffusion.runtime.report import pictures

PIXELS, BATCH, RATE, EVERY = 64, 64, 2e-3, 8  # every so many pairs one is held out
OBJECTIVE, LEVELS = EDM(), 8


class Rows(NamedTuple):
    """Drawings as a model sees them."""

    latents: Tensor  # (n, 4, 8, 8)
    states: dict[int, Tensor]  # by layer (n, l, d)
    mask: Tensor  # (n, l)
    keys: list[str]  # STYLE/CONCEPT
    held: Tensor  # (n) bool

    def text(self, layer: int, rows: Tensor) -> TextFeatures:
        """Their captions."""
        scale = self.states[layer][self.mask].std()
        return TextFeatures(self.states[layer][rows] / scale, self.mask[rows])


def prepare(concepts: int, layers: list[int]) -> Rows:
    """The first captions of drawings in at least six styles, and their latents."""
    by_concept: dict[str, list[Record]] = defaultdict(list)
    for record in emoji_records():
        by_concept[record.key.partition("/")[2]].append(record)
    many = sorted(name for name, records in by_concept.items() if len(records) >= 6)
    chosen = random.Random(0).sample(many, min(concepts, len(many)))
    records = [record for name in chosen for record in by_concept[name]]
    captions = [str(record.captions[0].text) for record in records]
    pixels = torch.from_numpy(np.stack([resize_crop(decode_image(record), PIXELS) for record in records]))
    autoencoder, latents = load_autoencoder(), []
    for part in pixels.permute(0, 3, 1, 2).split(BATCH):
        latents.append(autoencoder.encode(part / 127.5 - 1)[0])
    states, mask = {}, torch.empty(0)
    for layer in layers:
        states[layer], mask = load_text_encoder(f"embedded?layer={layer}").encode(captions)
    order = random.Random(1).sample(range(len(records)), len(records) // EVERY)
    held = torch.zeros(len(records), dtype=torch.bool)
    held[order] = True
    return Rows(torch.cat(latents), states, mask, [record.key for record in records], held)


def alike(layer: int) -> dict[str, float]:
    """Mean cosines between the same words beside others."""
    styles, concepts = ("noto", "fluent 3d", "twemoji", "emojione"), ("fox", "castle", "robot", "pizza", "mountain")
    encoder = load_text_encoder(f"embedded?layer={layer}")
    found: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for concept, style in itertools.product(concepts, styles):
        states, mask = encoder.encode([f"a {concept}, in {style} style"])
        words = states[0][mask[0]]  # [CLS] a CONCEPT , in STYLE... style [SEP]
        found[concept, style] = words[2], words[5:-2].mean(0)

    def mean(index: int, kept: int) -> float:
        pairs = [(a, b) for a, b in itertools.combinations(found, 2) if a[kept] == b[kept]]
        return float(np.mean([F.cosine_similarity(found[a][index], found[b][index], dim=0).item() for a, b in pairs]))

    return {"style": mean(1, 1), "concept": mean(0, 0)}


@torch.no_grad()
def loss_of(dit: DiT, rows: Rows, layer: int, some: Tensor) -> float:
    """At fixed noise, at the midpoints of equally likely parts of the noise levels."""
    network, draws, total = conditioned(dit, *rows.text(layer, some), precision="float32"), torch.Generator(), 0.0
    draws.manual_seed(7)
    for quantile in torch.special.ndtri((torch.arange(LEVELS) + 0.5) / LEVELS):
        level = OBJECTIVE.noise_level(quantile.expand(len(some)))
        noise = torch.randn(rows.latents[some].shape, generator=draws)
        total += OBJECTIVE.loss(network, rows.latents[some], level, noise, patch_size=2).mean.item()
    return total / LEVELS


def judged(latents: Tensor, rows: Rows, some: Tensor) -> dict[str, float]:
    """Shares of the pictures that show the concept, the style, both."""
    judge = cast(Judge, load_network("judge"))
    truths = [dict(zip(("style", "concept"), rows.keys[i].split("/", 1), strict=True)) for i in some.tolist()]
    drawn = F.interpolate(load_autoencoder().decode(latents), size=128, mode="bicubic", antialias=True).clamp(0, 1)
    known = [i for i, truth in enumerate(truths) if truth["concept"] in judge.names["concepts"]]
    hits = right(judge, opinion(judge, [pictures(drawn[known])]), [truths[i] for i in known])
    return {name: round(hit.float().mean().item(), 4) for name, hit in hits.items()}


def train(rows: Rows, layer: int, steps: int, seed: int) -> dict[str, Any]:
    """A small model on this layer's states; losses on the way, and its pictures at the loss's best and at the end."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = replace(PRESETS["MicroDiT_Nano_4"], patch_size=2, dim=128, mixer_dim=96)
    dit, draws = DiT(model(input_size=8)), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.03)
    training, held = torch.nonzero(~rows.held)[:, 0], torch.nonzero(rows.held)[:, 0]
    seen, begun = training[::7], time.perf_counter()
    course: list[dict[str, float]] = []
    best, kept = math.inf, dit
    for step in range(1, steps + 1):
        fade = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, step / 200) * fade
        some = training[torch.randint(len(training), (BATCH,), generator=draws)]
        text = null_caption(*rows.text(layer, some), torch.rand(BATCH, generator=draws) < 0.1)
        level = OBJECTIVE.noise_level(torch.randn(BATCH, generator=draws))
        noise = torch.randn(rows.latents[some].shape, generator=draws)
        network = conditioned(dit, *text, precision="float32")
        optimizer.zero_grad()
        OBJECTIVE.loss(network, rows.latents[some], level, noise, patch_size=2).mean.backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 12) == 0:
            losses = {name: loss_of(dit, rows, layer, which) for name, which in (("seen", seen), ("held out", held))}
            course.append({"images": step * BATCH, "seconds": round(time.perf_counter() - begun, 1), **losses})
            print(f"layer {layer}: {json.dumps(course[-1])}", flush=True)
            if losses["held out"] < best:
                best, kept = losses["held out"], copy.deepcopy(dit)
    scores: dict[str, Any] = {}
    for when, network_of in (("at the best", kept), ("at the end", dit)):
        for name, which in (("seen", seen), ("held out", held)):
            noise = torch.randn((len(which), 4, 8, 8), generator=torch.Generator().manual_seed(3))
            drawn = sample_latents(network_of, OBJECTIVE, rows.text(layer, which), noise, num_inference_steps=15,
                                   guidance_scale=2.0, precision="float32")  # fmt: skip
            scores[f"{name}, {when}"] = judged(drawn, rows, which)
    return {"layer": layer, "alike": alike(layer), "course": course, "scores": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 5, 3, 0])
    parser.add_argument("--concepts", type=int, default=250)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    rows = prepare(args.concepts, args.layers)
    which = {"seen": torch.nonzero(~rows.held)[::7, 0], "held out": torch.nonzero(rows.held)[:, 0]}
    result: dict[str, Any] = {
        "drawings": len(rows.keys), "held_out": int(rows.held.sum()), "steps": args.steps, "seed": args.seed,
        "true": {name: judged(rows.latents[some], rows, some) for name, some in which.items()}, "layers": [],
    }  # fmt: skip
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        for found in pool.map(
            train, *zip(*((rows, layer, args.steps, args.seed) for layer in args.layers), strict=True)
        ):
            result["layers"].append(found)
            args.out.write_text(json.dumps({**result, "machine": machine("cpu")}, indent=2) + "\n")
            print(json.dumps({key: found[key] for key in ("layer", "alike", "scores")}), flush=True)


if __name__ == "__main__":
    main()
