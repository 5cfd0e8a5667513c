"""Recipes by name, from files, and changed on the command line."""

from pathlib import Path

import pytest

from micro_diffusion.cli.train import Train, find_recipe, override
from micro_diffusion.recipes.recipe import RECIPES
from micro_diffusion.runtime.files import UserError
from micro_diffusion.training.config import Recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return RECIPES["quickstart"]()


def test_a_recipe_by_name_from_json_and_from_python(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(recipe.to_json())
    (tmp_path / "mine.py").write_text(
        "from micro_diffusion.recipes.emoji import quickstart\ndef small():\n    return quickstart()\nrecipe = small\n"
    )
    assert find_recipe("quickstart") == recipe
    assert find_recipe(str(tmp_path / "mine.json")) == recipe
    assert find_recipe(str(tmp_path / "mine.py")) == recipe
    assert find_recipe(f"{tmp_path / 'mine.py'}:small") == recipe


def test_what_is_no_recipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def other():\n    return 3\n")
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        find_recipe("quikstart")
    with pytest.raises(UserError, match="no recipe file"):
        find_recipe(str(tmp_path / "none.json"))
    for name in ("recipe", "other"):
        with pytest.raises(UserError, match="name it as file.py:name"):
            find_recipe(f"{tmp_path / 'mine.py'}:{name}")


def test_settings_reach_into_stages_and_model(recipe: Recipe) -> None:
    batch = recipe.stages[2].batch_size
    changed = override(recipe, [f"stages.2.images={batch * 100}", "seed=7", "autoencoder=a/b", "text_length=20"])
    assert (changed.stages[2].images, changed.seed, changed.autoencoder, changed.text_length) == (
        batch * 100, 7, "a/b", 20,
    )  # fmt: skip
    assert changed.stages[0] == recipe.stages[0]
    assert override(recipe, []) == recipe


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sead=1", "did you mean 'seed'"),
        ("stages.9.images=64", "no setting '9'"),
        ("stages.0.lerning_rate=1", "did you mean 'learning_rate'"),
        ("seed.x=1", "no setting 'x'"),
        ("model.dims=64", "did you mean 'dim'"),
        ("seed", "key=value"),
        ("seed=now", "seed"),
        ("model.dim=33", "head_dim"),
        ("stages.0.images=63", "whole batches"),
    ],
)
def test_a_wrong_setting_gets_one_sentence(recipe: Recipe, setting: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        override(recipe, [setting])


def test_training_needs_a_store_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a store"):
        Train("quickstart", (), tmp_path / "run")()
    with pytest.raises(UserError, match="no latent store"):
        Train("quickstart", (str(tmp_path / "store"),), tmp_path / "run")()
    assert not (tmp_path / "run").exists()
