"""What a training step is given: the pictures at its positions with all that is drawn for them, on the device."""

from collections.abc import Generator, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from micro_diffusion.data.loader import Batches
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


def feed(
    loader: Batches, recipe: Recipe, stage: Stage, *, patches: int, data: Sequence[tuple[int, int]],
    device: torch.device, world: World = ALONE,
) -> Generator[Examples, None, None]:  # fmt: skip
    """This rank's share of the batches in ranges of positions; Stuck when the loader gives no more.

    They are prepared ahead of the device where it is not the CPU itself.
    """
    pin = device.type == "cuda"
    drawn = (
        each
        for start, stop in data
        for each in _draw(loader, recipe, stage, patches=patches, start=start, stop=stop, world=world, pin=pin)
    )
    depth = 0 if device.type == "cpu" else 2
    made = ahead(repeat(partial(next, drawn, None)), depth=depth, name="feed", timeout=world.timeout)
    while True:
        try:
            examples = next(made)
        except Late:
            raise Stuck(f"the data loader of rank {world.rank} has given nothing for {world.timeout:g} s") from None
        if examples is None:
            return
        here = Examples(*(column.to(device, non_blocking=pin) for column in examples))
        states = here.text.float() * here.text_scale.float()[..., None]
        text, mask = null_caption(states, here.text_mask, here.caption_dropped)
        yield here._replace(latents=here.latents.float(), text=text, text_mask=mask)


def _draw(
    loader: Batches, recipe: Recipe, stage: Stage, *, patches: int, start: int, stop: int, world: World, pin: bool
) -> Iterator[Examples]:
    masked = any(ratio for *_, ratio in stage.mask_spans)
    batches = loader.batches(start, stop, stage.batch_size, rank=world.rank, world=world.size)
    for first, batch in zip(range(start, stop, stage.batch_size), batches, strict=True):
        positions = first + stage.batch_size * world.rank // world.size + torch.arange(len(batch.latents))
        examples = Examples(
            latents=batch.latents,
            text=batch.text,
            text_scale=torch.ones(batch.text_mask.shape) if batch.text_scale is None else batch.text_scale,
            text_mask=batch.text_mask,
            caption_dropped=draw_uniform(recipe.seed, "caption-dropout", positions) < recipe.caption_dropout,
            sigma_normal=draw_normal(recipe.seed, "sigma", positions),
            noise=draw_normal(recipe.seed, "noise", positions, tuple(batch.latents.shape[1:])),
            mask_noise=draw_uniform(recipe.seed, "mask", positions, (patches if masked else 0,)),
        )
        yield Examples(*(column.pin_memory() for column in examples)) if pin else examples
