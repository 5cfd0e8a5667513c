"""What a training step is given: the pictures at its positions with all that is drawn for them, on the device."""

import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from micro_diffusion.data.loader import Batch, Batches, Loader
from micro_diffusion.diffusion.objectives import EDM, Flow
from micro_diffusion.models.dit import DiT, conditioned
from micro_diffusion.models.masking import null_caption
from micro_diffusion.runtime.ahead import Late, ahead
from micro_diffusion.runtime.distributed import ALONE, Stuck, World
from micro_diffusion.runtime.random import draw_normal, draw_uniform
from micro_diffusion.training.config import Recipe, Stage


class Examples(NamedTuple):
    """One row an image; the draws depend on (seed, purpose, position) only."""

    latents: Float[Tensor, "b c h w"]
    text: Shaped[Tensor, "b l d"]
    text_scale: Float[Tensor, "b l"]
    text_mask: Bool[Tensor, "b l"]
    caption_dropped: Bool[Tensor, " b"]
    sigma_normal: Float[Tensor, " b"]
    noise: Float[Tensor, "b c h w"]
    mask_noise: Float[Tensor, "b t"]

    def split(self, size: int) -> "Iterator[Examples]":
        """Micro-batches of `size` images; 0 is all of them."""
        pieces = [column.split(size or len(column)) for column in self]
        return (Examples(*piece) for piece in zip(*pieces, strict=True))

    def losses(self, network: DiT, objective: EDM | Flow, recipe: Recipe, mask_ratio: float) -> Float[Tensor, " b"]:
        """The loss of each image."""
        fixed = partial(conditioned, precision=recipe.precision, mask_ratio=mask_ratio, mask_noise=self.mask_noise)
        predict, level = fixed(network, self.text, self.text_mask), objective.noise_level(self.sigma_normal)
        terms = objective.loss(predict, self.latents, level, self.noise, patch_size=recipe.model.patch_size)
        return terms.per_image


def feed(
    loader: Batches, recipe: Recipe, stage: Stage, *, patches: int, data: Sequence[tuple[int, int]],
    device: torch.device, world: World = ALONE, workers: int | None = None,
) -> Generator[Examples, None, None]:  # fmt: skip
    """This rank's share of the batches in ranges of positions; Stuck when the loader gives no more.

    For a GPU they are prepared ahead: by `workers` processes (None is up to four of this rank's cores), since Python
    has its hands full with launching kernels, or by a thread where the source cannot be read at any place.
    """
    gpu, size, share = device.type == "cuda", stage.batch_size, stage.batch_size // world.size
    finish = partial(_examples, recipe=recipe, stage=stage, patches=patches, world=world)
    if workers is None:
        workers = max(1, min(4, (os.cpu_count() or 1) // world.local_size - 1)) if gpu and hasattr(os, "fork") else 0
    made: Iterator[Examples | None]
    over = multiprocessing.RawValue("b", 0)
    if isinstance(loader, Loader) and workers:

        def at(first: Any) -> Examples:  # in a worker, any of which can make any batch
            return finish(loader.batch(first + share * world.rank, share), first)

        firsts = [first for start, stop in data for first in range(start, stop, size)]
        made = iter(DataLoader(
            cast(Dataset[Any], firsts), batch_size=None, num_workers=workers, timeout=world.timeout, pin_memory=gpu,
            collate_fn=at, worker_init_fn=partial(_begin_worker, over), multiprocessing_context="fork",
        ))  # fmt: skip
    else:
        batches = partial(loader.batches, rank=world.rank, world=world.size)
        drawn = (
            Examples(*map(Tensor.pin_memory, finish(batch, first))) if gpu else finish(batch, first)
            for start, stop in data
            for first, batch in zip(range(start, stop, size), batches(start, stop, size), strict=True)
        )
        depth, cores = 2 if gpu else 0, 1 if isinstance(loader, Loader) else torch.get_num_threads()  # it encodes
        made = ahead(repeat(partial(next, drawn, None)), depth=depth, name="feed", cores=cores, timeout=world.timeout)
    try:
        while True:
            try:
                examples = next(made, None)
            except (Late, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "timed out" not in str(error):
                    raise
                raise Stuck(f"the data loader of rank {world.rank} has given nothing for {world.timeout:g} s") from None
            if examples is None:
                return
            here = Examples(*(column.to(device, non_blocking=gpu) for column in examples))
            states = here.text.float() * here.text_scale.float()[..., None]
            text, mask = null_caption(states, here.text_mask, here.caption_dropped)
            yield here._replace(latents=here.latents.float(), text=text, text_mask=mask)
    finally:
        over.value = 1


def _begin_worker(over: Any, number: int) -> None:
    """Signals may reach all processes, and the run still ends its step; only after that they end a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if over.value else None)


def _examples(batch: Batch, first: int, *, recipe: Recipe, stage: Stage, patches: int, world: World) -> Examples:
    """A batch with all that is drawn for it; `first` is the position at which the global batch begins."""
    masked = any(ratio for *_, ratio in stage.mask_spans)
    positions = first + stage.batch_size * world.rank // world.size + torch.arange(len(batch.latents))
    return Examples(
        latents=batch.latents,
        text=batch.text,
        text_scale=torch.ones(batch.text_mask.shape) if batch.text_scale is None else batch.text_scale,
        text_mask=batch.text_mask,
        caption_dropped=draw_uniform(recipe.seed, "caption-dropout", positions) < recipe.caption_dropout,
        sigma_normal=draw_normal(recipe.seed, "sigma", positions),
        noise=draw_normal(recipe.seed, "noise", positions, tuple(batch.latents.shape[1:])),
        mask_noise=draw_uniform(recipe.seed, "mask", positions, (patches if masked else 0,)),
    )
