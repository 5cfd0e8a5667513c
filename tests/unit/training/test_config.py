import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from micro_diffusion.runtime.files import UserError
from micro_diffusion.training.config import Recipe, differences


def test_json_round_trip(recipe: Recipe) -> None:
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("path", "key", "value", "message"),
    [
        ((), "caption_dropuot", 0.1, "recipe has no setting 'caption_dropuot'; did you mean 'caption_dropout'"),
        (("stages", 1), "learn_rate", 0.1, "recipe.stages.1 has no setting 'learn_rate'; .* 'learning_rate'"),
        (("model",), "dimm", 8, "recipe.model has no setting 'dimm'; did you mean 'dim'"),
        ((), "seed", "eighteen", "recipe.seed is 'eighteen', but must be int"),
        ((), "seed", True, "recipe.seed is True"),
        ((), "objective", "ddpm", "recipe.objective is 'ddpm', but must be 'edm' or 'flow'"),
        ((), "betas", [0.9], "recipe.betas"),
        ((), "stages", {}, "recipe.stages"),
        ((), "text_length", "long", "recipe.text_length"),
    ],
)
def test_from_json_names_what_is_wrong(
    recipe: Recipe, path: tuple[Any, ...], key: str, value: Any, message: str
) -> None:
    data = json.loads(recipe.to_json())
    inner = data
    for step in path:
        inner = inner[step]
    inner[key] = value
    with pytest.raises(UserError, match=message):
        Recipe.from_json(json.dumps(data))


def test_from_json_of_half_a_recipe() -> None:
    with pytest.raises(UserError, match="not valid JSON"):
        Recipe.from_json('{"name": ')
    with pytest.raises(UserError, match="recipe lacks the setting 'model'"):
        Recipe.from_json('{"name": "x"}')


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 41}, "whole batches of 8: 40 is nearest"),
        ({"micro_batch": 3}, "must divide"),
        ({"micro_batch": 8}, "does nothing"),
        ({"mask_ratio": 1.0}, "below 1"),
        ({"mask_schedule": ((16, 1.0),)}, "below 1"),
        ({"mask_schedule": ((16, 0.25), (8, 0.0))}, "must rise"),
        ({"mask_schedule": ((0, 0.25),)}, "must rise"),
        ({"mask_schedule": ((40, 0.25),)}, "must rise"),
        ({"mask_schedule": ((16, 0.5),)}, "does nothing at 16: the ratio is 0.5 already"),
        ({"mask_schedule": ((16, 0.25), (24, 0.25))}, "does nothing at 24"),
        ({"mask_schedule": ((12, 0.25),)}, "12 is within one"),
        ({"warmup_images": 40}, "as long as the stage"),
        ({"final_lr_ratio": 0.5}, "does nothing with a constant schedule"),
        ({"schedule": "cosine"}, "does nothing: use constant"),
        ({"ema_start_images": 8}, "without ema_halflife_images"),
        ({"ema_start_images": 40, "ema_halflife_images": 8}, "start after the stage"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"start": "weights"}, "must be 'scratch'"),
        ({"ema_halflife_images": 8, "ema_sigma_rel": (0.1,)}, "two kinds of average"),
        ({"ema_sigma_rel": (0.1, 0.3)}, "between 0 and 0.28"),
        ({"ema_sigma_rel": (0.1, 0.1)}, "a width twice"),
    ],
)
def test_stage_settings_that_do_nothing(
    one_stage: Callable[..., Recipe], changes: dict[str, Any], message: str
) -> None:
    one_stage().validate()
    with pytest.raises(UserError, match=message):
        one_stage(**changes).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ()}, "at least one stage"),
        ({"objective": "flow", "sigma_data": 0.5}, "sigma_data does nothing"),
        ({"flow_shift": 3.0}, "flow_shift does nothing"),
        ({"sample_every": 1000}, "sample_every must be between 0 and the run's 160 images"),
        ({"compile": True}, "set text_length"),
        ({"log_every": 0}, "log_every must be positive"),
        ({"caption_dropout": 1.0}, "caption_dropout"),
        ({"muon_momentum": 0.9}, "muon_momentum does nothing with adamw"),
        ({"optimizer": "muon", "muon_momentum": 1.0}, "muon_momentum must be"),
        ({"expert_learning_rate_scale": 2.0}, "does nothing without experts"),
        ({"expert_learning_rate_scale": 0.0}, "must be positive"),
        ({"snapshot_every": 8}, "snapshot_every does nothing without ema_sigma_rel"),
        ({"guard_skips": -1}, "guard_skips must not be negative"),
    ],
)
def test_recipe_settings_that_do_nothing(recipe: Recipe, changes: dict[str, Any], message: str) -> None:
    recipe.validate()
    with pytest.raises(UserError, match=message):
        replace(recipe, **changes).validate()


def test_stage_order(recipe: Recipe) -> None:
    first, second, third, fourth = recipe.stages
    for stages, message in (
        ((first, first), "same name"),
        ((first, replace(first, name="2")), "would waste the stages before"),
        ((first, replace(third, start="all_but_schedule")), "start must be 'weights'"),
    ):
        with pytest.raises(UserError, match=message):
            replace(recipe, stages=stages).validate()
    with pytest.raises(UserError, match="set text_length"):
        replace(recipe, model=replace(recipe.model, text_mask="none")).validate()


def test_clock(recipe: Recipe) -> None:
    assert recipe.ends == (40, 80, 120, 160)
    assert recipe.images == 160


def test_mask_schedule(one_stage: Callable[..., Recipe]) -> None:
    recipe = one_stage(mask_schedule=((16, 0.25), (32, 0.0)))
    recipe.validate()
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert [recipe.stages[0].mask_ratio_at(images) for images in range(0, 40, 8)] == [0.5, 0.5, 0.25, 0.25, 0.0]


def test_resolution_that_does_not_fit(one_stage: Callable[..., Recipe]) -> None:
    recipe = one_stage(resolution=72)
    with pytest.raises(UserError, match="72 is not a multiple of 32 pixels"):
        recipe.stage_model(recipe.stages[0], downscale=8)


def test_differences(recipe: Recipe) -> None:
    other = replace(recipe, seed=4, stages=(*recipe.stages[:3], replace(recipe.stages[3], batch_size=16)))
    assert differences(recipe, recipe) == []
    assert differences(recipe, other) == ["stages.3.batch_size: 8 here, 16 there", "seed: 3 here, 4 there"]
