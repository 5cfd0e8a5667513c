"""An exported model as a pipeline of `diffusers`."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from micro_diffusion.models.checkpoints import EMBEDDED, ModelCard, load_checkpoint
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.model import LatentDiffusion

Callback = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor]]


class MicroDiTModel(ModelMixin, ConfigMixin):
    """The transformer with the card that describes it, as `diffusers` saves and loads models."""

    _supports_param_buffer_assignment = False  # its positions are float32 whatever the dtype asked for

    @register_to_config
    def __init__(self, card: dict[str, Any]) -> None:
        super().__init__()
        self.card = ModelCard.from_json(json.dumps(card))
        self.dit = DiT(self.card.dit)


class MicroDiffusionPipeline(DiffusionPipeline):
    """Prompts to pictures. The autoencoder (`vae`) and the text encoder are loaded at their first use."""

    _callback_tensor_inputs = ("latents",)

    def __init__(self, transformer: MicroDiTModel) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)
        self.model = LatentDiffusion.from_card(transformer.dit, transformer.card)

    @classmethod
    def from_embedded(cls) -> "MicroDiffusionPipeline":
        """The model that ships with the package, in float32; UserError where there is none."""
        dit, card = load_checkpoint(EMBEDDED)
        transformer = MicroDiTModel(card=json.loads(card.to_json()))
        transformer.dit.load_state_dict(dit.state_dict())
        return cls(transformer)

    @property
    def vae(self) -> Any:
        return self.model.vae

    @property
    def text_encoder(self) -> Any:
        return self.model.text_encoder

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None, *,
        num_inference_steps: int = 30, guidance_scale: float = 5.0, sampler: str = "heun",
        guidance_interval: tuple[float, float] | None = None, num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None, latents: Tensor | None = None,
        output_type: str = "pil", return_dict: bool = True, callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:  # fmt: skip
        """Pictures as "pil", "np" (b, h, w, 3), "pt" (b, 3, h, w) or "latent"; those of a prompt stand together.

        `latents` is unit noise (b, c, h, w), else drawn from `generator`, one or one a picture. After each step
        `callback_on_step_end(pipeline, step, noise level, {"latents": ...})` may return other latents.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is pil, np, pt or latent, not {output_type!r}")
        if set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callbacks are given {self._callback_tensor_inputs}, no more")
        self.model.to(self.device)  # the encoders too, if they were loaded elsewhere
        for module in self.transformer.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()  # beside bfloat16 weights too: where autocast leaves norms alone they take no other
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count, config = len(prompts) * num_images_per_prompt, self.transformer.dit.config
        shape = (count, config.in_channels, *config.latent_size)
        noise = randn_tensor(shape, generator=generator, device=self.device) if latents is None else latents
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            negative_prompt = [text for text in negative_prompt for _ in range(num_images_per_prompt)]

        bar = self.progress_bar(total=num_inference_steps)

        def on_step(step: int, level: float, state: Tensor) -> Tensor:
            bar.update()
            if callback_on_step_end is None:
                return state
            return callback_on_step_end(self, step, level, {"latents": state}).get("latents", state).to(state)

        with bar:
            pictures = self.model.generate(
                [text for text in prompts for _ in range(num_images_per_prompt)], negative_prompt=negative_prompt,
                num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
                guidance_interval=guidance_interval, sampler=sampler, noise=noise, batch_size=max(1, count),
                return_only_latents=output_type == "latent", on_step=on_step,
            )  # fmt: skip
        images: Any = VaeImageProcessor(do_normalize=False).postprocess(pictures, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
