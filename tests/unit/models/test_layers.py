"""Each part of a block against its equation, written out."""

import math

import pytest
import torch
from torch import Tensor, nn

from micro_diffusion.models.layers import (
    CrossAttention,
    FinalLayer,
    Modulation,
    NoiseEmbedder,
    PatchEmbed,
    Refiner,
    SelfAttention,
    SwiGLU,
    TextPerceptron,
    attend,
    attention_width,
    layer_norm,
    round_up,
    swiglu_width,
)

EPS = 1e-6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def normal(x: Tensor, eps: float = EPS) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(q: Tensor, k: Tensor, v: Tensor, *, head_dim: int, mask: Tensor | None = None) -> Tensor:
    """One image and one head at a time; masked keys are taken out."""
    out = torch.zeros_like(q)
    for image in range(len(q)):
        keys = slice(None) if mask is None else mask[image]
        for head in (slice(i, i + head_dim) for i in range(0, q.shape[-1], head_dim)):
            scores = normal(q[image])[:, head] @ normal(k[image])[keys, head].T / math.sqrt(head_dim)
            out[image, :, head] = scores.softmax(-1) @ v[image][keys, head]
    return out


@pytest.mark.parametrize(("value", "multiple", "wanted"), [(1, 4, 4), (4, 4, 4), (5, 4, 8), (0, 4, 0)])
def test_round_up(value: int, multiple: int, wanted: int) -> None:
    assert round_up(value, multiple) == wanted


def test_widths_of_xl() -> None:
    assert [attention_width(1024, ratio, 64) for ratio in (0.5, 0.5 + 0.5 / 27, 1.0)] == [512, 640, 1024]
    assert [swiglu_width(1024, ratio, 256) for ratio in (0.5, 2.0, 4.0)] == [512, 1536, 2816]
    assert attention_width(100, 1.0, 64) == 100  # exactly the width at ratio 1
    assert swiglu_width(10, 0.75, 1) == 4  # int(2 * int(7.5) / 3)


@pytest.mark.parametrize("masked", [False, True])
def test_attend(masked: bool) -> None:
    q, k, v = 3 * torch.randn(2, 5, 12) + 1, 0.1 * torch.randn(2, 4, 12), torch.randn(2, 4, 12)
    mask = torch.tensor([[True, False, True, False], [True, True, True, True]]) if masked else None
    torch.testing.assert_close(
        attend(q, k, v, head_dim=4, eps=EPS, mask=mask), attention(q, k, v, head_dim=4, mask=mask)
    )


def test_tiny_queries_show_eps() -> None:
    q, k, v = 1e-3 * torch.randn(1, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    found = attend(q, k, v, head_dim=4, eps=EPS)
    torch.testing.assert_close(found, attention(q, k, v, head_dim=4))
    assert not torch.allclose(found, attend(q, k, v, head_dim=4, eps=1e-5), rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_self_attention(bias: bool) -> None:
    layer, x = SelfAttention(6, 8, 4, eps=EPS, bias=bias), torch.randn(2, 5, 6)
    q, k, v = layer.qkv(x).split(8, dim=-1)
    torch.testing.assert_close(layer(x), layer.proj(attention(q, k, v, head_dim=4)))
    assert (layer.qkv.bias is not None) == (layer.proj.bias is not None) == bias


def test_cross_attention() -> None:
    layer, x, text = CrossAttention(8, 4, eps=EPS, bias=False), torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    k, v = layer.kv_linear(text).split(8, dim=-1)
    wanted = layer.proj(attention(layer.q_linear(x), k, v, head_dim=4, mask=mask))
    torch.testing.assert_close(layer(x, text, mask), wanted)


def test_swiglu() -> None:
    layer, x = SwiGLU(6, 2.0, 4, bias=False), torch.randn(2, 5, 6)
    gate, value, output = layer.w1.weight, layer.w2.weight, layer.w3.weight
    assert gate.shape == value.shape == (8, 6) and output.shape == (6, 8)
    gated = x @ gate.T
    torch.testing.assert_close(layer(x), (gated * gated.sigmoid() * (x @ value.T)) @ output.T)


def test_layer_norm_has_weight_and_no_bias() -> None:
    layer, x = layer_norm(6, EPS), torch.randn(2, 6)
    nn.init.normal_(layer.weight)
    assert layer.bias is None
    torch.testing.assert_close(layer(x), normal(x) * layer.weight)


def test_modulation_makes_vectors_in_order() -> None:
    layer, cond = Modulation(5, 3, 2), torch.randn(2, 5)
    flat = gelu_tanh(cond) @ layer[1].weight.T + layer[1].bias
    shift, scale = layer(cond)
    torch.testing.assert_close(shift, flat[:, :3])
    torch.testing.assert_close(scale, flat[:, 3:])


def test_noise_embedder_sees_256_cosines_and_256_sines() -> None:
    layer, labels, seen = NoiseEmbedder(7), torch.tensor([-1.4, 0.0, 1.1]), []
    layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    found = layer(labels)
    waves = [
        [wave(label * 10000 ** (-k / 256)) for wave in (math.cos, math.sin) for k in range(256)]
        for label in labels.tolist()
    ]
    torch.testing.assert_close(seen[0], torch.tensor(waves), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, layer.mlp[2](gelu_tanh(layer.mlp[0](seen[0]))))


def test_text_perceptron() -> None:
    layer, x = TextPerceptron(6, 5, EPS), torch.randn(2, 3, 6)
    nn.init.normal_(layer.norm.weight)
    torch.testing.assert_close(layer(x), layer.fc2(normal(gelu_tanh(layer.fc1(x))) * layer.norm.weight))


def test_refiner() -> None:
    layer, x = Refiner(8, 4, 4, eps=EPS, bias=False), torch.randn(2, 3, 8)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    middle = x + layer.attn(normal(x), mask)
    torch.testing.assert_close(layer(x, mask), middle + layer.mlp(normal(middle)))
    assert layer.mlp.w1.weight.shape == (24, 8)  # 2/3 of 4 x 8, rounded up to a multiple of 4


def test_patch_embedding_is_linear_in_each_patch() -> None:
    layer, x = PatchEmbed(3, 2, 5), torch.randn(2, 3, 4, 6)
    weight = layer.proj.weight.flatten(1)
    for row in range(2):
        for column in range(3):
            patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
            torch.testing.assert_close(layer(x)[:, 3 * row + column], patch @ weight.T + layer.proj.bias)


def test_final_layer() -> None:
    layer, x, cond = FinalLayer(6, 4, EPS), torch.randn(2, 5, 6), torch.randn(2, 6)
    shift, scale = layer.adaLN_modulation(cond)
    torch.testing.assert_close(layer(x, cond), layer.linear(normal(x) * (1 + scale[:, None]) + shift[:, None]))
