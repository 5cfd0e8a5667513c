"""Autoencoders: pictures to latents and back. Loaded, never trained here."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

import micro_diffusion.embedded
from micro_diffusion.models.pretrained import loading, part_folder
from micro_diffusion.runtime.files import UserError, sha256

EMBEDDED = "embedded"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = (WEIGHTS, "config.json")
PIXELS_AT_ONCE = 2**20  # bounds the memory of a call: 64 pictures at 128 px, 4 at 512 px


class LatentDistribution(NamedTuple):
    """Mean and standard deviation of the latents of each picture, shifted and scaled as the transformer sees them."""

    mean: Float[Tensor, "b c h w"]
    std: Float[Tensor, "b c h w"]


class Autoencoder(nn.Module):
    """A `diffusers` AutoencoderKL; latents are (z - shift_factor) * scaling_factor. `sha256` is of its weights file."""

    def __init__(self, model: Any, *, name: str, sha256: str) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name, self.sha256 = name, sha256
        self.channels: int = model.config.latent_channels
        self.downscale = 2 ** (len(model.config.block_out_channels) - 1)
        self.scaling_factor = float(model.config.scaling_factor)
        self.shift_factor = float(model.config.shift_factor or 0.0)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b 3 h w"]) -> LatentDistribution:
        """Pictures in [-1, 1], whose sides are multiples of `downscale`; float32."""
        if images.shape[-1] % self.downscale or images.shape[-2] % self.downscale:
            raise ValueError(f"{tuple(images.shape[-2:])} pixels are not multiples of {self.downscale}")
        means, stds = [], []
        for part in images.split(_at_once(images.shape[-2] * images.shape[-1])):
            posterior = self.model.encode(part.to(self._like)).latent_dist
            means.append((posterior.mean.float() - self.shift_factor) * self.scaling_factor)
            stds.append(posterior.std.float() * self.scaling_factor)
        return LatentDistribution(torch.cat(means), torch.cat(stds))

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Pictures in [0, 1], float32."""
        pictures = []
        for part in latents.split(_at_once(latents.shape[-2] * latents.shape[-1] * self.downscale**2)):
            decoded = self.model.decode((part / self.scaling_factor + self.shift_factor).to(self._like)).sample
            pictures.append((decoded.float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(pictures)

    @property
    def _like(self) -> Tensor:
        """A tensor of the weights' device and dtype."""
        return next(self.model.parameters())


def load_autoencoder(
    name: str = EMBEDDED, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """An autoencoder by name: `embedded`, a folder in diffusers format, or a name on the hub.

    A pipeline's folder will do, if the autoencoder is in its subfolder `vae`. Raises UserError when it is not there or
    does not load.
    """
    folder = _folder(name)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"The autoencoder {name!r} has no file {WEIGHTS} in {folder}; choose one that has.")
    with loading(f"autoencoder in {folder}", library="diffusers") as diffusers:
        kind = diffusers.AutoencoderKL.load_config(folder, local_files_only=True).get("_class_name")
        if kind != "AutoencoderKL":
            raise UserError(f"{folder} holds a {kind}; so far, autoencoders of the class AutoencoderKL can be loaded.")
        model, report = diffusers.AutoencoderKL.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    if missing := report["missing_keys"]:
        raise UserError(f"The autoencoder in {folder} lacks weights ({missing[0]} and {len(missing) - 1} more).")
    return Autoencoder(model, name=name, sha256=sha256(weights)).to(device=device, dtype=dtype)


def _folder(name: str) -> Path:
    if name == EMBEDDED:
        return Path(micro_diffusion.embedded.__path__[0], "autoencoder")
    folder = part_folder(name, [*FILES, *(f"vae/{file}" for file in FILES)])
    return folder / "vae" if (folder / "vae").is_dir() else folder


def _at_once(pixels: int) -> int:
    return max(1, PIXELS_AT_ONCE // pixels)
