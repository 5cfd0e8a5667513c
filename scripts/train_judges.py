"""Train the networks that judge pictures, on the embedded drawings: `judge`, `second` and `detector`.

    python scripts/train_judges.py judge --out micro_diffusion/embedded/judges --images 500000

The judge sees all drawings, varied; the second one the training split only. The detector sees scenes of all
compositions. Reported are shares right on pictures rasterised, moved and turned as none in training was.
"""

import argparse
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from micro_diffusion.data.sources.emoji import ONE_WAY, emoji_table
from micro_diffusion.data.sources.emoji_scenes import COLOURS, CONCEPTS, compose, scenes
from micro_diffusion.evaluation.geneval import task_scores, verdict
from micro_diffusion.evaluation.judges import STRIDE, Cells, Detector, Judge, Opinion
from micro_diffusion.evaluation.scenes import ScenesBenchmark, find
from micro_diffusion.models.autoencoders import load_autoencoder

SOURCE = 128  # pixels of the drawings that are varied
REPORT = 20  # seconds

cached_autoencoder = cache(load_autoencoder)


def load_drawings(*, split: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str], list[str]]:
    """Pictures (n, 3, 128, 128) in bytes, concepts, styles, whether it may be mirrored; the names of all splits."""
    rows = list(emoji_table())
    concepts = list(dict.fromkeys(row["concept"] for row in rows))
    styles = list(dict.fromkeys(row["style"] for row in rows))
    rows = [row for row in rows if split in (None, row["split"])]
    pictures = np.stack([
        np.asarray(open_drawing(row["image"]).resize((SOURCE, SOURCE), Image.Resampling.BICUBIC)) for row in rows
    ])  # fmt: skip
    labels = torch.tensor([(concepts.index(row["concept"]), styles.index(row["style"])) for row in rows])
    mirror = torch.tensor([not ONE_WAY.search(row["concept"]) for row in rows])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    return images, labels[:, 0], labels[:, 1], mirror, concepts, styles


def vary(pictures: Tensor, mirror: Tensor, size: int) -> Tensor:
    """Moved, turned, scaled, mirrored, blurred, noisy: (b, 3, size, size) in [0, 1]."""
    b, device = len(pictures), pictures.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(b, device=device).uniform_(low, high)

    angle, scale = uniform(-0.22, 0.22), uniform(0.95, 1.35)
    flip = torch.where((torch.rand(b, device=device) < 0.5) & mirror, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    room = 0.12 + (scale - 1).clamp(min=0)
    shift = torch.empty(2, b, device=device).uniform_(-1, 1) * room
    theta = torch.stack([cos * flip, -sin, shift[0], sin * flip, cos, shift[1]], -1).view(b, 2, 3)
    grid = F.affine_grid(theta, [b, 3, size, size], align_corners=False)
    ink = 1 - pictures.float() / 255  # what lies outside is white
    moved = 1 - F.grid_sample(ink, grid, mode="bilinear", align_corners=False)
    return spoil(moved)


def spoil(pictures: Tensor) -> Tensor:
    """A little as a generator's pictures may be: blurred, noisy, paler or darker."""
    b, device = len(pictures), pictures.device
    if torch.rand(()) < 0.2:
        edge = int(pictures.shape[-1] * float(torch.empty(()).uniform_(0.5, 0.9)))
        small = F.interpolate(pictures, (edge, edge), mode="bilinear", antialias=True)
        pictures = F.interpolate(small, pictures.shape[-2:], mode="bilinear")
    contrast = torch.empty(b, 1, 1, 1, device=device).uniform_(0.85, 1.15)
    light = torch.empty(b, 3, 1, 1, device=device).uniform_(-0.06, 0.06)
    noise = torch.randn_like(pictures) * torch.empty(b, 1, 1, 1, device=device).uniform_(0, 0.03)
    return ((pictures - 0.5) * contrast + 0.5 + light + noise).clamp(0, 1)


def open_drawing(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def rebuilt(pictures: Tensor, share: float) -> Tensor:
    """A share of all batches as the embedded autoencoder gives them back, as it does a generator's pictures."""
    if torch.rand(()) >= share:
        return pictures
    with torch.no_grad(), torch.autocast(pictures.device.type, torch.bfloat16, enabled=pictures.is_cuda):
        autoencoder = cached_autoencoder(device=pictures.device)
        return autoencoder.decode(autoencoder.encode(pictures * 2 - 1)[0]).float()


Batch = tuple[Tensor, Callable[[Any], Tensor]]  # pictures, and the loss of what the network says of them


def fit(network: nn.Module, batches: Iterable[Batch], args: argparse.Namespace) -> None:
    """AdamW, a warm-up and a cosine; so many steps as make `args.images` pictures, or as `args.seconds` allow."""
    decay = [p for p in network.parameters() if p.ndim > 1]
    rest = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer, steps = torch.optim.AdamW(groups, betas=(0.9, 0.99)), args.images // args.batch
    started, shown = time.monotonic(), 0.0
    for step, (pictures, loss_of) in zip(range(steps), batches, strict=False):
        done = max(step / steps, (time.monotonic() - started) / args.seconds)
        if done >= 1:
            args.images = step * args.batch
            break
        with torch.autocast(args.device, dtype=torch.bfloat16):
            said = network(pictures)
        loss = loss_of(said)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * done))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if time.monotonic() - started > shown + REPORT or step == steps - 1:
            shown = time.monotonic() - started
            print(f"{step + 1}/{steps} steps, {shown:.0f} s, loss {loss.item():.3f}", flush=True)


