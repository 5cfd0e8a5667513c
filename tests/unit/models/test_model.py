"""Text to picture with tiny random parts: seeds, batches, guidance, lazy parts, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import CHANNELS, TEXT_WIDTH, dit_config, write_autoencoder, write_text_encoder

from micro_diffusion.diffusion.objectives import EDM, Flow, Prediction
from micro_diffusion.diffusion.samplers import SAMPLERS
from micro_diffusion.models.autoencoders import Autoencoder, load_autoencoder
from micro_diffusion.models.checkpoints import ModelCard, Part, write_folder
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.model import LatentDiffusion, create_latent_diffusion, sample_latents
from micro_diffusion.models.text_encoders import TextFeatures, load_text_encoder
from micro_diffusion.runtime.files import UserError

PROMPTS = ["a red apple", "a cat", "a green cat, in red style"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of an autoencoder and a text encoder."""
    folder = tmp_path_factory.mktemp("parts")
    return str(write_autoencoder(folder / "autoencoder")), str(write_text_encoder(folder / "text"))


def random_dit(text_mask: str = "padding") -> DiT:
    """With random weights where a new model has zeros, so that every input matters."""
    torch.manual_seed(0)
    dit = DiT(dit_config(input_size=(8, 12), text_mask=text_mask))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return dit


def make(parts: tuple[str, str], *, text_mask: str = "padding", text_length: int | None = None) -> LatentDiffusion:
    autoencoder, text_encoder = parts
    return LatentDiffusion(
        random_dit(text_mask), EDM(),
        load_vae=lambda: load_autoencoder(autoencoder),
        load_text_encoder=lambda: load_text_encoder(text_encoder),
        text_length=text_length,
    )  # fmt: skip


@pytest.fixture
def model(parts: tuple[str, str]) -> LatentDiffusion:
    return make(parts)


def test_pictures_and_latents(model: LatentDiffusion) -> None:
    pictures = model.generate(PROMPTS, num_inference_steps=2, seed=0)
    assert pictures.shape == (3, 3, 32, 48) and pictures.min() >= 0 and pictures.max() <= 1
    latents = model.generate(PROMPTS, num_inference_steps=2, seed=0, return_only_latents=True)
    assert latents.shape == (3, CHANNELS, 8, 12) and latents.std() > 0.01
    torch.testing.assert_close(model.vae.decode(latents), pictures)


@pytest.mark.parametrize(("text_mask", "text_length"), [("padding", None), ("padding", 9), ("none", 9)])
def test_a_picture_does_not_depend_on_its_neighbours(
    parts: tuple[str, str], text_mask: str, text_length: int | None
) -> None:
    model = make(parts, text_mask=text_mask, text_length=text_length)

    def draw(prompts: list[str], seed: int | list[int], batch_size: int = 16) -> torch.Tensor:
        return model.generate(
            prompts, num_inference_steps=3, seed=seed, batch_size=batch_size, return_only_latents=True
        )

    def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
        return bool((found - wanted).norm() < 1e-3 * wanted.norm())

    together, own = draw(PROMPTS, 7), draw(PROMPTS, [7, 8, 9])
    assert same(draw(PROMPTS, 7, batch_size=2), together)
    assert same(draw(PROMPTS[:1], 7), together[:1])
    assert same(draw(PROMPTS[::-1], [9, 8, 7]).flip(0), own)
    assert same(own[0], together[0]) and not same(own[1], together[1])


def test_zero_is_a_seed_and_none_is_fresh(model: LatentDiffusion) -> None:
    def draw(seed: int | None) -> torch.Tensor:
        return model.generate("a cat", num_inference_steps=1, seed=seed, return_only_latents=True)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert not torch.equal(draw(None), draw(None))


