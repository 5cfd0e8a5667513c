"""Text to picture: the transformer with its objective, its text encoder and its autoencoder."""

import functools
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from micro_diffusion.diffusion.guidance import guided
from micro_diffusion.diffusion.objectives import EDM, Flow, Network
from micro_diffusion.diffusion.samplers import SAMPLERS, Denoiser, OnStep
from micro_diffusion.models import text_encoders
from micro_diffusion.models.autoencoders import Autoencoder, load_autoencoder
from micro_diffusion.models.checkpoints import SDXL, ModelCard, Part, load_checkpoint
from micro_diffusion.models.dit import DiT, conditioned
from micro_diffusion.models.masking import TextFeatures, null_caption
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.models.text_encoders import DFN5B, Captions, TextEncoder, Tokens, load_text_encoder
from micro_diffusion.runtime.device import autocast
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.parse import choose
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
        self, dit: DiT, objective: EDM | Flow, *,
        load_vae: Callable[[], Autoencoder], load_text_encoder: Callable[[], TextEncoder],
        text_length: int | None = None, precision: str = "bf16",
        train_mask_ratio: float = 0.0, precomputed_latents: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dit, self.objective = dit, objective
        self.text_length, self.precision = text_length, precision
        self.train_mask_ratio, self.precomputed_latents = train_mask_ratio, precomputed_latents
        self.compiled = False
        self._loaders: Mapping[str, Callable[[], nn.Module]] = {"vae": load_vae, "text_encoder": load_text_encoder}

    @classmethod
    def from_checkpoint(
        cls, name: str, *, device: torch.device | str = "cpu", precision: str = "bf16",
        autoencoder: str | None = None, text_encoder: str | None = None,
    ) -> "LatentDiffusion":  # fmt: skip
        """A released or own model, by a name or path that `read_checkpoint` takes."""
        dit, card = load_checkpoint(name, autoencoder=autoencoder, text_encoder=text_encoder)
        return cls.from_card(dit.to(device), card, precision=precision)

    @classmethod
    def from_card(cls, dit: DiT, card: ModelCard, *, precision: str = "bf16") -> "LatentDiffusion":
        """A transformer with the parts that its card names; UserError at the first use of one with other weights."""
        return cls(
            dit, card.objective, text_length=card.text_length, precision=precision,
            load_vae=lambda: _same(load_autoencoder(card.autoencoder.name), card.autoencoder),
            load_text_encoder=lambda: _same(load_text_encoder(card.text_encoder.name), card.text_encoder),
        )  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads `dit.*` alone: what a whole model's state has of `vae` and `text_encoder` was never trained."""
        parts = tuple(f"{name}." for name in self._loaders)
        weights = {name: tensor for name, tensor in state_dict.items() if not name.startswith(parts)}
        beside = [name for name in weights if not name.startswith("dit.")]
        if strict and beside:
            raise UserError(f"A whole model's state has dit.*, vae.* and text_encoder.*, and no {beside[0]}.")
        weights = {name.removeprefix("dit."): tensor for name, tensor in weights.items()}
        return self.dit.load_state_dict(weights, strict=strict, assign=assign)

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there yet: loads the autoencoder or the text encoder."""
        loaders = self.__dict__.get("_loaders", {})
        if name not in loaders or name in self._modules:
            return super().__getattr__(name)
        part, config = loaders[name](), self.dit.config
        takes = config.in_channels if name == "vae" else config.caption_channels
        gives = part.channels if isinstance(part, Autoencoder) else part.width
        if takes != gives:
            kind = "latent channels" if name == "vae" else "wide text"
            raise UserError(f"The model takes {takes} {kind}, but {part.name!r} gives {gives}; name another {name}.")
        setattr(self, name, part.to(self.device))
        return part

    @property
    def tokenizer(self) -> Any:
        return self.text_encoder.tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.dit.parameters()).device

    def compile_transformer(self) -> None:
        """For many pictures: a minute or two at the first call, faster then; on CUDA as a CUDA graph.

        One shape is compiled: from now on `generate` calls the network for `batch_size` pictures however few there are
        (give as few), and captions are padded to the most tokens.
        """
        self.dit.compile(mode="reduce-overhead" if self.device.type == "cuda" else None, dynamic=False)
        self.compiled = True

    def encode_prompts(self, prompts: Captions, attention_mask: Tokens | None = None) -> TextFeatures:
        """Text features of prompts or their tokens, of the length that the transformer was trained with, if fixed."""
        states, mask = self.text_encoder.encode(prompts, attention_mask)
        # where all positions count, or the shape is compiled, their number must not depend on others
        whole = self.compiled or self.dit.config.text_mask == "none"
        length = self.text_length or (self.text_encoder.max_length if whole else states.shape[1])
        missing = length - states.shape[1]  # below zero cuts
        return TextFeatures(F.pad(states, (0, 0, 0, missing)), F.pad(mask, (0, missing)))

    @torch.no_grad()
    def generate(
        self, prompt: str | Sequence[str] | None = None, tokenized_prompts: Tokens | None = None, *,
        attention_mask: Tokens | None = None, negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 30, guidance_scale: float = 5.0, sampler: str = "heun",
        guidance_interval: tuple[float, float] | None = None, seed: Seed = None,
        noise: Float[Tensor, "b c h w"] | None = None, return_only_latents: bool = False, batch_size: int = 16,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "b channels height width"]:  # fmt: skip
        """Pictures in [0, 1], one a prompt, or their latents; `batch_size` at a time.

        Prompts may come as tokens, (b, l) or (b, 1, l), with the mask that `tokenizer.tokenize` gives. Picture i starts
        from noise of (seed, i), or of its own seed if a list is given, whatever the batches; None is fresh noise. Unit
        `noise` may be given instead. Raises UserError for an empty list of prompts and for unknown settings.
        """
        prompts = _prompts(prompt, tokenized_prompts)
        count = len(prompts)
        if attention_mask is not None and tokenized_prompts is None:
            raise UserError("attention_mask does nothing without tokenized_prompts; leave it out.")
        negatives = [negative_prompt] * count if isinstance(negative_prompt, str) else negative_prompt
        if negatives is not None and len(negatives) != count:
            raise UserError(f"There are {len(negatives)} negative prompts for {count} prompts; give one or as many.")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; draw at least one picture at a time.")
        vae = None if return_only_latents else self.vae  # before the work: it may not load
        seeds = picture_seeds(seed, count)
        results = []
        for start in range(0, count, batch_size):
            part = slice(start, start + batch_size)
            text = self.encode_prompts(prompts[part], None if attention_mask is None else attention_mask[part])
            latents = sample_latents(
                self.dit, self.objective, text,
                self.noise(seeds[part]) if noise is None else noise[part].to(self.device),
                negative=None if negatives is None else self.encode_prompts(negatives[part]),
                num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
                guidance_interval=guidance_interval, sampler=sampler, precision=self.precision, on_step=on_step,
                pad_to=batch_size if self.compiled else 0,
            )  # fmt: skip
            results.append(latents if vae is None else vae.decode(latents))
        return torch.cat(results)

    def noise(self, seeds: Sequence[int]) -> Float[Tensor, "b c h w"]:
        """Unit noise, a picture a seed; drawn on the CPU, so that it is the same on every device."""
        shape = (self.dit.config.in_channels, *self.dit.config.latent_size)
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(draws).to(self.device)

    def forward(
        self, images: Float[Tensor, "b c h w"], captions: Sequence[str], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        """Training loss of pictures in [-1, 1], or of latents if `precomputed_latents`; draws come from the CPU."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        latents = images
        if not self.precomputed_latents:
            mean, std = self.vae.encode(images)
            latents = mean + std * normal(*mean.shape)
        network = text_network(
            self.dit, self.encode_prompts(captions), precision=self.precision, mask_ratio=self.train_mask_ratio,
            mask_noise=torch.rand(len(latents), self.dit.num_patches, generator=generator).to(self.device),
        )  # fmt: skip
        level = self.objective.noise_level(normal(len(latents)))
        noise, patch_size = normal(*latents.shape), self.dit.config.patch_size
        return self.objective.loss(network, latents, level, noise, patch_size=patch_size).mean