def make_judge(args: argparse.Namespace, *, split: str | None) -> Judge:
    pictures, concept, style, mirror, concepts, styles = load_drawings(split=split)
    pictures, concept, style, mirror = (part.to(args.device) for part in (pictures, concept, style, mirror))

    def batches() -> Iterator[Batch]:
        order = itertools.chain.from_iterable(iter(lambda: torch.randperm(len(pictures)).tolist(), None))
        while True:
            rows = torch.tensor(list(itertools.islice(order, args.batch)), device=args.device)

            def loss_of(said: Opinion, rows: Tensor = rows) -> Tensor:
                loss = F.cross_entropy(said.concept.float(), concept[rows], label_smoothing=0.1)
                return loss + 2 * F.cross_entropy(said.style.float(), style[rows], label_smoothing=0.05)

            yield rebuilt(vary(pictures[rows], mirror[rows], Judge.SIZE), args.rebuilt), loss_of

    judge = Judge(concepts, styles).to(args.device).to(memory_format=torch.channels_last)
    if args.start:
        own, weights = judge.state_dict(), load_file(args.start)
        judge.load_state_dict({k: v for k, v in weights.items() if v.shape == own[k].shape}, strict=False)
    fit(judge, batches(), args)
    return judge


@torch.no_grad()
def check_judge(judge: Judge) -> dict[str, object]:
    """Shares right, by split, on drawings of another size, moved by up to 5%, turned by up to 5 degrees."""
    device = next(judge.parameters()).device
    generator = np.random.default_rng(1234)
    right: dict[str, list[list[bool]]] = {}
    rows = list(emoji_table())
    for start in range(0, len(rows), 200):
        some = rows[start : start + 200]
        batch = []
        for row in some:
            picture = open_drawing(row["image"]).resize((104, 104), Image.Resampling.LANCZOS)
            moved = picture.rotate(
                generator.uniform(-5, 5), Image.Resampling.BICUBIC, fillcolor="white",
                translate=tuple(generator.integers(-5, 6, 2).tolist()),
            )  # fmt: skip
            batch.append(np.asarray(moved, np.float32) / 255)
        said = judge(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(device))
        best = said.concept.topk(5).indices.tolist()
        styles = said.style.argmax(-1).tolist()
        for row, top, style in zip(some, best, styles, strict=True):
            name = judge.names["concepts"].index(row["concept"])
            right.setdefault(row["split"], []).append(
                [name == top[0], name in top, judge.names["styles"][style] == row["style"]]
            )
    measures = ("concept_top1", "concept_top5", "style")
    return {
        split: {"pictures": len(hits)} | dict(zip(measures, np.mean(hits, 0).round(4).tolist(), strict=True))
        for split, hits in right.items()
    }


