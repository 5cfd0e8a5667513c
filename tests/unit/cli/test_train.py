"""Recipes by name, from files, and changed on the command line."""

import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from micro_diffusion.cli.train import Train, by_resolution, find_price, find_recipe, override
from micro_diffusion.recipes.recipe import RECIPES
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.hardware import GPUS
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


class Known(NamedTuple):
    path: str
    info: SimpleNamespace


def test_a_stage_is_fed_by_the_stores_that_hold_its_resolution(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    both, low, high, other = (
        Known(name, SimpleNamespace(resolutions=sizes))
        for name, sizes in (("both", (64, 128)), ("low", (64,)), ("high", (128, 512)), ("other", (32,)))
    )

    def feeding(*stores: Known) -> dict[int, list[str]]:
        return {size: [s.path for s in some] for size, some in by_resolution(recipe, stores).items()}  # type: ignore[arg-type]

    assert feeding(both) == {64: ["both"], 128: ["both"]}
    assert not capsys.readouterr().err
    assert feeding(both, low, high) == {64: ["both", "low"], 128: ["both", "high"]}
    assert capsys.readouterr().err.splitlines() == [
        "The stages at 64 px go without high, which has no such latents.",
        "The stages at 128 px go without low, which has no such latents.",
    ]
    # These are refused by `require`, which is given the store that does not fit.
    assert feeding(low) == {64: ["low"], 128: ["low"]}
    assert "other" in feeding(both, other)[64]


def test_price(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    names = iter(["NVIDIA H100 80GB HBM3", "Some other GPU"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    assert find_price(None, cuda) == GPUS["h100"].price
    assert f"at {GPUS['h100'].price:.2f} an hour" in capsys.readouterr().err
    assert find_price(None, cuda) is None
    assert find_price(None, cpu) is None
    assert find_price(1.5, cpu) == 1.5
    assert find_price(0.0, cuda) is None
    with pytest.raises(UserError, match="must not be negative"):
        find_price(-1.0, cpu)
    assert not capsys.readouterr().err


def test_the_recipe_in_the_docs_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    code = text[text.index("    from dataclasses import replace") : text.index("`mask_schedule` lists")]
    (tmp_path / "mine.py").write_text(textwrap.dedent(code))
    mine = find_recipe(f"{tmp_path / 'mine.py'}:thaw")
    mine.validate()
    low = mine.stages[0]
    assert [low.mask_ratio_at(low.images * i // 6) for i in (0, 1, 3, 5)] == [0.75, 0.75, 0.5, 0.0]
