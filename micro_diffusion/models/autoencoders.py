"""Autoencoders: pictures to latents and back. Loaded, never trained here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

import micro_diffusion.embedded
from micro_diffusion.models.pretrained import loading, part_folder, weight_files, weights_sha256
from micro_diffusion.runtime.files import UserError

EMBEDDED = "embedded"
KINDS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
FILE = "diffusion_pytorch_model.safetensors"
WEIGHTS = ((FILE,), ("diffusion_pytorch_model-*.safetensors", f"{FILE}.index.json"))
PIXELS_AT_ONCE = {"cpu": 2**18}  # 16 pictures at 128 px: more leave the caches, and a picture takes 1.6 times as long
MOST_PIXELS_AT_ONCE = 2**20  # elsewhere; bounds the memory of a call: 64 pictures at 128 px, 4 at 512 px
TILE = 1024  # pixels of a side; a picture of more than TILE x TILE is decoded in tiles of that size at most


class LatentDistribution(NamedTuple):
    """Mean and standard deviation of the latents of each picture, shifted and scaled as the transformer sees them."""

    mean: Float[Tensor, "b c h w"]
    std: Float[Tensor, "b c h w"]


class Autoencoder(nn.Module):
    """A `diffusers` autoencoder; latents are (z - shift_factor) * scaling_factor. `sha256` is of its weights.

    Shift, scale, channels and pixels to a latent (`downscale`) come from its configuration.
    """

    def __init__(self, model: Any, *, name: str, sha256: str) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name, self.sha256 = name, sha256
        config = dict(model.config)
        blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
        self.channels: int = config["latent_channels"]
        self.downscale = 2 ** (len(blocks) - 1)
        self.scaling_factor = float(config.get("scaling_factor") or 1.0)
        self.shift_factor = float(config.get("shift_factor") or 0.0)
        if config.get("latents_mean") or config.get("latents_std"):
            raise UserError(f"The autoencoder {name!r} scales each channel by itself and cannot serve; name another.")

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b 3 h w"]) -> LatentDistribution:
        """Pictures in [-1, 1], whose sides are multiples of `downscale`; float32. Without a posterior, std is zero."""
        if images.shape[-1] % self.downscale or images.shape[-2] % self.downscale:
            raise ValueError(f"{tuple(images.shape[-2:])} pixels are not multiples of {self.downscale}")
        means, stds = [], []
        for part in images.split(_at_once(images.shape[-2] * images.shape[-1], images.device)):
            encoded = self.model.encode(part.to(self._like))
            posterior = getattr(encoded, "latent_dist", None)
            mean = (encoded[0] if posterior is None else posterior.mean).float()
            means.append((mean - self.shift_factor) * self.scaling_factor)
            std = torch.zeros_like(mean) if posterior is None else posterior.std.float()
            stds.append(std * self.scaling_factor)
        return LatentDistribution(torch.cat(means), torch.cat(stds))

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Pictures in [0, 1], float32; in overlapping tiles if they are large."""
        z = latents / self.scaling_factor + self.shift_factor
        pixels = z.shape[-2] * z.shape[-1] * self.downscale**2
        if pixels > TILE**2:
            return torch.cat([self._decode_tiles(part) for part in z.split(1)])
        return torch.cat([self._decode(part) for part in z.split(_at_once(pixels, z.device))])

    def _decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        return (self.model.decode(z.to(self._like)).sample.float() / 2 + 0.5).clamp(0, 1)

    def _decode_tiles(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """A mean of tiles that overlap by a quarter, each weighted less towards its edges."""
        size, factor = TILE // self.downscale, self.downscale
        height, width = z.shape[-2] * factor, z.shape[-1] * factor
        total, weights = z.new_zeros(len(z), 3, height, width), z.new_zeros(height, width)
        for top in _starts(z.shape[-2], size):
            for left in _starts(z.shape[-1], size):
                tile = self._decode(z[..., top : top + size, left : left + size])
                ramps = (torch.arange(1, n + 1, device=z.device) / n for n in tile.shape[-2:])
                rows, columns = (torch.minimum(ramp, ramp.flip(0)) for ramp in ramps)
                weight = rows[:, None] * columns
                y, x = (slice(at * factor, at * factor + n) for at, n in ((top, len(rows)), (left, len(columns))))
                total[..., y, x] += tile * weight
                weights[y, x] += weight
        return total / weights

    @property
    def _like(self) -> Tensor:
        """A tensor of the weights' device and dtype.

        An autoencoder whose activations overflow in float16, as SDXL's do (`force_upcast`), leaves float16 for float32.
        """
        like = next(self.model.parameters())
        if like.dtype == torch.float16 and self.model.config.get("force_upcast"):
            self.model.float()
        return next(self.model.parameters())


def load_autoencoder(
    name: str = EMBEDDED, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """An autoencoder by name: `embedded`, a folder in diffusers format, or a name on the hub.

    A pipeline's folder will do, if the autoencoder is in its subfolder `vae`. Raises UserError when it is not there or
    does not load.
    """
    embedded = Path(micro_diffusion.embedded.__path__[0], "autoencoder")
    folder = embedded if name == EMBEDDED else part_folder(name, ["config.json"], weights=WEIGHTS, subfolder="vae")
    weights = weight_files(f"autoencoder {name!r}", folder, WEIGHTS)
    with loading(f"autoencoder in {folder}", library="diffusers") as diffusers:
        kind = diffusers.AutoencoderKL.load_config(folder, local_files_only=True).get("_class_name")
        if kind not in KINDS:
            raise UserError(f"{folder} holds a {kind}; autoencoders that can be loaded are: {', '.join(KINDS)}.")
        model, report = getattr(diffusers, kind).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    if missing := report["missing_keys"]:
        raise UserError(f"The autoencoder in {folder} lacks weights ({missing[0]} and {len(missing) - 1} more).")
    if torch.device(device).type == "cpu":
        model.to(memory_format=torch.channels_last)  # 1.4 times as fast there; on an H100 0.7 times (docs/results.md)
    for module in model.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = True  # each follows a norm or a convolution; 1.3 times as fast for one picture on a CPU
    return Autoencoder(model, name=name, sha256=weights_sha256(weights)).to(device=device, dtype=dtype)


def _at_once(pixels: int, device: torch.device) -> int:
    return max(1, PIXELS_AT_ONCE.get(device.type, MOST_PIXELS_AT_ONCE) // pixels)


def _starts(length: int, size: int) -> Iterator[int]:
    """Where tiles of `size` begin along a side: the last one ends with it."""
    yield from range(0, max(length - size, 0), size * 3 // 4)
    yield max(length - size, 0)
