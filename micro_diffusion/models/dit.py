"""MicroDiT (arXiv 2407.15811): a diffusion transformer with patch mixer, deferred masking and expert-choice layers."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from micro_diffusion.diffusion.objectives import Network, Prediction
from micro_diffusion.kernels.add_norm import add_norm
from micro_diffusion.models import initialise, layers
from micro_diffusion.models.masking import gather_patches, random_patch_mask, scatter_patches
from micro_diffusion.models.moe import ExpertChoiceMoE
from micro_diffusion.models.pos_embed import sincos_2d
from micro_diffusion.runtime.device import autocast


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a model. Sizes are in latent units; the multipliers hold one number a backbone block."""

    input_size: int | tuple[int, int]
    patch_size: int
    in_channels: int
    dim: int
    depth: int
    head_dim: int
    multiple_of: int
    caption_channels: int
    qkv_multipliers: tuple[float, ...]
    ffn_multipliers: tuple[float, ...]
    pos_interp_scale: float = 1.0
    norm_eps: float = 1e-6
    depth_init: bool = True
    use_patch_mixer: bool = True
    patch_mixer_depth: int = 4
    patch_mixer_dim: int = 512
    patch_mixer_qkv_ratio: float = 1.0
    patch_mixer_mlp_ratio: float = 4.0
    use_bias: bool = False
    num_experts: int = 8
    expert_capacity: float = 2.0
    experts_every_n: int = 2
    text_mask: Literal["none", "padding"] = "none"
    float32_residual: bool = False  # under bf16 autocast too; else as the map before the blocks gives it: bf16

    def __post_init__(self) -> None:
        for field in ("qkv_multipliers", "ffn_multipliers"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
            if len(getattr(self, field)) != self.depth:
                raise ValueError(f"{field} has {len(getattr(self, field))} numbers for {self.depth} blocks")
        if any(side % self.patch_size for side in self.latent_size):
            raise ValueError(f"latents of {self.latent_size} do not divide into patches of {self.patch_size}")
        if self.dim % self.head_dim or (self.use_patch_mixer and self.patch_mixer_dim % self.head_dim):
            raise ValueError(f"widths must be multiples of head_dim {self.head_dim}")

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.input_size if isinstance(self.input_size, tuple) else (self.input_size, self.input_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.latent_size
        return height // self.patch_size, width // self.patch_size

    def is_expert(self, index: int) -> bool:
        """Whether the feed-forward of block `index` (of backbone or mixer) is made of experts."""
        return self.num_experts > 0 and self.experts_every_n > 0 and (index + 1) % self.experts_every_n == 0


class EncodedText(NamedTuple):
    """All that depends on the caption alone: computed once per picture when sampling."""

    tokens: Float[Tensor, "b l d"]
    mixer_tokens: Float[Tensor, "b l m"]
    pooled: Float[Tensor, "b d"]
    mask: Bool[Tensor, "b l"] | None
    keys: tuple[Float[Tensor, "b l e"], ...] = ()  # and values, of each block, the mixer's first; or blocks make them


class Stream(NamedTuple):
    """The residual stream between two blocks; the last layer's output is added by the norm that comes next."""

    x: Float[Tensor, "b t d"]
    branch: Float[Tensor, "b t d"] | None = None
    gate: Float[Tensor, "b d"] | None = None

    def settled(self) -> Float[Tensor, "b t d"]:
        """x + gate * branch."""
        return self.x if self.branch is None or self.gate is None else self.x + self.gate[:, None] * self.branch


class Block(nn.Module):
    """Self-attention, cross-attention to text, feed-forward; the first and the last modulated and gated."""

    def __init__(self, c: DiTConfig, dim: int, *, qkv_ratio: float, ffn_ratio: float, experts: bool) -> None:
        super().__init__()
        width = layers.attention_width(dim, qkv_ratio, c.head_dim)
        self.norm1 = layers.layer_norm(dim, c.norm_eps)
        self.attn = layers.SelfAttention(dim, width, c.head_dim, eps=c.norm_eps, bias=c.use_bias)
        self.cross_attn = layers.CrossAttention(dim, c.head_dim, eps=c.norm_eps, bias=c.use_bias)
        self.norm2 = layers.layer_norm(dim, c.norm_eps)
        self.norm3 = layers.layer_norm(dim, c.norm_eps)
        if experts:
            self.mlp: nn.Module = ExpertChoiceMoE(dim, ffn_ratio, c.multiple_of, c.num_experts, c.expert_capacity)
        else:
            self.mlp = layers.SwiGLU(dim, ffn_ratio, c.multiple_of, bias=c.use_bias)
        self.adaLN_modulation = layers.Modulation(c.dim, dim, 6)

    def forward(
        self, stream: Stream, text: Float[Tensor, "b l d"], cond: Float[Tensor, "b c"],
        mask: Bool[Tensor, "b l"] | None, keys: Float[Tensor, "b l e"] | None = None,
    ) -> Stream:  # fmt: skip
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond)
        x, normed = add_norm(*stream, self.norm1.weight, shift1, scale1, eps=self.norm1.eps)
        x, normed = add_norm(x, self.attn(normed), gate1, self.norm2.weight, eps=self.norm2.eps)
        attended = self.cross_attn(normed, text, mask, keys)
        x, normed = add_norm(x, attended, None, self.norm3.weight, shift2, scale2, eps=self.norm3.eps)
        return Stream(x, self.mlp(normed), gate2)


class DiT(nn.Module):
    """The transformer. Attribute names are those of the released checkpoints."""

    pos_embed: Float[Tensor, "1 t d"]
    mask_token: Float[Tensor, "1 1 p"]

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = c = config
        patch_dim = c.patch_size**2 * c.in_channels
        self.x_embedder = layers.PatchEmbed(c.in_channels, c.patch_size, c.dim)
        self.t_embedder = layers.NoiseEmbedder(c.dim)
        perceptron = layers.TextPerceptron(c.caption_channels, c.dim, c.norm_eps)
        self.y_embedder = nn.Sequential(OrderedDict(y_proj=perceptron))
        self.y_emb_preprocess = layers.Refiner(c.dim, c.head_dim, c.multiple_of, eps=c.norm_eps, bias=c.use_bias)
        self.pooled_y_emb_process = layers.TextPerceptron(c.dim, c.dim, c.norm_eps)
        mixer_dim = c.patch_mixer_dim if c.use_patch_mixer else c.dim
        qkv, ffn = c.patch_mixer_qkv_ratio, c.patch_mixer_mlp_ratio
        self.patch_mixer = nn.ModuleList(
            Block(c, mixer_dim, qkv_ratio=qkv, ffn_ratio=ffn, experts=c.is_expert(i))
            for i in range(c.patch_mixer_depth if c.use_patch_mixer else 0)
        )
        self.patch_mixer_map_xin = layers.between(c.dim, mixer_dim, c.norm_eps)
        self.patch_mixer_map_xout = layers.between(mixer_dim, c.dim, c.norm_eps)
        self.patch_mixer_map_y = layers.between(c.dim, mixer_dim, c.norm_eps)
        self.blocks = nn.ModuleList(
            Block(c, c.dim, qkv_ratio=qkv, ffn_ratio=ffn, experts=c.is_expert(i) and i != c.depth - 1)
            for i, (qkv, ffn) in enumerate(zip(c.qkv_multipliers, c.ffn_multipliers, strict=True))
        )
        self.final_layer = layers.FinalLayer(c.dim, patch_dim, c.norm_eps)
        self.register_buffer("pos_embed", sincos_2d(c.dim, *c.grid, scale=c.pos_interp_scale)[None])
        self.register_buffer("mask_token", torch.zeros(1, 1, patch_dim))
        initialise.initialise(self)

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return self.config.grid[0] * self.config.grid[1]

    def encode_text(
        self, text: Float[Tensor, "*b l c"], text_mask: Bool[Tensor, "b l"] | None = None, *, keys: bool = False
    ) -> EncodedText:
        """Refine and pool the caption, which may carry a singleton second axis, (b, 1, l, c); with `keys` if asked."""
        mask = text_mask if self.config.text_mask == "padding" else None
        tokens = self.y_emb_preprocess(self.y_embedder(text.flatten(0, -3)), mask)
        mean = tokens.mean(1) if mask is None else (tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        encoded = EncodedText(tokens, self.patch_mixer_map_y(tokens), self.pooled_y_emb_process(mean), mask)
        seen = ((self.patch_mixer, encoded.mixer_tokens), (self.blocks, tokens)) if keys else ()
        kvs = ((block.get_submodule("cross_attn.kv_linear"), text) for blocks, text in seen for block in blocks)
        return encoded._replace(keys=tuple(kv(text) for kv, text in kvs))

    def forward(
        self, x: Float[Tensor, "b c h w"], noise_label: Float[Tensor, " b"],
        text: Float[Tensor, "*b l d"] | EncodedText, *, text_mask: Bool[Tensor, "b l"] | None = None,
        mask_ratio: float = 0.0, mask_noise: Float[Tensor, "b t"] | None = None,
    ) -> Prediction:  # fmt: skip
        """Predict the raw network output F(x).

        `mask_noise` ranks the patches unless `mask_ratio` is 0 (fresh uniform noise if None); dropped patches come back
        as zeros. With `text_mask="none"` in the configuration every text position counts and `text_mask` is not used.
        """
        encoded = text if isinstance(text, EncodedText) else self.encode_text(text, text_mask)
        cond = self.t_embedder(noise_label) + encoded.pooled

        keys = iter(encoded.keys)
        stream = self.stream(self.patch_mixer_map_xin(self.x_embedder(x) + self.pos_embed))
        for block in self.patch_mixer:
            stream = block(stream, encoded.mixer_tokens, cond, encoded.mask, next(keys, None))
        patches = stream.settled()

        mask = None
        if mask_ratio != 0:
            noise = torch.rand(patches.shape[:2], device=x.device) if mask_noise is None else mask_noise
            mask = random_patch_mask(noise, mask_ratio)
            patches = gather_patches(patches, mask.kept)

        stream = self.stream(self.patch_mixer_map_xout(patches))
        for block in self.blocks:
            stream = block(stream, encoded.tokens, cond, encoded.mask, next(keys, None))
        pixels = self.final_layer(stream.settled(), cond)

        if mask is not None:
            pixels = scatter_patches(pixels, mask.kept, self.mask_token, self.num_patches)
        return Prediction(self.unpatchify(pixels), mask and mask.dropped)

    def stream(self, x: Float[Tensor, "b t d"]) -> Stream:
        """The residual stream begins."""
        return Stream(x.float() if self.config.float32_residual else x)

    def unpatchify(self, pixels: Float[Tensor, "b t p"]) -> Float[Tensor, "b c h w"]:
        """Put patches, each ordered row, column, channel, together to latents."""
        size = self.config.patch_size
        grid = pixels.unflatten(1, self.config.grid).unflatten(3, (size, size, -1))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def resized(dit: DiT, input_size: int | tuple[int, int], pos_interp_scale: float) -> DiT:
    """The same weights for latents of another size, with positions made anew."""
    other = DiT(replace(dit.config, input_size=input_size, pos_interp_scale=pos_interp_scale))
    other.load_state_dict({**dit.state_dict(), "pos_embed": other.pos_embed})
    return other.to(dit.pos_embed.device)


def rebuilt(dit: DiT, tensors: Mapping[str, Tensor]) -> DiT:
    """A plain model of the same shape that holds the given tensors themselves, whole or sharded."""
    with torch.device("meta"):
        other = DiT(dit.config)
    other.load_state_dict(tensors, assign=True)
    return other


def conditioned(
    dit: DiT, text: Float[Tensor, "b l d"] | EncodedText, text_mask: Bool[Tensor, "b l"] | None = None, *,
    precision: str, mask_ratio: float = 0.0, mask_noise: Float[Tensor, "b t"] | None = None,
) -> Network:  # fmt: skip
    """The network as an objective calls it, with caption, mask and precision fixed."""

    def network(x: Float[Tensor, "b c h w"], noise_label: Float[Tensor, " b"]) -> Prediction:
        x, noise_label = x.float(), noise_label.float()  # samplers keep their state in float64
        with autocast(x.device, precision):
            return dit(x, noise_label, text, text_mask=text_mask, mask_ratio=mask_ratio, mask_noise=mask_noise)

    return network
