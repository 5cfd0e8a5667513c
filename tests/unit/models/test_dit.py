"""The whole transformer: what may depend on what, and the ways in which it must equal itself."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.one_hot import OneHotMoE, use_one_hot_experts
from micro_diffusion.models.dit import DiT, resized
from micro_diffusion.models.layers import CrossAttention
from micro_diffusion.models.masking import null_caption
from micro_diffusion.models.moe import ExpertChoiceMoE
from micro_diffusion.models.pos_embed import sincos_2d
from micro_diffusion.models.presets import PRESETS

CHANNELS, WIDTH, LENGTH = 3, 10, 5
CONFIG = replace(
    PRESETS["MicroDiT_Nano_4"](input_size=(8, 12), in_channels=CHANNELS, caption_channels=WIDTH, text_mask="padding"),
    patch_size=2, dim=32, head_dim=8, multiple_of=8, patch_mixer_dim=24, patch_mixer_depth=2,
)  # fmt: skip
MASK = torch.tensor([[True] * 2 + [False] * 3, [True] * 5, [True] * 4 + [False]])


def make(**changes: Any) -> DiT:
    """With random weights where a new model has zeros, so that every input matters."""
    torch.manual_seed(0)
    dit = DiT(replace(CONFIG, **changes))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return dit


def inputs(dit: DiT, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise labels and text."""
    torch.manual_seed(1)
    return torch.randn(batch, CHANNELS, *dit.config.latent_size), torch.randn(batch), torch.randn(batch, LENGTH, WIDTH)


def patchify(latents: Tensor, size: int) -> Tensor:
    """Patches row by row, each ordered row, column, channel."""
    rows, columns = latents.shape[2] // size, latents.shape[3] // size
    patches = [
        latents[:, :, size * row : size * (row + 1), size * column : size * (column + 1)].permute(0, 2, 3, 1).flatten(1)
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.stack(patches, dim=1)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "qkv_multipliers has 4 numbers for 3 blocks"),
        ({"ffn_multipliers": (1.0,)}, "ffn_multipliers has 1 numbers for 4 blocks"),
        ({"input_size": (8, 11)}, "do not divide into patches of 2"),
        ({"dim": 36}, "multiples of head_dim 8"),
        ({"patch_mixer_dim": 20}, "multiples of head_dim 8"),
    ],
)
def test_impossible_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_configuration() -> None:
    assert CONFIG.latent_size == (8, 12) and CONFIG.grid == (4, 6)
    assert replace(CONFIG, input_size=8).latent_size == (8, 8)
    assert hash(CONFIG) == hash(replace(CONFIG))


@pytest.mark.parametrize(
    ("changes", "backbone", "mixer"),
    [
        ({"depth": 7}, [1, 3, 5], [1]),
        ({"depth": 6, "patch_mixer_depth": 6}, [1, 3], [1, 3, 5]),  # never the backbone's last
        ({"depth": 6, "experts_every_n": 1}, [0, 1, 2, 3, 4], [0, 1]),
        ({"depth": 6, "num_experts": 0}, [], []),
        ({"depth": 6, "experts_every_n": 0}, [], []),
    ],
)
def test_which_blocks_hold_experts(changes: dict[str, Any], backbone: list[int], mixer: list[int]) -> None:
    ones = (1.0,) * changes["depth"]
    with torch.device("meta"):
        dit = DiT(replace(CONFIG, **changes, qkv_multipliers=ones, ffn_multipliers=ones))
    for blocks, wanted in ((dit.blocks, backbone), (dit.patch_mixer, mixer)):
        assert [i for i, block in enumerate(blocks) if isinstance(block.mlp, ExpertChoiceMoE)] == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("mask_ratio", [0.0, 0.4])
