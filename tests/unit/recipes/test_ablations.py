"""Each ablation against the baseline: what it changes, and nothing else."""

import inspect
from fnmatch import fnmatch

import pytest

from micro_diffusion.models.flops import forward_flops, parameters
from micro_diffusion.recipes.ablations import ABLATIONS
from micro_diffusion.training.config import Recipe, flat

# what differs from the baseline, as patterns of dotted paths, each of which must differ
CHANGES = {
    "no-mixer": ["model.use_patch_mixer"],
    "mask-0": ["stages.0.mask_ratio"],
    "mask-50": ["stages.0.mask_ratio"],
    "mask-87": ["stages.0.mask_ratio"],
    "no-unmasked": ["stages.1.mask_ratio"],
    "no-experts": ["model.num_experts"],
    "constant-widths": ["model.qkv_multipliers.*", "model.ffn_multipliers.*"],
    "smaller": [
        "stages.0.mask_ratio", "model.dim", "model.depth", "model.patch_mixer_dim",
        "model.qkv_multipliers.*", "model.ffn_multipliers.*",
    ],
    "less-noise": ["stages.0.p_mean", "stages.1.p_mean"],
    "muon": ["optimizer"],
    "less-decay": ["weight_decay"],
    "averages": ["stages.1.ema_halflife_images", "stages.1.ema_sigma_rel*"],
    "candidate": [
        "optimizer", "model.use_patch_mixer", "stages.?.images", "stages.0.mask_ratio",
        "stages.1.ema_halflife_images", "stages.1.ema_sigma_rel*",
    ],
}  # fmt: skip
BASELINE = ABLATIONS["baseline"]()


def cost(recipe: Recipe, stage: int) -> int:
    """FLOPs of a forward pass of one image."""
    model = recipe.stage_model(recipe.stages[stage], downscale=8)
    return forward_flops(model, mask_ratio=recipe.stages[stage].mask_ratio, text_length=recipe.text_length)


def test_all_the_papers_comparisons_are_there() -> None:
    assert ABLATIONS.keys() == {"baseline", *CHANGES}
    ratios = {name: ABLATIONS[name]().stages[0].mask_ratio for name in ("mask-0", "mask-50", "baseline", "mask-87")}
    assert list(ratios.values()) == [0, 0.5, 0.75, 0.875]


@pytest.mark.parametrize("name", CHANGES)
def test_differs_from_the_baseline_in_what_it_says(name: str) -> None:
    here, there = flat(BASELINE), flat(ABLATIONS[name]())
    changed = {key for key in here | there if here.get(key, "absent") != there.get(key, "absent")} - {"name"}
    for pattern in CHANGES[name]:
        assert any(fnmatch(key, pattern) for key in changed), pattern
    assert all(any(fnmatch(key, pattern) for pattern in CHANGES[name]) for key in changed), changed


@pytest.mark.parametrize("name", ABLATIONS)
def test_valid_and_small_enough_to_ship(name: str) -> None:
    recipe = ABLATIONS[name]()
    recipe.validate()
    assert recipe.name == name
    assert parameters(recipe.model).total < 9e6  # 18 MB as float16
    made = ABLATIONS[name]
    assert "Result: " in str(inspect.getdoc(getattr(made, "func", made)))


def test_the_baseline_is_the_papers_recipe_scaled_down() -> None:
    first, second = BASELINE.stages
    assert (first.mask_ratio, second.mask_ratio, first.p_mean, first.p_std) == (0.75, 0.0, -0.6, 1.2)
    assert second.images / first.images < 30 / 250  # shorter than the paper's


def test_what_is_to_be_equal_is() -> None:
    smaller, constant = ABLATIONS["smaller"](), ABLATIONS["constant-widths"]()
    assert cost(smaller, 0) == pytest.approx(cost(BASELINE, 0), rel=0.02)
    assert cost(constant, 0) == pytest.approx(cost(BASELINE, 0), rel=0.05)
    assert parameters(constant.model).total == pytest.approx(parameters(BASELINE.model).total, rel=0.05)
    mean = {name: sum(getattr(BASELINE.model, name)) / 8 for name in ("qkv_multipliers", "ffn_multipliers")}
    assert mean == pytest.approx({"qkv_multipliers": 0.75, "ffn_multipliers": 2.25})