def test_prompt_and_negative_prompt_matter(model: LatentDiffusion) -> None:
    def draw(prompt: str, negative: str | None = None, scale: float = 3.0) -> torch.Tensor:
        return model.generate(
            prompt, negative_prompt=negative, guidance_scale=scale, num_inference_steps=2, seed=0,
            return_only_latents=True,
        )  # fmt: skip

    assert not torch.allclose(draw("a cat"), draw("a apple"), atol=1e-3)
    assert not torch.allclose(draw("a cat"), draw("a cat", "a apple"), atol=1e-3)
    torch.testing.assert_close(draw("a cat", "a cat"), draw("a cat", scale=1.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", [EDM(), Flow()])
@pytest.mark.parametrize("text_mask", ["none", "padding"])
def test_one_euler_step_is_the_guided_denoiser(objective: EDM | Flow, text_mask: str) -> None:
    dit = random_dit(text_mask)
    noise, states = torch.randn(2, CHANNELS, 8, 12), torch.randn(2, 3, TEXT_WIDTH)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    x, level = objective.start(noise), objective.levels(1)[:1].float().expand(2)

    def clean(text: torch.Tensor, text_mask_here: torch.Tensor) -> torch.Tensor:
        kept = text_mask_here if text_mask == "padding" else None
        return objective.denoise(lambda x, label: dit(x, label, text, text_mask=kept), x, level).sample

    with torch.no_grad():
        null = clean(torch.zeros(2, 3, TEXT_WIDTH), torch.tensor([[True, False, False]] * 2))
        wanted = null + 2.5 * (clean(states, mask) - null)
    features = TextFeatures(states, mask)
    found = sample_latents(dit, objective, features, noise, guidance_scale=2.5, num_inference_steps=1, sampler="euler")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    high = objective.levels(1)[0].item()
    found = sample_latents(
        dit, objective, features, noise, num_inference_steps=1, sampler="euler", guidance_interval=(0.0, high / 2)
    )
    torch.testing.assert_close(found, clean(states, mask), atol=1e-4, rtol=1e-4)


def test_a_negative_prompt_may_be_longer_or_shorter() -> None:
    dit, noise = random_dit("padding"), torch.randn(2, CHANNELS, 8, 12)
    long, short = (TextFeatures(torch.randn(2, n, TEXT_WIDTH), torch.ones(2, n, dtype=torch.bool)) for n in (5, 3))

    def sample(text: TextFeatures, negative: TextFeatures, scale: float) -> torch.Tensor:
        return sample_latents(
            dit, EDM(), text, noise, negative=negative, guidance_scale=scale, num_inference_steps=1, sampler="euler"
        )

    for text, negative in ((long, short), (short, long)):
        cond, uncond = (sample(each, each, 1.0) for each in (text, negative))
        torch.testing.assert_close(sample(text, negative, 3.0), uncond + 3 * (cond - uncond), atol=1e-4, rtol=1e-4)


class Watched(DiT):
    """Notes the shapes of its calls; like a CUDA graph, overwrites what it answered before."""

    def __init__(self, like: DiT) -> None:
        super().__init__(like.config)
        self.load_state_dict(like.state_dict())
        self.shapes, self.answers = list[tuple[int, int]](), dict[int, torch.Tensor]()

    def forward(self, x: torch.Tensor, noise_label: torch.Tensor, text: Any, **settings: Any) -> Prediction:
        self.shapes.append((len(x), text.tokens.shape[1]))
        sample = super().forward(x, noise_label, text, **settings).sample
        for answer in self.answers.values():
            answer.fill_(torch.nan)
        return Prediction(self.answers.setdefault(len(x), torch.empty_like(sample)).copy_(sample))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", [EDM(), Flow()])
@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}, {"guidance_interval": (0.3, 2.0)}])
def test_what_the_network_answered_is_not_needed_after_its_next_call(
    sampler: str, objective: EDM | Flow, settings: dict[str, Any]
) -> None:
    dit, noise = random_dit(), torch.randn(2, CHANNELS, 8, 12)
    text = TextFeatures(torch.randn(2, 3, TEXT_WIDTH), torch.ones(2, 3, dtype=torch.bool))
    settings |= {"sampler": sampler, "num_inference_steps": 4}
    found = sample_latents(Watched(dit), objective, text, noise, **settings)
    assert torch.equal(found, sample_latents(dit, objective, text, noise, **settings))


@pytest.mark.parametrize("text_mask", ["padding", "none"])
def test_a_compiled_network_sees_one_shape(parts: tuple[str, str], text_mask: str) -> None:
    """With the last batch padded, captions too; pictures are the same, and `on_step` sees those alone."""
    model, states = make(parts, text_mask=text_mask), list[int]()
    model.dit = Watched(model.dit)

    def draw(count: int = 3, **settings: Any) -> torch.Tensor:
        return model.generate(
            PROMPTS[:count], seed=3, num_inference_steps=2, batch_size=2, return_only_latents=True, **settings
        )

    def note(step: int, level: float, state: torch.Tensor) -> torch.Tensor:
        states.append(len(state))
        return state

    few = {"guidance_interval": (0.1, 1.0)}
    wanted = [draw(), draw(negative_prompt="a"), draw(1), draw(**few)]
    assert len(set(model.dit.shapes)) > 2
    asked = dict[str, Any]()
    model.dit.compile = asked.update  # type: ignore[method-assign, assignment]
    model.compile_transformer()
    assert asked == {"mode": None, "dynamic": False}  # on CUDA: graphs
    model.dit.shapes.clear()
    most = model.text_encoder.max_length
    found = [draw(on_step=note), draw(negative_prompt="a"), draw(1)]
    assert set(model.dit.shapes) == {(4, most)}
    found.append(draw(**few))
    assert set(model.dit.shapes) == {(4, most), (2, most)}
    assert states == [2, 2, 1, 1]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_captions_get_the_length_of_training(parts: tuple[str, str]) -> None:
    for length in (4, 9):
        states, mask = make(parts, text_length=length).encode_prompts(["a red apple", "a"])
        assert states.shape == (2, length, TEXT_WIDTH) and mask.sum(1).tolist() == [min(5, length), 3]
        assert not states[~mask].any()


