"""What a training step is given: the pictures at its positions with all that is drawn for them, on the device."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from micro_diffusion.data.loader import Loader
from micro_diffusion.models.masking import null_caption
from micro_diffusion.runtime.distributed import ALONE, Stuck, World
from micro_diffusion.runtime.random import draw_normal, draw_uniform
from micro_diffusion.training.config import Recipe, Stage


class Examples(NamedTuple):
    """One row an image; the draws depend on (seed, purpose, position) only."""

    latents: Float[Tensor, "b c h w"]
    text: Float[Tensor, "b l d"]
    text_mask: Bool[Tensor, "b l"]
    caption_dropped: Bool[Tensor, " b"]
    sigma_normal: Float[Tensor, " b"]
    noise: Float[Tensor, "b c h w"]
    mask_noise: Float[Tensor, "b t"]

    def split(self, size: int) -> "Iterator[Examples]":
        """Micro-batches of `size` images; 0 is all of them."""
        pieces = [column.split(size or len(column)) for column in self]
        return (Examples(*piece) for piece in zip(*pieces, strict=True))


def feed(
    loader: Loader, recipe: Recipe, stage: Stage, *, patches: int, start: int, stop: int, device: torch.device,
    world: World = ALONE,
) -> Generator[Examples, None, None]:  # fmt: skip
    """This rank's share of the batches between two positions of the run; Stuck when the loader gives no more.

    They are prepared ahead of the device where it is not the CPU itself.
    """
    pin = device.type == "cuda"
    drawn = _draw(loader, recipe, stage, patches=patches, start=start, stop=stop, world=world, pin=pin)
    for examples in _ahead(drawn, depth=0 if device.type == "cpu" else 2, world=world):
        here = Examples(*(column.to(device, non_blocking=pin) for column in examples))
        text, mask = null_caption(here.text.float(), here.text_mask, here.caption_dropped)
        yield here._replace(latents=here.latents.float(), text=text, text_mask=mask)


def _draw(
    loader: Loader, recipe: Recipe, stage: Stage, *, patches: int, start: int, stop: int, world: World, pin: bool
) -> Iterator[Examples]:
    batches = loader.batches(start, stop, stage.batch_size, rank=world.rank, world=world.size)
    for first, batch in zip(range(start, stop, stage.batch_size), batches, strict=True):
        positions = first + stage.batch_size * world.rank // world.size + torch.arange(len(batch.latents))
        examples = Examples(
            latents=batch.latents,
            text=batch.text,
            text_mask=batch.text_mask,
            caption_dropped=draw_uniform(recipe.seed, "caption-dropout", positions) < recipe.caption_dropout,
            sigma_normal=draw_normal(recipe.seed, "sigma", positions),
            noise=draw_normal(recipe.seed, "noise", positions, tuple(batch.latents.shape[1:])),
            mask_noise=draw_uniform(recipe.seed, "mask", positions, (patches if stage.mask_ratio else 0,)),
        )
        yield Examples(*(column.pin_memory() for column in examples)) if pin else examples


def _ahead(items: Iterator[Examples], *, depth: int, world: World) -> Iterator[Examples]:
    """The same items, made in a thread up to `depth` ahead."""
    pool, alive = ThreadPoolExecutor(1, thread_name_prefix="feed"), True
    pending: deque[Future[Examples | None]] = deque()
    try:
        while True:
            pending.append(pool.submit(next, items, None))
            if len(pending) > depth:
                future = pending.popleft()
                if not (alive := bool(wait([future], world.timeout).done)):
                    raise Stuck(f"the data loader of rank {world.rank} has given nothing for {world.timeout:g} s")
                if (examples := future.result()) is None:
                    return
                yield examples
    finally:
        pool.shutdown(wait=alive, cancel_futures=True)
