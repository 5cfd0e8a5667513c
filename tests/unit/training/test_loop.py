import math
import os
import signal
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from micro_diffusion.data.loader import Batch, Loader
from micro_diffusion.models import dit as dit_module
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.masking import PatchMask, random_patch_mask
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.log import read_log
from micro_diffusion.training import loop, stages
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.hooks import Hook, Moment, Row
from micro_diffusion.training.loop import Interrupted, train
from micro_diffusion.training.parallel import Parallel
from micro_diffusion.training.stages import State


class Recorder(Hook):
    """Keeps the weights of every step, and sends a signal after a given number of images."""

    def __init__(self, *, stop_at: int | None = None) -> None:
        self.weights: dict[int, torch.Tensor] = {}
        self.stop_at, self.closed = stop_at, False

    def after_step(self, state: State, moment: Moment) -> Row:
        self.weights[moment.after] = flat(state.dit)
        if moment.after == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    def close(self) -> None:
        self.closed = True


def flat(dit: DiT) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in dit.parameters()])


def run(recipe: Recipe, folder: Path, loaders: dict[int, Loader], *hooks: Hook, **more: dict[int, Loader]) -> DiT:
    return train(
        recipe,
        run=folder,
        loaders=loaders,
        downscale=8,
        device=torch.device("cpu"),
        release=release,
        hooks=hooks,
        **more,
    )


def release(folder: Path, state: State) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "images").write_text(str(state.images))