class Scenes(IterableDataset[tuple[Tensor, Tensor]]):
    """Pictures (3, 128, 128) in bytes and objects (5, 6): left, top, right, bottom, concept, colour; -1 is none."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = torch.utils.data.get_worker_info()
        colours = ["own", *COLOURS]
        for scene in scenes(self.seed + (info.id if info else 0), wanted=lambda scene: True):
            picture, objects = compose(scene)
            truth = torch.full((5, 6), -1.0)
            for row, (box, group) in zip(truth, objects, strict=False):
                row[:] = torch.tensor([*box, CONCEPTS.index(group.concept), colours.index(group.colour or "own")])
            yield torch.from_numpy(np.array(picture)).permute(2, 0, 1), truth


def detector_loss(said: Cells, truth: Tensor) -> Tensor:
    """Focal loss of the centres (CenterNet's, arXiv 1904.07850, equation 1), and at the centres all the rest."""
    b, h, w = said.centre.shape
    there = truth[..., 0] >= 0  # (b, 5)
    middle = torch.stack([truth[..., 0] + truth[..., 2], truth[..., 1] + truth[..., 3]], -1) / (2 * STRIDE)
    x, y = middle[..., 0].long().clamp(0, w - 1), middle[..., 1].long().clamp(0, h - 1)
    across = torch.arange(w, device=truth.device) + 0.0
    bump = lambda at: torch.exp(-((across - at[..., None]) ** 2) / (2 * 0.7**2))  # noqa: E731
    heat = (bump(y + 0.0)[..., :, None] * bump(x + 0.0)[..., None, :] * there[..., None, None]).amax(1)
    probability = said.centre.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    hit = heat == 1
    focal = torch.where(
        hit, (1 - probability) ** 2 * probability.log(), (1 - heat) ** 4 * probability**2 * (1 - probability).log()
    )
    objects = there.sum().clamp(min=1)
    row = torch.arange(b, device=truth.device)[:, None].expand_as(x)
    at = (row[there], y[there], x[there])
    centre = torch.stack([x + 0.5, y + 0.5], -1)
    edges = truth[..., :4] / STRIDE
    distances = torch.cat([centre - edges[..., :2], edges[..., 2:] - centre], -1)
    return (
        -focal.sum() / objects
        + 0.5 * F.l1_loss(said.box.float()[at], distances[there])
        + F.cross_entropy(said.concept.float()[at], truth[..., 4][there].long(), label_smoothing=0.02)
        + F.cross_entropy(said.colour.float()[at], truth[..., 5][there].long(), label_smoothing=0.02)
    )


def make_detector(args: argparse.Namespace) -> Detector:
    loader = DataLoader(Scenes(7_000_000), args.batch, num_workers=args.workers, prefetch_factor=8)
    batches = (
        (
            rebuilt(spoil(pictures.to(args.device).float() / 255), args.rebuilt),
            partial(detector_loss, truth=truth.to(args.device)),
        )
        for pictures, truth in loader
    )
    detector = Detector(CONCEPTS, ["own", *COLOURS]).to(args.device).to(memory_format=torch.channels_last)
    fit(detector, batches, args)
    return detector


@torch.no_grad()
def check_detector(detector: Detector, *, per_task: int = 300) -> dict[str, object]:
    """Shares right on true scenes of held-out compositions, by task."""
    benchmark = ScenesBenchmark(per_task=per_task, seed=1)
    truths = [prompt.truth for prompt in benchmark.prompts()]
    found = find(detector, list(map(benchmark.true_picture, truths)))
    return dict(task_scores(truths, list(map(verdict, truths, found))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("judge", "second", "detector"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=600_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="train no longer")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rebuilt", type=float, default=0.5, help="share of batches that the autoencoder gives back")
    parser.add_argument("--start", type=Path, help="weights of the same network to go on from")
    args = parser.parse_args()
    torch.manual_seed(0)
    started = time.monotonic()
    network: Judge | Detector
    if args.name == "detector":
        network = make_detector(args)
    else:
        network = make_judge(args, split=None if args.name == "judge" else "train")
    network.eval()
    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in network.state_dict().items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out / f"{args.name}.safetensors", {"names": json.dumps(network.names)})
    seconds = round(time.monotonic() - started)
    found = check_detector(network) if isinstance(network, Detector) else check_judge(network)
    print(json.dumps({"images": args.images, "device": args.device, "seconds": seconds} | found, indent=2))


if __name__ == "__main__":
    main()
