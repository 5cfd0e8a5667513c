"""The paper's recipe, smaller in every way but its stages, from pictures to the released model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from integration.command_line import make_autoencoder, make_pictures, run
from tiny_parts import MAX_LENGTH, TEXT_WIDTH, write_text_encoder

from micro_diffusion.recipes.recipe import RECIPES
from micro_diffusion.runtime.log import read_log
from micro_diffusion.training.config import INTERVALS, Recipe, Stage

BATCH, SHORTER = 2, 2500


def shrunk(recipe: Recipe, *, autoencoder: Path, text_encoder: Path) -> Recipe:
    """The same stages with the 2,500th part of the steps, of two images, on a model of a few thousand parameters."""

    def stage(each: Stage) -> Stage:
        def images(count: int) -> int:
            return BATCH * -(-count // each.batch_size // SHORTER) if count else 0

        return replace(
            each, batch_size=BATCH, micro_batch=1, images=images(each.images), warmup_images=images(each.warmup_images),
            ema_halflife_images=images(each.ema_halflife_images), ema_start_images=images(each.ema_start_images),
        )  # fmt: skip

    depth = 4
    model = replace(
        recipe.model, dim=32, depth=depth, head_dim=16, multiple_of=16, num_experts=2, caption_channels=TEXT_WIDTH,
        qkv_multipliers=recipe.model.qkv_multipliers[::9], ffn_multipliers=recipe.model.ffn_multipliers[::9],
        patch_mixer_dim=16, patch_mixer_depth=1,
    )  # fmt: skip
    small = replace(
        recipe, model=model, stages=tuple(map(stage, recipe.stages)), autoencoder=str(autoencoder),
        text_encoder=str(text_encoder), text_length=MAX_LENGTH, precision="float32", compile=False,
    )  # fmt: skip
    off = {"sample_every": 0, "snapshot_every": 0, "evaluate_every": 0}
    return replace(small, **dict.fromkeys(INTERVALS, BATCH * 10) | off)


@pytest.mark.slow
def test_a_small_copy_of_the_papers_recipe_trains_through_all_stages(tmp_path: Path) -> None:
    pictures, autoencoder, text_encoder = (tmp_path / name for name in ("pictures", "autoencoder", "text"))
    make_pictures(pictures, 12)
    make_autoencoder(autoencoder)
    write_text_encoder(text_encoder)
    recipe = shrunk(RECIPES["paper-37m"](), autoencoder=autoencoder, text_encoder=text_encoder)
    assert [stage.images // BATCH for stage in recipe.stages] == [100, 12, 20, 2]
    (tmp_path / "small.json").write_text(recipe.to_json())
    prepare = ("prepare", pictures, "--autoencoder", autoencoder, "--text-encoder", text_encoder, "--validation", "0.2")
    run(*prepare, "--out", tmp_path / "low", "--resolutions", "256")
    run(*prepare, "--out", tmp_path / "both", "--resolutions", "256", "512")
    printed = run(
        "train", tmp_path / "small.json", "--store", tmp_path / "low", "--store", tmp_path / "both",
        "--run", tmp_path / "run", "--price", "2.5",
    )  # fmt: skip
    assert f"The stages at 512 px go without {tmp_path / 'low'}" in printed
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert list(dict.fromkeys(row["stage"] for row in rows)) == ["256 px masked", "256 px", "512 px masked", "512 px"]
    assert rows[-1]["images"] == recipe.images and rows[-1]["skipped"] == 0
    assert rows[-1]["dollars"] == pytest.approx(2.5 * rows[-1]["device_hours"])
    card = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert card["resolution"] == 512 and card["dit"]["pos_interp_scale"] == 2.0
    assert "finished" in run("runs", tmp_path, "--plot", tmp_path / "plot.html")
