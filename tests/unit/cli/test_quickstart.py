"""What the report says is measured as it should be."""

import math
from pathlib import Path

import pytest
from PIL import Image

from micro_diffusion.cli.quickstart import compare, page, scaled
from micro_diffusion.recipes.recipe import RECIPES
from micro_diffusion.runtime.report import curve_svg


def grey(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, value, value))


def test_nearest_picture_and_psnr() -> None:
    nearest, psnr = compare([grey(0), grey(130), grey(240)], [grey(0), grey(120), grey(150)])
    assert nearest == [0, 1, 2]
    assert psnr[0] == pytest.approx(100)  # equal pictures are capped
    assert psnr[1] == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    nearest, _ = compare([grey(139), grey(130)], [grey(0), grey(140)])
    assert nearest == [1, 1]


@pytest.mark.parametrize("length", [0.001, 0.01, 0.3, 1.0, 2.5])
def test_a_recipe_of_any_length_is_valid(length: float) -> None:
    recipe = RECIPES["quickstart"]()
    changed = scaled(recipe, length)
    changed.validate()
    assert len(changed.stages) == len(recipe.stages)
    assert changed.images == pytest.approx(recipe.images * length, rel=0.05, abs=8 * recipe.stages[0].batch_size)


def test_the_page_says_that_the_model_memorises() -> None:
    results = {
        "pictures": 150, "nearest_is_own": 0.98, "median_psnr_db": 29.3, "seconds": {"prepare": 9.0, "train": 350.0},
        "peak_memory_gb": 1.5, "machine": {"device": "two cores"},
    }  # fmt: skip
    figures = {
        "grid.png": grey(1),
        "stages.png": grey(2),
        "loss.svg": curve_svg({"a": [(0, 1)]}, title="t", x_label="x", y_label="y"),
    }
    text = page(RECIPES["quickstart"](), results, figures, run=Path("quickstart/run"))
    assert "the model memorises" in text and "98%" in text and "29.3 dB" in text and "6.0 minutes" in text
    assert all(words in text for words in ("128 px masked", "micro-diffusion generate", "two cores"))
