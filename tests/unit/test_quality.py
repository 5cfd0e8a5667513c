"""The measuring stick's arithmetic: budgets, rates, the order of runs, and what is drawn from held data."""

import argparse
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from benchmarks import quality
from benchmarks.quality import Bench, Job, data_of, interval, jobs, name_of
from benchmarks.quality_data import Data, Held, composed, drawings, examples, in_slice
from benchmarks.quality_score import Sampling
from benchmarks.quality_train import Trainer, at_rate, fitted
from micro_diffusion.data.sources.emoji_scenes import CONCEPTS
from micro_diffusion.evaluation.emoji import EmojiBenchmark
from micro_diffusion.recipes.ablations import ABLATIONS
from micro_diffusion.recipes.recipe import RECIPES
from micro_diffusion.runtime.files import UserError
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.stages import State

SMALL = {"batch_size": 8, "warmup_images": 0, "ema_halflife_images": 32}


def baseline() -> Recipe:
    return ABLATIONS["baseline"]()


@pytest.mark.parametrize("seconds", [30.0, 95.0, 480.0])
@pytest.mark.parametrize("speeds", [[100_000.0, 40_000.0], [9_000.0, 30_000.0], [2_000.0, 1_000.0]])
def test_stages_fill_the_seconds_and_keep_their_proportions(speeds: list[float], seconds: float) -> None:
    recipe = baseline()
    fit = fitted(recipe, speeds, seconds)
    took = sum(stage.images / speed for stage, speed in zip(fit.stages, speeds, strict=True))
    a_step_each = sum(stage.batch_size / speed for stage, speed in zip(fit.stages, speeds, strict=True))
    assert seconds - a_step_each <= took <= seconds + a_step_each
    factor = seconds / sum(stage.images / speed for stage, speed in zip(recipe.stages, speeds, strict=True))
    for stage, whole in zip(fit.stages, recipe.stages, strict=True):
        assert stage.images == pytest.approx(whole.images * factor, abs=2 * stage.batch_size)


def test_a_slower_recipe_sees_fewer_images_in_the_same_time() -> None:
    fast, slow = (fitted(baseline(), speeds, 95.0).images for speeds in ([100_000, 50_000], [50_000, 25_000]))
    assert slow == pytest.approx(fast / 2, rel=0.001)


def test_a_rate_moves_all_stages() -> None:
    first, second = baseline().stages
    recipe = replace(
        baseline(), stages=(replace(first, learning_rate=2.0), replace(second, learning_rate=1.0))
    )  # fmt: skip
    assert [stage.learning_rate for stage in at_rate(recipe, 0.5).stages] == [0.5, 0.25]


def asked(**changes: object) -> argparse.Namespace:
    names = {"recipes": ["baseline", "no-mixer"], "seeds": [0, 1], "rates": [], "seconds": 9.0, "scenes": 0.5}
    return argparse.Namespace(**{**names, "set": [], "share": (0, 1), "cut": ["none"], **changes})


def test_recipes_learn_of_the_text_encoder_that_the_data_have() -> None:
    options = {"augment": 1, "count": 2, "limit": None, "processes": 3}
    args = asked(**options, text_encoder="embedded?layer=-2", recipes=["baseline"], seeds=[0])
    assert data_of(args) == Data(1, 2, None, 3, "embedded?layer=-2")
    (job,) = jobs(args)
    assert job.make().text_encoder == "embedded?layer=-2" != baseline().text_encoder
    plain = asked(**options, text_encoder="embedded")
    assert data_of(plain) == Data(1, 2, None, 3) and not plain.set


def test_all_recipes_come_before_the_next_seed() -> None:
    order = [(job.recipe, job.seed) for job in jobs(asked())]
    assert order == [("baseline", 0), ("no-mixer", 0), ("baseline", 1), ("no-mixer", 1)]
    rates = jobs(asked(recipes=["baseline"], rates=[1e-3, 2e-3]))
    assert [(job.rate, job.seed) for job in rates] == [(1e-3, 0), (2e-3, 0), (1e-3, 1), (2e-3, 1)]


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_shares_are_all_runs_once(parts: int) -> None:
    shares = [job for part in range(parts) for job in jobs(asked(share=(part, parts)))]
    assert sorted(map(name_of, shares)) == sorted(map(name_of, jobs(asked()))) and len(set(shares)) == len(shares)


