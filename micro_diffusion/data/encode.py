"""From records to rows of numbers: what is done in threads for each picture, and what the encoders' tensors become."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from micro_diffusion.data.captions import CAPTION_RULES, clean_captions
from micro_diffusion.data.records import Record, Rejected, decode_image, resize_crop
from micro_diffusion.data.store import StoreInfo
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.random import derive_seed

# Pictures in [-1, 1], (b, 3, h, w), to the mean and standard deviation of their scaled latents, (b, c, h, w) each.
EncodeImages = Callable[[Tensor], tuple[Tensor, Tensor]]
# Captions to padded states (b, l, d) and the mask of real tokens (b, l).
EncodeText = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


class Sample(NamedTuple):
    """A record that is ready to be encoded."""

    record: Record
    texts: list[str]
    weights: list[float]
    size: tuple[int, int]  # width and height of the original
    crops: dict[int, UInt8[np.ndarray, "h w 3"]]  # by resolution
    noise: dict[int, Float[Tensor, "c h w"]]  # the draw from each posterior


def load(record: Record, resolutions: Sequence[int], info: StoreInfo, *, new: bool = True) -> Sample:
    """Clean the captions, decode the picture and draw its noise, by a generator that (seed, key, resolution) decide.

    Only for the resolutions that are asked for. All that is done for each picture by itself is done here, in threads,
    where it does not hold up the one that encodes. Raises `Rejected`.
    """
    if record.problem:
        raise record.problem
    if not new:
        raise Rejected("duplicate key")
    if not record.key.isprintable():  # file names that are not UTF-8 among them
        raise Rejected("unprintable key")
    texts, weights = clean_captions(record.captions, CAPTION_RULES[info.caption_rule])
    if not resolutions or record.encoded:
        return Sample(record, texts, weights, (0, 0), {}, {})
    image = decode_image(record, min_size=info.min_size, max_aspect=info.max_aspect)
    crops = {resolution: resize_crop(image, resolution) for resolution in resolutions}
    noise = {}
    for resolution in resolutions if not info.posterior else ():
        side = resolution // info.autoencoder.downscale
        source = torch.Generator().manual_seed(derive_seed(info.seed, "posterior", record.key, resolution))
        noise[resolution] = torch.randn(info.autoencoder.channels, side, side, generator=source)
    return Sample(record, texts, weights, image.size, crops, noise)


def _to_half(values: Tensor, maker: str) -> np.ndarray:
    half = values.half().cpu()
    if not half.isfinite().all():
        raise UserError(f"The {maker} returned values that float16 cannot hold; run it in float32.")
    return half.numpy()


def latent_rows(
    samples: Sequence[Sample], encoded: Sequence[tuple[Tensor, ...]], resolution: int, info: StoreInfo
) -> Iterator[tuple[np.ndarray | int, ...]]:
    """Rows of a latents file: one draw from each picture's posterior, or its mean and deviation, or what it had."""
    side = resolution // info.autoencoder.downscale
    rows: Iterator[tuple[np.ndarray, ...]] = iter(())
    if encoded:
        mean, deviation = (tensor.detach().float().cpu() for tensor in encoded[0])
        if info.posterior:
            rows = zip(_to_half(mean, "autoencoder"), _to_half(deviation, "autoencoder"), strict=True)
        else:
            noise = torch.stack([sample.noise[resolution] for sample in samples if sample.noise])
            rows = zip(_to_half(mean + deviation * noise, "autoencoder"), strict=True)
    for sample in samples:
        if given := sample.record.encoded:
            latent = given.latents.get(resolution, np.zeros(0, np.float16))
            if latent.size != info.autoencoder.channels * side**2:
                raise UserError(f"{sample.record.key} has no latents of {resolution} px from such an autoencoder.")
            row: tuple[np.ndarray, ...] = (latent, np.zeros_like(latent)) if info.posterior else (latent,)
        else:
            row = next(rows)
        yield row[0].reshape(-1), side, side, *(values.reshape(-1) for values in row[1:])


def caption_rows(
    samples: Sequence[Sample], encoded: Sequence[tuple[Tensor, ...]], width: int
) -> Iterator[list[Float[np.ndarray, "l d"]]]:
    """For each sample the states of each of its captions, without padding."""
    states = (
        row[real]
        for padded, mask in encoded
        for row, real in zip(_to_half(padded.detach(), "text encoder"), mask.bool().cpu().numpy(), strict=True)
    )
    for sample in samples:
        if given := sample.record.encoded:
            if given.text.size % width:
                raise UserError(f"{sample.record.key} has caption states of another width than {width}.")
            yield [given.text.reshape(-1, width)]
        else:
            yield list(itertools.islice(states, len(sample.texts)))
