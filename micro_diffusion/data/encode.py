"""From records to columns of numbers: what threads do for each picture, and what the encoders' tensors become."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from micro_diffusion.data.captions import CAPTION_RULES, clean_captions
from micro_diffusion.data.records import Record, Rejected, decode_image, resize_crop
from micro_diffusion.data.store import StoreInfo, lists, quantise
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.random import derive_seed

# Pictures in [-1, 1], (b, 3, h, w), to the mean and standard deviation of their scaled latents, (b, c, h, w) each.
EncodeImages = Callable[[Tensor], tuple[Tensor, Tensor]]
States = tuple[Float[Tensor, "b l d"], Bool[Tensor, "b l"]]  # padded, and the mask of real tokens
EncodeText = Callable[[Sequence[str]], States]  # of captions
Columns = Mapping[str, Any]  # of an Arrow table, by name


class Sample(NamedTuple):
    """A record that is ready to be encoded."""

    record: Record
    texts: list[str]
    weights: list[float]
    size: tuple[int, int]  # width and height of the original
    crops: dict[int, UInt8[np.ndarray, "h w 3"]]  # by resolution


def load(record: Record, resolutions: Sequence[int], info: StoreInfo) -> Sample | Rejected:
    """Clean the captions and decode the picture for the resolutions that are asked for; or why it cannot be used."""
    try:
        if record.problem:
            raise record.problem
        if not record.key.isprintable():  # file names that are not UTF-8 among them
            raise Rejected("unprintable key")
        texts, weights = clean_captions(record.captions, CAPTION_RULES[info.caption_rule])
        if not resolutions or record.encoded:
            return Sample(record, texts, weights, (0, 0), {})
        image = decode_image(record, min_size=info.min_size, max_aspect=info.max_aspect)
        crops = {resolution: resize_crop(image, resolution) for resolution in resolutions}
        return Sample(record, texts, weights, image.size, crops)
    except Rejected as error:
        error.key = record.key
        return error


def encode_pictures(
    samples: Sequence[Sample], resolution: int, encode: EncodeImages, info: StoreInfo, *, device: torch.device | str
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Mean and deviation of the latents, on the device; of latents that the source has, themselves and zeros."""
    if not samples[0].record.encoded:
        pixels = torch.from_numpy(np.stack([sample.crops[resolution] for sample in samples])).to(device)
        return encode(pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1))
    side, given = resolution // info.autoencoder.downscale, []
    for record, *_ in samples:
        given.append(record.encoded.latents.get(resolution, np.zeros(0)) if record.encoded else np.zeros(0))
        if given[-1].size != info.autoencoder.channels * side**2:
            raise UserError(f"{record.key} has no latents of {resolution} px from such an autoencoder.")
    latents = torch.from_numpy(np.stack(given)).reshape(len(given), -1, side, side)
    return latents, torch.zeros_like(latents)


def encode_captions(samples: Sequence[Sample], encode: EncodeText, *, width: int, at_once: int) -> Iterator[States]:
    """Padded states of all captions and the masks of real tokens, `at_once` at a time, or those that the source has."""
    if not samples[0].record.encoded:
        texts = [text for sample in samples for text in sample.texts]
        return (encode(texts[start : start + at_once]) for start in range(0, len(texts), at_once))
    given = [record.encoded.text if record.encoded else np.zeros(0) for record, *_ in samples]
    if odd := [sample.record.key for sample, text in zip(samples, given, strict=True) if text.size % width]:
        raise UserError(f"{odd[0]} has caption states of another width than {width}.")
    states = [torch.from_numpy(text.reshape(1, -1, width).copy()) for text in given]
    return ((each, torch.ones(each.shape[:2], dtype=torch.bool)) for each in states)


def to_half(values: Tensor, maker: str) -> Tensor:
    """In float16 on the CPU; UserError where that cannot hold them."""
    half = values.detach().half().cpu()
    if not half.isfinite().all():
        raise UserError(f"The {maker} returned values that float16 cannot hold; run it in float32.")
    return half


def row_columns(samples: Sequence[Sample]) -> Columns:
    """What people read of a row."""
    records, texts, weights, sizes, _ = zip(*samples, strict=True)
    told = {name: [getattr(record, name) for record in records] for name in ("key", "source", "split")}
    width, height = zip(*sizes, strict=True)
    return {**told, "captions": texts, "weights": weights, "width": width, "height": height}


def latent_columns(mean: Tensor, deviation: Tensor, samples: Sequence[Sample], size: int, info: StoreInfo) -> Columns:
    """Mean and deviation, or a draw from each posterior by a generator that (seed, key, size in pixels) decide."""
    mean, deviation = mean.detach().float().cpu(), deviation.detach().float().cpu()
    if not info.posterior:
        seeds = [derive_seed(info.seed, "posterior", sample.record.key, size) for sample in samples]
        noise = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        mean = mean + deviation * torch.stack(noise)
    kept = {"latents": mean, **({"deviation": deviation} if info.posterior else {})}
    count, channels, height, width = mean.shape
    sizes = [channels * height * width] * count
    found = {name: lists(to_half(values, "autoencoder").numpy().reshape(-1), sizes) for name, values in kept.items()}
    return {**found, "height": [height] * count, "width": [width] * count}


def text_columns(
    encoded: Sequence[tuple[Tensor, Tensor]], samples: Sequence[Sample], *, width: int, small: bool
) -> Columns:
    """States of all captions of each row without padding; `small` makes them int8 with a scale for each token."""
    real = [mask.bool().cpu() for _, mask in encoded]
    states = torch.cat([to_half(all_, "text encoder")[mask] for (all_, _), mask in zip(encoded, real, strict=True)])
    lengths = torch.cat([mask.sum(1) for mask in real]).numpy().astype(np.int32)
    counts = [1 if sample.record.encoded else len(sample.texts) for sample in samples]
    tokens = np.add.reduceat(lengths, np.cumsum([0, *counts[:-1]]))
    values, scales = quantise(states.numpy()) if small else (states.numpy(), None)
    columns = {"lengths": lists(lengths, counts), "states": lists(values.reshape(-1), tokens * width)}
    return columns if scales is None else {**columns, "scales": lists(scales, tokens)}