def test_a_run_is_found_again_by_what_was_asked() -> None:
    job = Job("baseline", 1e-3, 1, 95.0, 0.5, ("weight_decay=0.01",))
    recipe = job.make()
    assert (recipe.seed, recipe.weight_decay, recipe.stages[0].learning_rate) == (1, 0.01, 1e-3)
    assert job.asked()["settings"] == ["weight_decay=0.01"]
    assert name_of(job).startswith("baseline-0.001-seed-1-95s-scenes-0.5-")
    changes = {"recipe": "averages", "rate": None, "seed": 2, "seconds": 9.0, "scenes": 0.4, "settings": ()}
    names = {name_of(replace(job, **{key: value})) for key, value in changes.items()}
    assert len(names | {name_of(job)}) == len(changes) + 1


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_can_be_run(name: str) -> None:
    Job(name, None, 0, 95.0, 0.5, ()).make()


def test_stages_of_other_sizes_are_refused() -> None:
    assert "emoji" in RECIPES
    with pytest.raises(UserError, match="stages at 128 px"):
        Job("emoji", None, 0, 95.0, 0.5, ()).make()


def test_where_to_guide() -> None:
    assert (interval("all"), interval("0.2:5")) == (None, (0.2, 5.0))


def held(value: float, rows: int = 6) -> Held:
    """Rows of one value, row i with two captions of i + 1 and of one tokens."""
    length = torch.tensor([n for i in range(rows) for n in (i + 1, 1)])
    start = length.cumsum(0) - length
    states = torch.repeat_interleave(torch.arange(2.0 * rows), length)[:, None].expand(-1, 3).half() + 1
    count = torch.full((rows,), 2)
    alone = torch.arange(rows) % 2 == 0
    return Held(torch.full((rows, 4, 2, 2), value).half(), count.cumsum(0) - 2, count, start, length, states, alone)


def test_rows_come_with_the_caption_chosen() -> None:
    latents, text, mask = held(5.0).take(torch.tensor([3, 0]), torch.tensor([0.2, 0.9]), 5)
    assert latents.shape == (2, 4, 2, 2) and (latents == 5).all()
    assert mask.tolist() == [[True] * 4 + [False], [True] + [False] * 4]
    assert text[:, :, 0].tolist() == [[7, 7, 7, 7, 0], [2, 0, 0, 0, 0]]  # captions 6 and 1, counted from one


def test_cut_captions_can_be_left_out() -> None:
    data = Data(augment=4, scenes=1, limit=40, processes=1)
    records = [record for record in drawings(data, 0) if record.split == "train"]
    copies = [record for record in records if record.key.count("/") == 2]
    assert {len(record.captions) for record in copies} == {1, 2}
    assert {len(record.captions) for record in records if record.key.count("/") == 1} == {3}
    last = [(record.key.split("/")[1], record.captions[1].text) for record in copies if len(record.captions) == 2]
    styles, subjects = ([text for _, text in last if text.startswith("in ") == kind] for kind in (True, False))
    assert len(styles) == len(subjects) == len(copies) // 4
    assert all(text.endswith(" style") for text in styles) and not any(" style" in text for text in subjects)
    one = held(1.0)
    assert one.keep(True).count.tolist() == [2] * 6 and one.keep(False).count.tolist() == [1] * 6
    assert one.keep("style").count.tolist() == [2, 1] * 3


def test_a_batch_has_its_shares_and_the_recipes_draws() -> None:
    recipe = replace(baseline(), caption_dropout=0.5, text_length=5)
    draws = torch.Generator().manual_seed(0)
    batch = examples(
        [held(1.0), held(2.0)], [700, 300], recipe, recipe.stages[0], patches=64, draws=draws
    )  # fmt: skip
    assert [(batch.latents[:, 0, 0, 0] == value).sum() for value in (1, 2)] == [700, 300]
    assert batch.mask_noise.shape == (1000, 64) and batch.noise.shape == (1000, 4, 2, 2)
    assert 400 < batch.caption_dropped.sum() < 600
    assert (batch.text[batch.caption_dropped] == 0).all() and (batch.text_mask[batch.caption_dropped].sum(1) == 1).all()
    assert examples([held(1.0)], [8], recipe, recipe.stages[1], patches=64, draws=draws).mask_noise.shape == (8, 0)


@pytest.mark.slow
def test_the_slice_is_small_and_no_scene_shows_it() -> None:
    records = list(drawings(Data(augment=1, scenes=1, limit=500, processes=1), 0))
    assert len({record.key for record in records}) == len(records)
    aside = [record for record in records if record.split == "slice"]
    asked = {row["caption"] for row in EmojiBenchmark().rows}
    assert 0 < len(aside) < 0.06 * len(records)
    for record in aside:
        assert in_slice(record.key, record.captions[0].text) and record.key.partition("/")[2] not in CONCEPTS
        assert record.captions[0].text not in asked  # so what the benchmark calls seen is
        assert not any(other.key.startswith(f"{record.key}/") for other in records)  # no copy of it
    assert {record.split for record in records} == {"train", "slice", "held_out_pair", "held_out_concept"}