@pytest.mark.parametrize("input_size", [8, (10, 6)])
def test_output_and_gradients_are_those_with_one_hot_experts(mask_ratio: float, input_size: Any) -> None:
    dit = make(input_size=input_size)
    twin = use_one_hot_experts(copy.deepcopy(dit))
    assert (
        sum(isinstance(m, OneHotMoE) for m in twin.modules()) == 2
        and twin.state_dict().keys() == dit.state_dict().keys()
    )
    x, label, text = inputs(dit)
    noise = torch.rand(3, dit.num_patches)
    samples = [
        model(x, label, text, text_mask=MASK, mask_ratio=mask_ratio, mask_noise=noise).sample for model in (dit, twin)
    ]
    assert_close(*samples)
    for sample in samples:
        sample.square().mean().backward()
    for (name, ours), theirs in zip(dit.named_parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm(), name


@pytest.mark.parametrize("changes", [{}, {"in_channels": 1}, {"patch_size": 4, "input_size": (4, 16)}])
def test_unpatchify_is_the_inverse_of_patching(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        dit = DiT(replace(CONFIG, **changes))
    latents = torch.randn(2, dit.config.in_channels, *dit.config.latent_size)
    assert torch.equal(dit.unpatchify(patchify(latents, dit.config.patch_size)), latents)


def test_the_shape_of_the_latents_is_only_a_matter_of_positions() -> None:
    """The same 24 patches in the same order, with the same positions, in a wide and in a tall picture."""
    wide, tall = make(input_size=(4, 24)), make(input_size=(12, 8))
    x, label, text = inputs(wide)
    with torch.no_grad():
        assert not torch.equal(wide.pos_embed, tall.pos_embed)
        tall.pos_embed.copy_(wide.pos_embed)
        found = tall(tall.unpatchify(patchify(x, 2)), label, text, text_mask=MASK).sample
        assert_close(patchify(found, 2), patchify(wide(x, label, text, text_mask=MASK).sample, 2))


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.75, 6), (0.5, 12), (0.3, 16), (0.02, 23)])
def test_dropped_patches_are_zero(mask_ratio: float, kept: int) -> None:
    dit = make()
    x, label, text = inputs(dit)
    noise = torch.rand(3, 24)
    sample, dropped = dit(x, label, text, mask_ratio=mask_ratio, mask_noise=noise)
    assert dropped is not None and ((~dropped).sum(1) == kept).all()
    patches = patchify(sample, 2)
    assert not patches[dropped].any() and patches[~dropped].abs().sum(1).min() > 0
    assert noise[~dropped].reshape(3, -1).amax(1).lt(noise[dropped].reshape(3, -1).amin(1)).all()


def test_mask_is_drawn_when_not_given() -> None:
    dit = make()
    given = inputs(dit)
    masks = {tuple(dit(*given, mask_ratio=0.5).dropped.flatten().tolist()) for _ in range(3)}
    assert len(masks) == 3


def test_without_mixer_kept_patches_are_all_there_is() -> None:
    """Masked, a picture equals another one made of its kept patches alone, with their positions."""
    dit, small = make(use_patch_mixer=False), make(use_patch_mixer=False, input_size=(2, 24))
    x, label, text = inputs(dit)
    sample, dropped = dit(x, label, text, text_mask=MASK, mask_ratio=0.5, mask_noise=torch.rand(3, 24))
    for i in range(3):
        kept = ~dropped[i]
        small.pos_embed = dit.pos_embed[:, kept]
        alone = small.unpatchify(patchify(x[i : i + 1], 2)[:, kept])
        wanted = small(alone, label[i : i + 1], text[i : i + 1], text_mask=MASK[i : i + 1]).sample
        assert_close(patchify(sample[i : i + 1], 2)[:, kept], patchify(wanted, 2))


@pytest.mark.parametrize("mixer", [True, False])
def test_dropped_patches_speak_through_the_mixer(mixer: bool) -> None:
    dit = make(use_patch_mixer=mixer)
    x, label, text = inputs(dit)
    x.requires_grad_()
    sample, dropped = dit(x, label, text, mask_ratio=0.5, mask_noise=torch.rand(3, 24))
    sample.square().sum().backward()
    assert x.grad is not None and bool(patchify(x.grad, 2)[dropped].any()) == mixer


def test_without_mixer_and_with_an_equally_wide_one() -> None:
    off, equal, usual = make(use_patch_mixer=False), make(patch_mixer_dim=32), make()
    assert not any("patch_mixer" in name for name in off.state_dict())
    assert not any("patch_mixer_map" in name for name in equal.state_dict())
    assert sum("patch_mixer_map" in name for name in usual.state_dict()) == 6
    for dit in (off, equal):
        encoded = dit.encode_text(inputs(dit)[2])
        assert torch.equal(encoded.tokens, encoded.mixer_tokens)


@pytest.mark.parametrize("text_mask", ["padding", "none"])
def test_pictures_do_not_depend_on_their_neighbours(text_mask: str) -> None:
    """With its caption unpadded, too, where padding is masked."""
    dit = make(text_mask=text_mask)
    x, label, text = inputs(dit)
    noise = torch.rand(3, 24)
    together = dit(x, label, text, text_mask=MASK, mask_ratio=0.5, mask_noise=noise)
    for i in range(3):
        words = int(MASK[i].sum()) if text_mask == "padding" else LENGTH
        one = slice(i, i + 1)
        alone = dit(x[one], label[one], text[one, :words], mask_ratio=0.5, mask_noise=noise[one])
        assert_close(alone.sample, together.sample[one])
        assert torch.equal(alone.dropped, together.dropped[one])


def test_what_stands_in_the_padding_does_not_matter() -> None:
    dit = make()
    x, label, text = inputs(dit)
    other = torch.where(MASK[:, :, None], text, 100 * torch.randn_like(text))
    assert_close(dit(x, label, other, text_mask=MASK).sample, dit(x, label, text, text_mask=MASK).sample)
    assert not torch.allclose(dit(x, label, other).sample, dit(x, label, text).sample, atol=1e-2)