def create_latent_diffusion(
    vae_name: str = SDXL, text_encoder_name: str = DFN5B, *,
    dit_arch: str = "MicroDiT_XL_2", latent_res: int = 32, in_channels: int = 4, pos_interp_scale: float = 1.0,
    dtype: str = "bfloat16", precomputed_latents: bool = True,
    p_mean: float = -0.6, p_std: float = 1.2, train_mask_ratio: float = 0.0,
) -> LatentDiffusion:  # fmt: skip
    """A new model with random weights and the paper's parts.

    Captions are masked ("padding") but with OpenCLIP, whose released models attend to all 77 positions, or where the
    text encoder's name says `?mask=none`. With `precomputed_latents`, training takes latents, and the encoders are
    loaded at their first use, onto the transformer's device, otherwise at once.
    """
    precision = choose({"bfloat16": "bf16", "float32": "float32"}, dtype, "dtype")
    config = choose(PRESETS, dit_arch, "dit_arch")(
        input_size=latent_res, in_channels=in_channels, pos_interp_scale=pos_interp_scale,
        caption_channels=text_encoders.text_encoder_width(text_encoder_name),
        text_mask=text_encoders.text_mask_policy(text_encoder_name),
    )  # fmt: skip
    model = LatentDiffusion(
        DiT(config), EDM(p_mean=p_mean, p_std=p_std),
        load_vae=lambda: load_autoencoder(vae_name), load_text_encoder=lambda: load_text_encoder(text_encoder_name),
        precision=precision, train_mask_ratio=train_mask_ratio, precomputed_latents=precomputed_latents,
    )  # fmt: skip
    if not precomputed_latents:
        _ = model.vae, model.text_encoder
    return model


