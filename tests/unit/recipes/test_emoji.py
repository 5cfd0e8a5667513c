import pytest

from micro_diffusion.recipes.recipe import RECIPES
from micro_diffusion.training.config import Recipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_survive_json(name: str) -> None:
    recipe = RECIPES[name]()
    recipe.validate()
    assert recipe.name == name
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("name", ["quickstart", "emoji"])
def test_the_four_stages_of_the_paper(name: str) -> None:
    stages = RECIPES[name]().stages
    assert [stage.resolution for stage in stages] == [64, 64, 128, 128]
    assert [stage.mask_ratio > 0 for stage in stages] == [True, False, True, False]
    assert [stage.start for stage in stages] == ["scratch", "all_but_schedule", "weights", "all_but_schedule"]
    assert [stage.pos_interp_scale for stage in stages] == [1, 1, 2, 2]


def test_most_images_of_the_long_recipe_are_masked() -> None:
    recipe = RECIPES["emoji"]()
    masked = sum(stage.images for stage in recipe.stages if stage.mask_ratio)
    assert 0.8 < masked / recipe.images < 0.9