def test_the_papers_way_uses_every_position() -> None:
    dit = make(text_mask="none")
    x, label, text = inputs(dit)
    assert torch.equal(dit(x, label, text, text_mask=MASK).sample, dit(x, label, text).sample)
    assert dit.encode_text(text, MASK).mask is None


@pytest.mark.parametrize("length", [1, 4])
def test_null_captions_of_any_length_are_the_same(length: int) -> None:
    dit = make()
    x, label, text = inputs(dit)
    dropped = torch.ones(3, dtype=torch.bool)
    states, mask = null_caption(text[:, :length], MASK[:, :length], dropped)
    wanted = dit(x, label, torch.zeros(3, 1, WIDTH)).sample
    assert_close(dit(x, label, states, text_mask=mask).sample, wanted)
    assert not torch.allclose(dit(x, label, text, text_mask=MASK).sample, wanted, atol=1e-2)


def test_text_may_be_encoded_before_and_carry_an_axis() -> None:
    dit = make()
    x, label, text = inputs(dit)
    wanted = dit(x, label, text, text_mask=MASK).sample
    assert torch.equal(dit(x, label, dit.encode_text(text, MASK)).sample, wanted)
    assert torch.equal(dit(x, label, text[:, None], text_mask=MASK).sample, wanted)


@pytest.mark.parametrize("text_mask", ["padding", "none"])
@pytest.mark.parametrize("mixer", [True, False])
def test_keys_and_values_of_the_text_may_be_known(text_mask: str, mixer: bool) -> None:
    dit = make(text_mask=text_mask, use_patch_mixer=mixer)
    x, label, text = inputs(dit)
    wanted, known = dit(x, label, text, text_mask=MASK).sample, dit.encode_text(text, MASK, keys=True)
    assert len(known.keys) == len(dit.patch_mixer) + len(dit.blocks) and not dit.encode_text(text, MASK).keys
    for module in dit.modules():
        if isinstance(module, CrossAttention):
            torch.nn.init.zeros_(module.kv_linear.weight)  # not needed again
    assert torch.equal(dit(x, label, known).sample, wanted)
    assert not torch.equal(dit(x, label, known._replace(keys=())).sample, wanted)


def test_pooled_text_is_the_mean_of_the_words() -> None:
    dit = make()
    text = inputs(dit)[2]
    encoded = dit.encode_text(text, MASK)
    means = torch.stack([encoded.tokens[i, MASK[i]].mean(0) for i in range(3)])
    assert_close(encoded.pooled, dit.pooled_y_emb_process(means))


def test_too_few_patches_are_an_error() -> None:
    dit = make(num_experts=8)
    with pytest.raises(ValueError, match="8 experts with capacity factor 2.0 take no token of 3"):
        dit(*inputs(dit), mask_ratio=0.85)
    for mask_ratio, kept in ((0.99, 0), (-0.5, 36)):
        with pytest.raises(ValueError, match=f"keeps {kept} of 24 patches"):
            dit(*inputs(dit), mask_ratio=mask_ratio)


def test_resized() -> None:
    dit = make()
    large = resized(dit, (16, 24), 2.0)
    assert large.config == replace(dit.config, input_size=(16, 24), pos_interp_scale=2.0)
    assert torch.equal(large.pos_embed[0], sincos_2d(32, 8, 12, scale=2.0))
    theirs = large.state_dict()
    assert dit.state_dict().keys() == theirs.keys()
    for name, tensor in dit.state_dict().items():
        assert name == "pos_embed" or torch.equal(theirs[name], tensor), name
        assert theirs[name].data_ptr() != tensor.data_ptr(), name
    assert large(*inputs(large)).sample.shape == (3, CHANNELS, 16, 24)
    back = resized(large, (8, 12), 1.0)
    assert torch.equal(back(*inputs(dit)).sample, dit(*inputs(dit)).sample)


@pytest.mark.parametrize(("kept", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_residual_stream_under_autocast(kept: bool, dtype: torch.dtype) -> None:
    dit, seen = make(float32_residual=kept), set[torch.dtype]()
    for block in (*dit.patch_mixer, *dit.blocks):
        block.register_forward_hook(lambda _, __, stream: seen.add(stream.x.dtype))
    x, label, text = inputs(dit)
    with torch.autocast("cpu", torch.bfloat16):
        dit(x, label, text)
    assert seen == {dtype}


def test_residual_stream_in_float32_changes_nothing_in_float32() -> None:
    one, other = make(), make(float32_residual=True)
    x, label, text = inputs(one)
    assert torch.equal(one(x, label, text).sample, other(x, label, text).sample)
