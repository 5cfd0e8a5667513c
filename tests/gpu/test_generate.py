"""Drawing in bf16 on a GPU: as exact as plain autocast, the same from one run to the next, compiled or not."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from micro_diffusion.diffusion.objectives import EDM, Prediction
from micro_diffusion.models.autoencoders import Autoencoder
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.model import LatentDiffusion, sample_latents, text_network
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.models.text_encoders import TextEncoder, TextFeatures

STEPS = 10


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32 in what bf16 is compared with."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def dit() -> DiT:
    return make()


def make(text_mask: Any = "none") -> DiT:
    torch.manual_seed(0)
    made = DiT(PRESETS["MicroDiT_Small_2"](input_size=32, text_mask=text_mask))
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return made.cuda().eval()


@pytest.fixture
def text() -> TextFeatures:
    return TextFeatures(torch.randn(4, 77, 384).cuda(), torch.ones(4, 77, dtype=torch.bool).cuda())


class PlainAutocast(nn.Module):
    """Autocast around whole calls, text and all, and nothing else done for bf16."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit, self.config, self.x_embedder = dit, dit.config, dit.x_embedder

    def encode_text(self, states: Tensor, mask: Tensor, *, keys: bool) -> Tensor:
        return states

    def forward(self, x: Tensor, label: Tensor, states: Tensor, **unmasked: object) -> Prediction:
        with torch.autocast("cuda", torch.bfloat16):
            return self.dit(x, label, states)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_bf16_is_as_near_to_float32_as_plain_autocast(dit: DiT, text: TextFeatures, compiled: bool) -> None:
    noise = torch.randn(4, 4, 32, 32).cuda()

    def sample(model: nn.Module, precision: str) -> Tensor:
        return sample_latents(model, EDM(), text, noise, num_inference_steps=STEPS, precision=precision)  # type: ignore[arg-type]

    def call(model: nn.Module, precision: str) -> Tensor:
        return text_network(model, text, precision=precision)(noise, torch.zeros(4).cuda()).sample  # type: ignore[arg-type]

    exact, exact_call = sample(dit, "float32"), call(dit, "float32")
    plain = error(sample(PlainAutocast(dit), "float32"), exact)
    plain_call = error(call(PlainAutocast(dit), "float32"), exact_call)
    if compiled:
        dit.compile()
    assert error(sample(dit, "bf16"), exact) <= 1.25 * plain
    assert 1e-4 < error(call(dit, "bf16"), exact_call) <= 1.25 * plain_call


class Words(nn.Module):
    """In place of a text encoder: states drawn from each word, padded to the longest caption."""

    width, max_length = 384, 9

    def encode(self, captions: Sequence[str], attention_mask: None = None) -> TextFeatures:
        length = max(len(caption.split()) for caption in captions)
        states, mask = torch.zeros(len(captions), length, self.width), torch.zeros(len(captions), length).bool()
        for i, caption in enumerate(captions):
            for j, word in enumerate(caption.split()):
                states[i, j] = torch.randn(self.width, generator=torch.Generator().manual_seed(ord(word[0])))
                mask[i, j] = True
        return TextFeatures(states.cuda(), mask.cuda())


def nothing() -> Autoencoder:
    raise AssertionError("nothing is decoded here")


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch captures an empty one to have its memory
@pytest.mark.parametrize("text_mask", ["none", "padding"])
def test_cuda_graphs_draw_what_is_drawn_without_them(text_mask: str) -> None:
    """In two calls with other prompts, a last batch that is not full, and guidance in some steps only."""
    encoder = cast(TextEncoder, Words())
    model = LatentDiffusion(make(text_mask), EDM(), load_vae=nothing, load_text_encoder=lambda: encoder)

    def draw() -> list[Tensor]:
        settings: dict[str, Any] = {"num_inference_steps": STEPS, "batch_size": 2, "return_only_latents": True}
        first = model.generate(["a cat", "two red dogs", "sky"], seed=1, **settings)
        later = model.generate(["old tree by night", "x", "yes"], seed=2, **settings)
        last = model.generate("a cat", seed=3, sampler="dpmpp_2m", guidance_interval=(0.3, 5.0), **settings)
        return [first, later, last]

    model.precision = "float32"
    exact = draw()
    model.precision = "bf16"
    eager = draw()
    model.compile_transformer()
    graphs = draw()
    assert error(torch.cat(graphs), torch.cat(exact)) <= 1.25 * error(torch.cat(eager), torch.cat(exact))
    assert max(map(error, graphs, eager)) < 0.3  # an overwritten output, or another call's text, would be far off
    assert all(torch.equal(one, again) for one, again in zip(graphs, draw(), strict=True))


def test_the_same_noise_gives_the_same_latents(dit: DiT, text: TextFeatures) -> None:
    noise = torch.randn(4, 4, 32, 32).cuda()
    together, again = (sample_latents(dit, EDM(), text, noise, num_inference_steps=3) for _ in range(2))
    assert torch.equal(together, again)
    alone = sample_latents(dit, EDM(), TextFeatures(*(each[:1] for each in text)), noise[:1], num_inference_steps=3)
    assert error(alone, together[:1]) < 0.1