def test_scenes_to_train_on_hold_nothing_out() -> None:
    data = Data(augment=0, scenes=6, limit=None, processes=3)
    scenes = [record.image.args[0] for shard in range(3) for record in composed(data, shard) if record.split == "train"]
    alone = [record.image.args[0] for record in composed(replace(data, processes=1), 0) if record.split == "train"]
    assert not any(scene.held_out for scene in scenes) and len(set(scenes)) == 6
    assert set(scenes) == set(alone)


def test_one_shape_is_one_model_and_seeds_begin_alike() -> None:
    recipe = baseline()
    first, second = (replace(stage, **SMALL, images=n) for stage, n in zip(recipe.stages, (64, 32), strict=True))
    small = replace(
        recipe, stages=(first, second), text_length=5, precision="float32", compile=False,
        model=replace(
            recipe.model, caption_channels=3, dim=32, depth=1, patch_mixer_dim=32, qkv_multipliers=(1.0,),
            ffn_multipliers=(1.0,),
        ),
        checkpoint_every=0, validate_every=0, log_every=8,
    )  # fmt: skip
    some = replace(held(1.0), latents=torch.randn(6, 4, 16, 16).half())
    trainer = Trainer([some], [1.0], torch.device("cpu"), mode="none", profiled=False)
    speed = trainer.speed(small, first)  # on throw-away weights
    assert speed.images_per_second > 0 and speed.gpu_idle is None
    runs, seen = [], list[int]()

    def check(state: State) -> dict[str, float]:
        seen.append(state.images)
        return {"mark": 1.0}

    for _ in range(2):
        seen.clear()
        state, rows, used = trainer.run(small, check)
        assert state.images == rows[-1]["images"] == 96 and used > 0 and rows[-1]["mark"] == 1
        assert [row["images"] for row in rows] == seen and len(rows) >= 10
        assert {row["stage"] for row in rows} == {"128 px masked", "128 px"}
        assert rows[-1]["learning_rate"] < 0.05 * first.learning_rate
        runs.append({name: value.clone() for name, value in state.shown.state_dict().items()})
    assert len(trainer.models) == 1 and all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    other, _, _ = trainer.run(replace(small, seed=5), check)
    assert any(not torch.equal(runs[0][name], value) for name, value in other.shown.state_dict().items())


@pytest.mark.parametrize(("watch", "told"), [(False, {"slice": 0.5}), (True, {"slice": 0.5, "both, slice": 0.25})])
def test_the_judges_are_asked_on_the_way_only_if_wanted(
    monkeypatch: pytest.MonkeyPatch, watch: bool, told: dict[str, float]
) -> None:
    bench = object.__new__(Bench)
    bench.args, bench.sampling = argparse.Namespace(watch=watch), [Sampling(3.0)]
    monkeypatch.setattr(bench, "judges", Mock(of_drawings=lambda model, sampling: {"both, slice": 0.25}), raising=False)
    monkeypatch.setattr(Bench, "check", lambda self, dit, recipe: {"slice": 0.5})
    monkeypatch.setattr(Bench, "model", lambda self, dit, recipe: None)
    assert bench.progress(Mock(), Mock()) == told


def test_no_run_begins_that_may_end_too_late(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the first run took to compile is not held against others of that recipe, but against other recipes."""
    now, done = [0.0], list[str]()

    class Runs:
        def __init__(self, *args: object) -> None:
            pass

        def do(self, job: Job) -> dict[str, float]:
            besides = 40.0 if job.recipe in done else 300.0
            done.append(job.recipe)
            now[0] += job.seconds + besides
            return {"seconds_besides": besides}

    args = asked(
        out=tmp_path / "out.jsonl", data=tmp_path, device="cpu", probe=False, rescore=[], judges=None, guidance=[2.0],
        interval=[None], steps=1, until=600.0, seeds=[0], rates=[1e-3, 2e-3, 4e-3], recipes=["baseline"],
    )  # fmt: skip
    wanted = [*jobs(args), *jobs(argparse.Namespace(**vars(args) | {"recipes": ["no-mixer"]}))]
    replaced: dict[str, object] = {
        "arguments": lambda: args, "data_of": lambda args: None, "prepare_data": lambda *args: None, "Bench": Runs,
        "append": lambda *args: None, "summary": str, "jobs": lambda args: wanted,
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(quality, name, value)
    monkeypatch.setattr(quality, "time", Mock(perf_counter=lambda: now[0]))
    quality.main()
    assert done == ["baseline"] * 3
    assert capsys.readouterr().out.count("no-mixer") == 3