def test_four_stages(recipe: Recipe, loaders: dict[int, Loader], tmp_path: Path) -> None:
    recorder = Recorder()
    dit = run(recipe, tmp_path, loaders, recorder)
    assert dit.num_patches == 16
    assert recorder.closed
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["images"] for row in rows] == list(range(8, 168, 8))
    assert [row["stage"] for row in rows[::5]] == ["1", "2", "3", "4"]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows)
    assert rows[0]["learning_rate"] == pytest.approx(0.005)
    assert rows[-1]["learning_rate"] == pytest.approx(0.001)
    assert rows[-1]["seconds_left"] == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"log.jsonl", "recipe.json", "checkpoints", "model"} | {f"model-stage-{n}" for n in (1, 2, 3, 4)}
    assert (tmp_path / "model-stage-2" / "images").read_text() == "80"
    assert Recipe.from_json((tmp_path / "recipe.json").read_text()) == recipe
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_what_is_captured_is_gone_before_the_next_stage(
    recipe: Recipe, loaders: dict[int, Loader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph holds the memory of a step."""
    alive, ends = [], []

    class Captured:
        def __init__(self, work: Callable[..., object]) -> None:
            self.work = work
            alive.append(weakref.ref(self))

        def __call__(self, *inputs: object) -> object:
            return self.work(*inputs)

    def next_state(recipe: Recipe, state: State, **more: object) -> State:
        ends.append([captured() for captured in alive])
        return stages.next_state(recipe, state, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Parallel, "captured", lambda self, network, work: Captured(work))
    monkeypatch.setattr(loop, "next_state", next_state)
    run(recipe, tmp_path, loaders)
    assert ends == [[None] * count for count in (1, 2, 3)]


def test_training_learns(one_stage: Callable[..., Recipe], loaders: dict[int, Loader], tmp_path: Path) -> None:
    """One picture under every caption is soon known by heart."""
    recipe = replace(
        one_stage(images=8 * 240, mask_ratio=0.0, learning_rate=3e-3), log_every=8 * 30, checkpoint_every=0
    )
    latents = loaders[64].latents  # type: ignore[attr-defined]
    latents[:] = latents[0].clone()
    run(recipe, tmp_path, loaders)
    losses = [row["loss"] for row in read_log(tmp_path / "log.jsonl")]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_accumulation_changes_nothing(
    one_stage: Callable[..., Recipe], loaders: dict[int, Loader], tmp_path: Path, mask_ratio: float
) -> None:
    whole, parts = Recorder(), Recorder()
    run(one_stage(mask_ratio=mask_ratio), tmp_path / "whole", loaders, whole)
    run(one_stage(mask_ratio=mask_ratio, micro_batch=2), tmp_path / "parts", loaders, parts)
    first = [read_log(tmp_path / name / "log.jsonl")[0] for name in ("whole", "parts")]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-5)
    torch.testing.assert_close(whole.weights[40], parts.weights[40], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ratios", [(0.75, 0.5, 0.0), (0.0, 0.5, 0.75)])
def test_a_mask_schedule_is_followed(
    one_stage: Callable[..., Recipe],
    loaders: dict[int, Loader],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ratios: tuple[float, float, float],
) -> None:
    drawn = []

    def spy(noise: torch.Tensor, mask_ratio: float) -> PatchMask:
        drawn.append(mask_ratio)
        return random_patch_mask(noise, mask_ratio)

    monkeypatch.setattr(dit_module, "random_patch_mask", spy)
    monkeypatch.setattr(loop, "watch", lambda *args, **kwargs: {})  # it draws masks of its own
    schedule = tuple(zip((8, 24), ratios[1:], strict=True))
    recipe = one_stage(resolution=128, mask_ratio=ratios[0], mask_schedule=schedule)
    recorder, plain = Recorder(stop_at=16), Recorder()
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "run", loaders, recorder)
    run(recipe, tmp_path / "run", loaders, recorder)
    assert drawn == [ratio for ratio in (ratios[0], ratios[1], ratios[1], ratios[2], ratios[2]) if ratio]
    run(one_stage(resolution=128, mask_ratio=ratios[0]), tmp_path / "plain", loaders, plain)
    assert torch.equal(recorder.weights[8], plain.weights[8])
    assert not torch.equal(recorder.weights[16], plain.weights[16])


def test_a_signal_that_arrives_twice_is_one_and_a_later_one_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with loop._signals(60) as received:
        for _ in range(2):  # Ctrl-C under torchrun: from the terminal, and passed on
            signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        monkeypatch.setattr(loop, "TOGETHER", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_losses_are_logged_by_noise_level(
    one_stage: Callable[..., Recipe], loaders: dict[int, Loader], tmp_path: Path
) -> None:
    """A row of 800 images: their mean over the levels is the loss, but for levels being drawn unequally often."""
    recipe = one_stage(images=800, batch_size=80, learning_rate=1e-9)
    run(replace(recipe, log_every=800, checkpoint_every=0), tmp_path, loaders)
    (row,) = read_log(tmp_path / "log.jsonl")
    assert sum(row[f"loss/level_{i}"] for i in range(8)) / 8 == pytest.approx(row["loss"], rel=0.1)


def test_a_bad_batch_is_skipped_and_counted(
    one_stage: Callable[..., Recipe], loaders: dict[int, Loader], tmp_path: Path
) -> None:
    class Poisoned(type(loaders[64])):  # type: ignore[misc]
        def batch(self, start: int, count: int) -> Batch:
            batch = super().batch(start, count)
            return batch._replace(latents=batch.latents * math.nan) if start == 16 else batch

    recorder = Recorder()
    run(one_stage(), tmp_path, {64: Poisoned(64)}, recorder)
    assert torch.equal(recorder.weights[16], recorder.weights[24])
    assert not torch.equal(recorder.weights[24], recorder.weights[32])
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]
    assert [row["loss"] is None for row in rows] == [False, False, True, False, False]


@pytest.mark.parametrize("stop_at", [8, 24, 40, 104])
def test_interrupted_and_resumed_is_undisturbed(
    recipe: Recipe, loaders: dict[int, Loader], tmp_path: Path, stop_at: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    undisturbed = run(recipe, tmp_path / "a", loaders)
    with pytest.raises(Interrupted) as stopped:
        run(recipe, tmp_path / "b", loaders, Recorder(stop_at=stop_at))
    assert stopped.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    resumed = run(recipe, tmp_path / "b", loaders)
    assert torch.equal(flat(resumed), flat(undisturbed))
    timed = {"images_per_second", "utilisation", "seconds", "seconds_left"}
    first, second = (
        [
            {key: value for key, value in row.items() if key not in timed}
            for row in read_log(tmp_path / name / "log.jsonl")
        ]
        for name in ("a", "b")
    )
    assert first == second


def test_a_finished_run_has_nothing_to_do(
    one_stage: Callable[..., Recipe], loaders: dict[int, Loader], tmp_path: Path
) -> None:
    first = run(one_stage(), tmp_path, loaders)
    recorder = Recorder()
    assert torch.equal(flat(run(one_stage(), tmp_path, loaders, recorder)), flat(first))
    assert not recorder.weights


def test_another_recipe_is_refused(
    one_stage: Callable[..., Recipe], loaders: dict[int, Loader], tmp_path: Path
) -> None:
    run(one_stage(), tmp_path, loaders)
    with pytest.raises(UserError, match=r"stages\.0\.learning_rate: 0\.5 here, 0\.01 there"):
        run(one_stage(learning_rate=0.5), tmp_path, loaders)


def test_missing_latents(recipe: Recipe, loaders: dict[int, Loader], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'3' needs training latents at 128 px"):
        run(recipe, tmp_path / "run", {64: loaders[64]})
    with pytest.raises(UserError, match="validate_every does nothing"):
        run(replace(recipe, validate_every=8), tmp_path / "run", loaders)
    assert not (tmp_path / "run").exists()


def test_validation_goes_into_the_log(recipe: Recipe, loaders: dict[int, Loader], tmp_path: Path) -> None:
    run(replace(recipe, validate_every=32, log_every=16), tmp_path, loaders, validation=loaders)
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["images"] for row in rows if "validation" in row] == [32, 40, 64, 80, 96, 120, 128, 160]
    row = rows[-1]
    assert row["validation"] == pytest.approx(sum(row[f"validation/level_{level}"] for level in range(8)) / 8)


def test_the_flow_objective_trains(
    one_stage: Callable[..., Recipe], loaders: dict[int, Loader], tmp_path: Path
) -> None:
    recipe = replace(one_stage(p_mean=0.0, p_std=1.0), objective="flow")
    run(recipe, tmp_path, loaders)
    assert all(math.isfinite(row["loss"]) for row in read_log(tmp_path / "log.jsonl"))