def test_parts_are_loaded_when_used(parts: tuple[str, str]) -> None:
    def refuse() -> Autoencoder:
        raise UserError("no autoencoder here")

    model = LatentDiffusion(random_dit(), EDM(), load_vae=refuse, load_text_encoder=lambda: load_text_encoder(parts[1]))
    assert [name for name, _ in model.named_children()] == ["dit"]
    model.generate("a cat", num_inference_steps=1, return_only_latents=True)
    assert [name for name, _ in model.named_children()] == ["dit", "text_encoder"]
    assert model.tokenizer is model.text_encoder.tokenizer is model.text_encoder.tokenizer
    with pytest.raises(UserError, match="no autoencoder here"):
        model.generate("a cat", num_inference_steps=10**9)
    with pytest.raises(AttributeError, match="autoencoder"):
        _ = model.autoencoder


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "at least one prompt"),
        (None, {"tokenized_prompts": torch.zeros(0, 5, dtype=torch.long)}, "at least one prompt"),
        (["a cat"], {"attention_mask": torch.ones(1, 5, dtype=torch.long)}, "does nothing without tokenized_prompts"),
        (["a"], {"sampler": "huen"}, "no sampler 'huen'; did you mean 'heun'"),
        (["a"], {"num_inference_steps": 0}, "0 sampling steps"),
        (["a"], {"seed": [1, 2]}, "2 seeds for 1 prompts"),
        (["a"], {"negative_prompt": ["b", "c"]}, "2 negative prompts for 1 prompts"),
        (["a"], {"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings(
    model: LatentDiffusion, prompt: list[str] | None, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        model.generate(prompt, **settings)  # type: ignore[arg-type]


def test_model_folder(model: LatentDiffusion, parts: tuple[str, str], tmp_path: Path) -> None:
    card = ModelCard(
        model.dit.config, model.objective,
        autoencoder=Part(parts[0], model.vae.sha256), text_encoder=Part(parts[1], model.text_encoder.sha256),
        resolution=32, images_seen=0, recipe="test",
    )  # fmt: skip
    write_folder(tmp_path / "model", model.dit.state_dict(), card=card)
    found = LatentDiffusion.from_checkpoint(str(tmp_path / "model")).generate(PROMPTS, num_inference_steps=2, seed=1)
    assert torch.equal(found, model.generate(PROMPTS, num_inference_steps=2, seed=1))

    for kind in ("autoencoder", "text_encoder"):
        other = replace(card, **{kind: replace(getattr(card, kind), sha256="0" * 64)})
        write_folder(tmp_path / kind, model.dit.state_dict(), card=other)
        with pytest.raises(UserError, match="trained with another"):
            LatentDiffusion.from_checkpoint(str(tmp_path / kind)).generate(PROMPTS, num_inference_steps=1)


@pytest.mark.parametrize("precomputed", [True, False])
def test_training_loss(parts: tuple[str, str], precomputed: bool) -> None:
    model = make(parts)
    model.precomputed_latents, model.train_mask_ratio = precomputed, 0.5
    images = torch.rand(2, CHANNELS, 8, 12) if precomputed else torch.rand(2, 3, 32, 48) * 2 - 1
    loss = model(images, PROMPTS[:2], generator=torch.Generator().manual_seed(0))
    assert loss == model(images, PROMPTS[:2], generator=torch.Generator().manual_seed(0)) and loss > 0
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.dit.parameters())


def test_create_latent_diffusion(parts: tuple[str, str]) -> None:
    model = create_latent_diffusion(
        *parts, dit_arch="MicroDiT_Nano_4", latent_res=8, in_channels=CHANNELS, p_mean=0.0, p_std=0.6,
        train_mask_ratio=0.75, precomputed_latents=False, dtype="float32",
    )  # fmt: skip
    assert model.objective == EDM(p_mean=0.0, p_std=0.6) and model.train_mask_ratio == 0.75
    assert model.dit.config.text_mask == "padding" and model.dit.config.caption_channels == TEXT_WIDTH
    assert model.generate("a cat", num_inference_steps=1, seed=0).shape == (1, 3, 32, 32)


def test_the_papers_model_is_the_default() -> None:
    with torch.device("meta"):
        model = create_latent_diffusion(latent_res=64, in_channels=4, pos_interp_scale=2.0)
    assert sum(parameter.numel() for parameter in model.dit.parameters()) == pytest.approx(1165.4e6, rel=1e-4)
    assert model.dit.config.text_mask == "none" and model.dit.config.pos_interp_scale == 2.0


@pytest.mark.parametrize("settings", [{"dit_arch": "MicroDiT_XXL"}, {"dtype": "int8"}])
def test_unknown_choices(settings: dict[str, str]) -> None:
    with pytest.raises(UserError, match="did you mean 'MicroDiT_XL_2'|choose one of: bfloat16, float32"):
        create_latent_diffusion(**settings)  # type: ignore[arg-type]
