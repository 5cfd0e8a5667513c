"""Averages of the weights over images seen: exponential, or power functions (Karras et al., arXiv 2312.02696)."""

import bisect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64

from micro_diffusion.models.checkpoints import build, read_checkpoint, write_folder
from micro_diffusion.models.dit import DiT, rebuilt
from micro_diffusion.training.config import Recipe, Stage, require
from micro_diffusion.training.optim import local


class Ema:
    """Copies of the model, whole or sharded like it, that follow it, each in its own way; the first is shown."""

    def __init__(self, dit: DiT, copies: int = 1) -> None:
        state = dit.state_dict()
        copied = ({name: value.detach().clone() for name, value in state.items()} for _ in range(copies))
        self.dits = [rebuilt(dit, tensors).requires_grad_(False) for tensors in copied]

    @property
    def dit(self) -> DiT:
        return self.dits[0]


@torch.no_grad()
def follow(ema: Ema | None, dit: DiT, stage: Stage, *, images: int) -> Ema | None:
    """The average after a step that ended `images` into the stage; it starts at the first one past ema_start_images.

    After n images a half-life leaves 2^(-n / halflife) of a difference, a power function ((t - n) / t)^(gamma + 1).
    """
    size, time, widths = stage.batch_size, images - stage.ema_start_images, stage.ema_sigma_rel
    if time <= 0 or not (stage.ema_halflife_images or widths):
        return ema
    if ema is None:
        return Ema(dit, len(widths) or 1)
    for index, twin in enumerate(ema.dits):
        power = (1 - size / time) ** (exponent(widths[index]) + 1) if widths else 0.0
        weight = 1 - (power if widths else 0.5 ** (size / stage.ema_halflife_images))
        torch._foreach_lerp_([*map(local, twin.parameters())], [*map(local, dit.parameters())], weight)
    return ema


def exponent(sigma_rel: float) -> float:
    """The gamma of a profile p(t) ~ t^gamma whose standard deviation is `sigma_rel` of its length.

    The variance on [0, 1] is (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): a cubic equation, of which it is a root.
    """
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def combination(
    times: Sequence[float], widths: Sequence[float], *, time: float, width: float
) -> tuple[Float64[np.ndarray, " n"], float]:
    """Factors with which power-function averages of some times and widths add up to one of another time and width.

    Least squares over the profiles, their inner products in closed form; with the part of the profile that is missed.
    """
    ends, gammas = np.array([*times, time], np.float64), np.array([exponent(each) for each in (*widths, width)])
    shorter, longer = np.minimum.outer(ends, ends), np.maximum.outer(ends, ends)
    own, other = (shorter / ends[:, None]) ** gammas[:, None], (shorter / ends) ** gammas
    products = np.outer(gammas + 1, gammas + 1) / (np.add.outer(gammas, gammas) + 1) * own * other / longer
    factors = np.linalg.lstsq(products[:-1, :-1], products[:-1, -1])[0]
    signed = np.append(factors, -1.0)
    return factors, float(np.sqrt(max(0.0, signed @ products @ signed) / products[-1, -1]))


def reconstruct(run: Path, out: Path, *, sigma_rel: float) -> float:
    """Write a run's average of that width, at its newest snapshot, as a model folder; UserError without snapshots.

    Returns the part of the wanted profile that the snapshots of that stage miss.
    """
    paths = sorted((run / "averages").glob("[0-9]*-*"))
    require(len(paths) > 0, f"{run} keeps no averages: train with ema_sigma_rel")
    require(0 < sigma_rel < 0.28, "sigma_rel: from 0 to 0.28")
    recipe = Recipe.from_json((run / "recipe.json").read_text())
    images, widths = zip(*(map(float, path.name.split("-")) for path in paths), strict=True)
    number = bisect.bisect_left(recipe.ends, images[-1])
    start = recipe.ends[number] - recipe.stages[number].images
    first = bisect.bisect_right(images, start)
    times = [each - start - recipe.stages[number].ema_start_images for each in images[first:]]
    factors, missed = combination(times, widths[first:], time=times[-1], width=sigma_rel)
    weights, card = read_checkpoint(str(paths[-1]))
    total = {name: 0 * p.double() for name, p in build(weights, card, where=str(paths[-1])).named_parameters()}
    for path, factor in zip(paths[first:], factors, strict=True):
        part = read_checkpoint(str(path))[0]
        total = {name: value + factor * part[name] for name, value in total.items()}
    write_folder(out, weights | {name: value.float() for name, value in total.items()}, card=card)
    return missed
