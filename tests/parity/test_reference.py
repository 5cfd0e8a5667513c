"""Numbers of the reference implementation: a small model's outputs, losses, gradients and samples, and all names and
shapes of the released models.

`data/dit_small.safetensors` holds the weights of a small model (`weights.*`), what it was called with (`in.*`) and what
came out (`out.*`, `grad_norm.*`), computed in float32 on a CPU; its metadata are the configuration and the settings.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from micro_diffusion.diffusion.guidance import guided
from micro_diffusion.diffusion.objectives import EDM, LossTerms, Prediction
from micro_diffusion.diffusion.samplers import heun
from micro_diffusion.models.dit import DiT, DiTConfig
from micro_diffusion.models.masking import null_caption
from micro_diffusion.models.model import sample_latents
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.models.text_encoders import TextFeatures

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-5
SHAPES = json.loads((DATA / "official_state_dict_shapes.json").read_text())


@dataclass(frozen=True)
class Reference:
    """The fixture, with the model that it describes."""

    dit: DiT
    tensors: dict[str, Tensor]
    settings: dict[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def edm(self) -> EDM:
        return EDM(*(float(self.settings[name]) for name in ("sigma_data", "p_mean", "p_std")))

    @property
    def guidance_scale(self) -> float:
        return float(self.settings["guidance_scale"])

    def network(
        self, x: Tensor, noise_label: Tensor, *, text: Tensor | None = None, masked: bool = False
    ) -> Prediction:
        """The transformer with the fixture's text and mask."""
        return self.dit(
            x.float(), noise_label.float(), self["in.text"] if text is None else text,
            mask_ratio=float(self.settings["mask_ratio"]) if masked else 0.0, mask_noise=self["in.mask_noise"],
        )  # fmt: skip

    def loss(self, *, masked: bool) -> LossTerms:
        """The project's own objective on the fixture's draws."""
        sigma = self.edm.noise_level(self["in.sigma_normal"])
        return self.edm.loss(
            lambda x, label: self.network(x, label, masked=masked), self["in.latents"], sigma, self["in.noise"],
            patch_size=self.dit.config.patch_size,
        )  # fmt: skip


@pytest.fixture
def reference() -> Reference:
    with safe_open(DATA / "dit_small.safetensors", "pt") as file:
        tensors, settings = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    dit = DiT(DiTConfig(**json.loads(settings["config"])))
    dit.load_state_dict(
        {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    )
    return Reference(dit, tensors, settings)


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    """Relative error in the 2-norm."""
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert (found.double() - wanted.double()).norm() <= TOLERANCE * wanted.double().norm()


def test_forward(reference: Reference) -> None:
    prediction = reference.network(reference["in.latents"], reference["in.noise_label"])
    assert prediction.dropped is None
    assert_equal(prediction.sample, reference["out.unmasked"])


def test_masked_forward(reference: Reference) -> None:
    sample, dropped = reference.network(reference["in.latents"], reference["in.noise_label"], masked=True)
    assert_equal(sample, reference["out.masked"])
    assert dropped is not None and torch.equal(dropped.float(), reference["out.mask"])


def test_text_encoded_once(reference: Reference) -> None:
    encoded = reference.dit.encode_text(reference["in.text"])
    sample, _ = reference.dit(reference["in.latents"], reference["in.noise_label"], encoded)
    assert_equal(sample, reference["out.unmasked"])


def with_null(text: Tensor) -> Tensor:
    """Captions, and as many null captions after them."""
    return torch.cat([text, torch.zeros_like(text)])


def test_guidance(reference: Reference) -> None:
    def network(text: Tensor):
        return lambda x, label: reference.network(x, label, text=text).sample

    text = reference["in.text"]
    guide = guided(network(text), network(with_null(text)), scale=reference.guidance_scale)
    assert_equal(guide(reference["in.latents"], reference["in.noise_label"]), reference["out.cfg"])


@pytest.mark.parametrize("masked", [True, False])
def test_loss(reference: Reference, masked: bool) -> None:
    wanted = reference["out.loss_masked" if masked else "out.loss_unmasked"].squeeze()
    terms = reference.loss(masked=masked)
    assert_equal(terms.mean, wanted)
    assert_equal(terms.per_image.mean(), wanted)


def test_every_gradient(reference: Reference) -> None:
    reference.loss(masked=True).mean.backward()
    wanted = {name.removeprefix("grad_norm."): norm for name, norm in reference.tensors.items() if "grad_norm." in name}
    parameters = dict(reference.dit.named_parameters())
    assert parameters.keys() == wanted.keys()
    for name, norm in wanted.items():
        gradient = parameters[name].grad
        assert gradient is not None, name
        assert abs(gradient.norm().item() - norm.item()) <= TOLERANCE * norm.item(), name


def test_sampler(reference: Reference) -> None:
    edm, text = reference.edm, reference["in.text"]

    def denoiser(text: Tensor):
        return lambda x, sigma: edm.denoise(lambda x, label: reference.network(x, label, text=text), x, sigma).sample

    denoise = guided(denoiser(text), denoiser(with_null(text)), scale=reference.guidance_scale)
    steps = int(reference.settings["num_inference_steps"])
    with torch.no_grad():
        sample = heun(denoise, edm.start(reference["in.latents"]), edm.levels(steps), alpha=edm.alpha)
    assert_equal(sample, reference["out.sample"])


def test_sampler_as_users_call_it(reference: Reference) -> None:
    states = reference["in.text"].squeeze(1)
    sample = sample_latents(
        reference.dit, reference.edm, TextFeatures(states, torch.ones(states.shape[:2], dtype=torch.bool)),
        reference["in.latents"], guidance_scale=reference.guidance_scale,
        num_inference_steps=int(reference.settings["num_inference_steps"]),
    )  # fmt: skip
    assert_equal(sample, reference["out.sample"])


def test_the_null_caption_is_zeros(reference: Reference) -> None:
    """The fixture's last caption is dropped."""
    assert not reference["in.text"][-1].any() and reference["in.text"][:-1].any()
    states = torch.randn(reference["in.text"].squeeze(1).shape)
    every = torch.ones(states.shape[:2], dtype=torch.bool)
    states, _ = null_caption(states, every, every[:, 0])
    sample = reference.network(reference["in.latents"], reference["in.noise_label"], text=states).sample
    assert_equal(sample[-1], reference["out.unmasked"][-1])


@pytest.mark.parametrize("name", SHAPES)
def test_every_name_and_shape(name: str) -> None:
    preset, _, size = name.partition("@")
    pixels, _, channels = size.partition("_c")
    with torch.device("meta"):
        dit = DiT(PRESETS[preset](input_size=int(pixels) // 8, in_channels=int(channels or 4)))
    assert {key: list(tensor.shape) for key, tensor in dit.state_dict().items()} == SHAPES[name]
