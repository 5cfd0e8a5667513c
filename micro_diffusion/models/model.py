"""Text to picture: the transformer with its objective, its text encoder and its autoencoder."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from micro_diffusion.diffusion.guidance import guided
from micro_diffusion.diffusion.objectives import EDM, Flow, Network, Prediction
from micro_diffusion.diffusion.samplers import SAMPLERS, Denoiser
from micro_diffusion.models.autoencoders import Autoencoder, load_autoencoder
from micro_diffusion.models.checkpoints import Part, load_model
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.masking import null_caption
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.models.text_encoders import TextEncoder, TextFeatures, load_text_encoder, text_encoder_width
from micro_diffusion.runtime.device import autocast
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.random import derive_seed

Seed = int | Sequence[int] | None
PartT = TypeVar("PartT", Autoencoder, TextEncoder)


class LatentDiffusion(nn.Module):
    """Pictures from prompts. `vae` and `text_encoder` are loaded when first used, onto the transformer's device.

    `precision` ("bf16" or "float32") is the transformer's on CUDA; elsewhere it is float32.
    """

    dit: DiT
    vae: Autoencoder
    text_encoder: TextEncoder

    def __init__(
        self,
        dit: DiT,
        objective: EDM | Flow,
        *,
        load_vae: Callable[[], Autoencoder],
        load_text_encoder: Callable[[], TextEncoder],
        text_length: int | None = None,
        precision: str = "bf16",
        train_mask_ratio: float = 0.0,
        precomputed_latents: bool = True,
    ) -> None:
        super().__init__()
        self.dit, self.objective = dit, objective
        self.text_length, self.precision = text_length, precision
        self.train_mask_ratio, self.precomputed_latents = train_mask_ratio, precomputed_latents
        self._loaders: Mapping[str, Callable[[], nn.Module]] = {"vae": load_vae, "text_encoder": load_text_encoder}

    @classmethod
    def from_folder(cls, folder: Path, *, device: torch.device | str = "cpu") -> "LatentDiffusion":
        """The model of a run's model folder; UserError if an encoder is not the one that it was trained with."""
        dit, card = load_model(folder)
        return cls(
            dit.to(device),
            card.objective,
            load_vae=lambda: _same(load_autoencoder(card.autoencoder.name), card.autoencoder),
            load_text_encoder=lambda: _same(load_text_encoder(card.text_encoder.name), card.text_encoder),
            text_length=card.text_length,
        )

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there yet: loads the autoencoder or the text encoder."""
        loaders = self.__dict__.get("_loaders", {})
        if name in loaders and name not in self._modules:
            setattr(self, name, loaders[name]().to(self.device))
        return super().__getattr__(name)

    @property
    def tokenizer(self) -> Any:
        """The text encoder's."""
        return self.text_encoder.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.dit.parameters()).device

    def encode_prompts(self, prompts: Sequence[str]) -> TextFeatures:
        """Text features of the length that the transformer was trained with, if that was fixed."""
        states, mask = self.text_encoder.encode(prompts)
        missing = (self.text_length or states.shape[1]) - states.shape[1]  # below zero cuts
        return TextFeatures(F.pad(states, (0, 0, 0, missing)), F.pad(mask, (0, missing)))

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        guidance_interval: tuple[float, float] | None = None,
        sampler: str = "heun",
        seed: Seed = None,
        return_only_latents: bool = False,
        batch_size: int = 16,
    ) -> Float[Tensor, "b c h w"]:
        """Pictures in [0, 1], one a prompt, or their latents; `batch_size` at a time.

        Picture i starts from noise of (seed, i), or of its own seed if a list is given, whatever the batches; None is
        fresh noise. Raises UserError for an empty list of prompts and for unknown settings.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("There is nothing to draw: give at least one prompt.")
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        if negatives is not None and len(negatives) != len(prompts):
            raise UserError(
                f"There are {len(negatives)} negative prompts for {len(prompts)} prompts; give one or as many."
            )
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; draw at least one picture at a time.")
        vae = None if return_only_latents else self.vae  # before the work: it may not load
        seeds = picture_seeds(seed, len(prompts))
        results = []
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            latents = sample_latents(
                self.dit,
                self.objective,
                self.encode_prompts(prompts[part]),
                self.noise(seeds[part]),
                negative=None if negatives is None else self.encode_prompts(negatives[part]),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                guidance_interval=guidance_interval,
                sampler=sampler,
                precision=self.precision,
            )
            results.append(latents if vae is None else vae.decode(latents))
        return torch.cat(results)

    def noise(self, seeds: Sequence[int]) -> Float[Tensor, "b c h w"]:
        """Unit noise, a picture a seed; drawn on the CPU, so that it is the same on every device."""
        shape = (self.dit.config.in_channels, *self.dit.config.latent_size)
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(draws).to(self.device)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        captions: Sequence[str],
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Training loss of pictures in [-1, 1], or of latents if `precomputed_latents`; draws come from the CPU."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        latents = images
        if not self.precomputed_latents:
            mean, std = self.vae.encode(images)
            latents = mean + std * normal(*mean.shape)
        network = text_network(
            self.dit,
            self.encode_prompts(captions),
            precision=self.precision,
            mask_ratio=self.train_mask_ratio,
            mask_noise=torch.rand(len(latents), self.dit.num_patches, generator=generator).to(self.device),
        )
        level = self.objective.noise_level(normal(len(latents)))
        noise, patch_size = normal(*latents.shape), self.dit.config.patch_size
        return self.objective.loss(network, latents, level, noise, patch_size=patch_size).mean


def create_latent_diffusion(
    vae_name: str = "stabilityai/stable-diffusion-xl-base-1.0",
    text_encoder_name: str = "openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378",
    *,
    dit_arch: str = "MicroDiT_XL_2",
    latent_res: int = 32,
    in_channels: int = 4,
    pos_interp_scale: float = 1.0,
    dtype: str = "bfloat16",
    precomputed_latents: bool = True,
    p_mean: float = -0.6,
    p_std: float = 1.2,
    train_mask_ratio: float = 0.0,
) -> LatentDiffusion:
    """A new model with random weights and the paper's parts.

    Captions are masked ("padding") but with OpenCLIP, whose released models attend to all 77 positions. With
    `precomputed_latents`, training takes latents, and the encoders are loaded at their first use, otherwise at once.
    """
    precisions = {"bfloat16": "bf16", "float32": "float32"}
    if dit_arch not in PRESETS or dtype not in precisions:
        known = PRESETS if dit_arch not in PRESETS else precisions
        wrong = dit_arch if dit_arch not in PRESETS else dtype
        raise UserError(f"There is no {wrong!r}; choose one of: {', '.join(known)}.")
    config = PRESETS[dit_arch](
        input_size=latent_res,
        in_channels=in_channels,
        caption_channels=text_encoder_width(text_encoder_name),
        pos_interp_scale=pos_interp_scale,
        text_mask="none" if text_encoder_name.startswith("openclip:") else "padding",
    )
    model = LatentDiffusion(
        DiT(config),
        EDM(p_mean=p_mean, p_std=p_std),
        load_vae=lambda: load_autoencoder(vae_name),
        load_text_encoder=lambda: load_text_encoder(text_encoder_name),
        precision=precisions[dtype],
        train_mask_ratio=train_mask_ratio,
        precomputed_latents=precomputed_latents,
    )
    if not precomputed_latents:
        _ = model.vae, model.text_encoder
    return model


@torch.no_grad()
def sample_latents(
    dit: DiT,
    objective: EDM | Flow,
    text: TextFeatures,
    noise: Float[Tensor, "b c h w"],
    *,
    negative: TextFeatures | None = None,
    num_inference_steps: int = 30,
    guidance_scale: float = 5.0,
    guidance_interval: tuple[float, float] | None = None,
    sampler: str = "heun",
    precision: str = "bf16",
) -> Float[Tensor, "b c h w"]:
    """Latents from unit noise; guided away from `negative`, which is the null caption by default."""
    if sampler not in SAMPLERS:
        raise UserError(f"There is no sampler {sampler!r}; choose one of: {', '.join(SAMPLERS)}.")
    if num_inference_steps < 1:
        raise UserError(f"{num_inference_steps} sampling steps are too few; one is the least.")
    if negative is None:
        dropped = torch.ones(len(noise), dtype=torch.bool, device=noise.device)
        states, mask = null_caption(text.states, text.mask, dropped)
        negative = TextFeatures(states, text.mask if mask is None else mask)

    def denoiser(features: TextFeatures) -> Denoiser:
        network = text_network(dit, features, precision=precision)
        return lambda x, level: objective.denoise(network, x, level).sample

    denoise = guided(denoiser(text), denoiser(negative), scale=guidance_scale, interval=guidance_interval)
    levels = objective.levels(num_inference_steps)
    return SAMPLERS[sampler](denoise, objective.start(noise), levels, alpha=objective.alpha)


def text_network(
    dit: DiT,
    text: TextFeatures,
    *,
    precision: str,
    mask_ratio: float = 0.0,
    mask_noise: Float[Tensor, "b t"] | None = None,
) -> Network:
    """The transformer as an objective calls it: with its text, encoded once, and its precision fixed."""
    device = text.states.device
    precision = precision if device.type == "cuda" else "float32"
    with autocast(device, precision):
        encoded = dit.encode_text(text.states, text.mask)

    def network(x: Float[Tensor, "b c h w"], noise_label: Float[Tensor, " b"]) -> Prediction:
        x, noise_label = x.float(), noise_label.float()  # samplers keep their state in float64
        with autocast(device, precision):
            return dit(x, noise_label, encoded, mask_ratio=mask_ratio, mask_noise=mask_noise if mask_ratio else None)

    return network


def picture_seeds(seed: Seed, count: int) -> list[int]:
    """A seed for each picture: of (seed, i), of (seed[i], 0), or fresh ones. UserError for a list of another length."""
    if seed is None:
        return [secrets.randbits(63) for _ in range(count)]
    if isinstance(seed, int):
        return [derive_seed(seed, "sample", index) for index in range(count)]
    if len(seed) != count:
        raise UserError(f"There are {len(seed)} seeds for {count} prompts; give one seed, or one for each prompt.")
    return [derive_seed(one, "sample", 0) for one in seed]


def _same(loaded: PartT, wanted: Part) -> PartT:
    """The part, if its weights are the wanted ones."""
    if loaded.sha256 != wanted.sha256:
        raise UserError(
            f"The model was trained with another {wanted.name!r} than the one here (sha256 {wanted.sha256[:12]}, "
            f"not {loaded.sha256[:12]}); install or point to the same weights."
        )
    return loaded
