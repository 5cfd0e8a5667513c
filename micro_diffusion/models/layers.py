"""The parts of a block: attention, feed-forward, modulation, embeddings."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from micro_diffusion.kernels.attention import attention


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def attention_width(dim: int, ratio: float, head_dim: int) -> int:
    """Inner width of a self-attention: an even number of heads, but exactly `dim` at ratio 1."""
    return dim if ratio == 1.0 else round_up(int(dim * ratio), 2 * head_dim)


def swiglu_width(dim: int, ratio: float, multiple_of: int) -> int:
    """Hidden width of a SwiGLU that costs as much as a plain feed-forward `ratio` times as wide as its input."""
    return round_up(int(2 * int(dim * ratio) / 3), multiple_of)


def layer_norm(dim: int, eps: float) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=eps, bias=False)


def between(dim_in: int, dim_out: int, eps: float) -> nn.Module:
    """Layer norm and a linear map from one width to another; nothing where they are equal."""
    if dim_in == dim_out:
        return nn.Identity()
    return nn.Sequential(layer_norm(dim_in, eps), nn.Linear(dim_in, dim_out, bias=False))


class Modulation(nn.Sequential):
    """GELU and a linear layer from the conditioning vector to `chunks` vectors of width `dim`."""

    def __init__(self, cond_dim: int, dim: int, chunks: int) -> None:
        super().__init__(nn.GELU(approximate="tanh"), nn.Linear(cond_dim, chunks * dim))
        self.chunks = chunks

    def forward(self, cond: Float[Tensor, "b c"]) -> tuple[Float[Tensor, "b d"], ...]:
        return super().forward(cond).chunk(self.chunks, dim=1)


def attend(
    q: Float[Tensor, "b t d"], k: Float[Tensor, "b l d"], v: Float[Tensor, "b l d"], *,
    head_dim: int, eps: float, mask: Bool[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b t d"]:  # fmt: skip
    """Softmax attention with queries and keys layer-normalised over all heads together.

    `mask` is true where a key may be attended to.
    """
    q, k = (F.layer_norm(x, x.shape[-1:], eps=eps).to(v.dtype) for x in (q, k))
    return attention(q, k, v, head_dim=head_dim, mask=mask)


class SelfAttention(nn.Module):
    """Self-attention of any inner width that holds whole heads."""

    def __init__(self, dim: int, width: int, head_dim: int, *, eps: float, bias: bool) -> None:
        super().__init__()
        self.head_dim, self.eps = head_dim, eps
        self.qkv = nn.Linear(dim, 3 * width, bias=bias)
        self.proj = nn.Linear(width, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b t d"]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(q, k, v, head_dim=self.head_dim, eps=self.eps, mask=mask))


class CrossAttention(nn.Module):
    """Attention from patches to text, as wide as the patches."""

    def __init__(self, dim: int, head_dim: int, *, eps: float, bias: bool) -> None:
        super().__init__()
        self.head_dim, self.eps = head_dim, eps
        self.q_linear = nn.Linear(dim, dim, bias=bias)
        self.kv_linear = nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(
        self, x: Float[Tensor, "b t d"], text: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None,
        keys: Float[Tensor, "b l e"] | None = None,
    ) -> Float[Tensor, "b t d"]:  # fmt: skip
        """`keys` are keys and values, `kv_linear(text)`, if they are known already."""
        k, v = (self.kv_linear(text) if keys is None else keys).chunk(2, dim=-1)
        return self.proj(attend(self.q_linear(x), k, v, head_dim=self.head_dim, eps=self.eps, mask=mask))


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv 2002.05202): w1 makes the gate, w2 the value, w3 the output."""

    def __init__(self, dim: int, ratio: float, multiple_of: int, *, bias: bool) -> None:
        super().__init__()
        hidden = swiglu_width(dim, ratio, multiple_of)
        self.w1 = nn.Linear(dim, hidden, bias=bias)
        self.w2 = nn.Linear(dim, hidden, bias=bias)
        self.w3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class TextPerceptron(nn.Module):
    """Linear, GELU, layer norm, linear."""

    def __init__(self, in_dim: int, dim: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, dim)
        self.norm = layer_norm(dim, eps)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        return self.fc2(self.norm(F.gelu(self.fc1(x), approximate="tanh")))


class Refiner(nn.Module):
    """One pre-norm self-attention and feed-forward block over the caption."""

    def __init__(self, dim: int, head_dim: int, multiple_of: int, *, eps: float, bias: bool) -> None:
        super().__init__()
        self.norm1 = layer_norm(dim, eps)
        self.attn = SelfAttention(dim, dim, head_dim, eps=eps, bias=bias)
        self.norm2 = layer_norm(dim, eps)
        self.mlp = SwiGLU(dim, 4.0, multiple_of, bias=bias)

    def forward(self, x: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None) -> Float[Tensor, "b l d"]:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class NoiseEmbedder(nn.Module):
    """Sinusoids of the noise label, then a two-layer perceptron."""

    WIDTH = 512

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.WIDTH, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))

    def forward(self, label: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        half = self.WIDTH // 2
        steps = torch.arange(half, dtype=torch.float32, device=label.device)
        angles = label.float()[:, None] * torch.exp(steps * (-math.log(10000.0) / half))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each through the same linear map."""

    def __init__(self, channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        return self.proj(x).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    """Modulated layer norm and the linear map to pixels of a patch, ordered row, column, channel."""

    def __init__(self, dim: int, out_dim: int, eps: float) -> None:
        super().__init__()
        self.norm_final = layer_norm(dim, eps)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = Modulation(dim, dim, 2)

    def forward(self, x: Float[Tensor, "b t d"], cond: Float[Tensor, "b d"]) -> Float[Tensor, "b t p"]:
        shift, scale = self.adaLN_modulation(cond)
        return self.linear(self.norm_final(x) * (1 + scale[:, None]) + shift[:, None])