@torch.no_grad()
def sample_latents(
    dit: DiT, objective: EDM | Flow, text: TextFeatures, noise: Float[Tensor, "b c h w"], *,
    negative: TextFeatures | None = None, num_inference_steps: int = 30, guidance_scale: float = 5.0,
    guidance_interval: tuple[float, float] | None = None, sampler: str = "heun", precision: str = "bf16",
    on_step: OnStep | None = None, pad_to: int = 0,
) -> Float[Tensor, "b c h w"]:  # fmt: skip
    """Latents from unit noise; guided away from `negative`, which is the null caption by default.

    The network is called as for `pad_to` pictures at least; only it sees the surplus.
    """
    sample = choose(SAMPLERS, sampler, "sampler")
    if num_inference_steps < 1:
        raise UserError(f"{num_inference_steps} sampling steps are too few; one is the least.")
    if guidance_interval is not None and not guidance_interval[0] < guidance_interval[1]:
        raise UserError(f"The guidance interval {guidance_interval} is empty; give a lower and a higher noise level.")
    if negative is None:
        negative = null_caption(*text, torch.ones(len(noise), dtype=torch.bool, device=noise.device))

    def denoiser(features: TextFeatures) -> Denoiser:
        count = len(features.mask)
        rows = torch.arange(max(count, count // len(noise) * pad_to), device=noise.device).clamp(max=count - 1)
        padded = TextFeatures(*(each[rows] for each in features))
        network = functools.cache(lambda: text_network(dit, padded, precision=precision, keys=True))  # if it is called
        return lambda x, level: objective.denoise(network(), x[rows], level[rows]).sample[:count]

    both = TextFeatures(*(pad_sequence([*a, *b], batch_first=True) for a, b in zip(text, negative, strict=True)))
    denoise = guided(denoiser(text), denoiser(both), scale=guidance_scale, interval=guidance_interval)
    levels = objective.levels(num_inference_steps)
    return sample(denoise, objective.start(noise.float()), levels, alpha=objective.alpha, on_step=on_step)


def text_network(
    dit: DiT, text: TextFeatures, *, precision: str, mask_ratio: float = 0.0,
    mask_noise: Float[Tensor, "b t"] | None = None, keys: bool = False,
) -> Network:  # fmt: skip
    """The transformer as an objective calls it: with its text, encoded once, and its precision fixed.

    `keys` keeps each block's keys and values of the text, for many calls. Weights in bfloat16 compute in bf16 on every
    device.
    """
    device = text.states.device
    if device.type != "cuda":
        precision = "bf16" if dit.x_embedder.proj.weight.dtype == torch.bfloat16 else "float32"
    with autocast(device, precision):
        encoded = dit.encode_text(*text, keys=keys)
    return conditioned(dit, encoded, precision=precision, mask_ratio=mask_ratio, mask_noise=mask_noise)


def _prompts(prompt: str | Sequence[str] | None, tokens: Tokens | None) -> Captions:
    if tokens is not None and prompt is None and len(tokens):
        return tokens
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if not prompts or tokens is not None:
        raise UserError("There is nothing to draw: give at least one prompt, or tokenized_prompts in their place.")
    return prompts


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
    if wanted.sha256 is not None and loaded.sha256 != wanted.sha256:
        raise UserError(
            f"The model was trained with another {wanted.name!r} than the one here (sha256 {wanted.sha256[:12]}, "
            f"not {loaded.sha256[:12]}); install or point to the same weights."
        )
    return loaded
