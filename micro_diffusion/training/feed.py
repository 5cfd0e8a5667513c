"""What a training step is given: the pictures at its positions with all that is drawn for them, on the device."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from micro_diffusion.data.loader import Loader
from micro_diffusion.models.masking import null_caption
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
    loader: Loader, recipe: Recipe, stage: Stage, *, patches: int, data: Sequence[tuple[int, int]], device: torch.device
) -> Generator[Examples, None, None]:
    """The batches in ranges of positions, prepared ahead of the device where it is not the CPU itself."""
    pin = device.type == "cuda"
    drawn = (each for some in data for each in _draw(loader, recipe, stage, patches=patches, data=some, pin=pin))
    for examples in drawn if device.type == "cpu" else _ahead(drawn, depth=2):
        here = Examples(*(column.to(device, non_blocking=pin) for column in examples))
        text, mask = null_caption(here.text.float(), here.text_mask, here.caption_dropped)
        yield here._replace(latents=here.latents.float(), text=text, text_mask=mask)


def _draw(
    loader: Loader, recipe: Recipe, stage: Stage, *, patches: int, data: tuple[int, int], pin: bool
) -> Iterator[Examples]:
    start, stop = data
    batches = loader.batches(start, stop, stage.batch_size)
    for first, batch in zip(range(start, stop, stage.batch_size), batches, strict=True):
        positions = torch.arange(first, first + len(batch.latents))
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


def _ahead(items: Iterable[Examples], *, depth: int) -> Iterator[Examples]:
    """The same items, made up to `depth` ahead in a thread."""
    iterator = iter(items)
    pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
    try:
        pending: deque[Future[Examples | None]] = deque(pool.submit(next, iterator, None) for _ in range(depth))
        while (examples := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, iterator, None))
            yield examples
    finally:
        pool.shutdown(cancel_futures=True)
