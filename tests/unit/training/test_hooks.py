import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from micro_diffusion.data.loader import Loader
from micro_diffusion.models.dit import DiT
from micro_diffusion.runtime.files import UserError
from micro_diffusion.training import hooks
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.ema import follow
from micro_diffusion.training.hooks import (
    Costs,
    Evaluation,
    Hook,
    Moment,
    Progress,
    Samples,
    TensorBoard,
    Validation,
    WandB,
    format_seconds,
)
from micro_diffusion.training.stages import first_state

ROW = {
    "images": 64, "stage": "64 px", "loss": 0.5, "images_per_second": 1234.0, "seconds": 1.0, "seconds_left": 75.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "intervals", "due"),
    [(0, 8, (8,), True), (8, 16, (24,), False), (16, 24, (24,), True), (20, 28, (24,), True), (0, 64, (0, 0), False)],
)
def test_due(recipe: Recipe, before: int, after: int, intervals: tuple[int, ...], due: bool) -> None:
    moment = Moment(recipe.stages[0], before=before, after=after, stage_ends=False)
    assert moment.due(*intervals) == due
    assert replace(moment, stage_ends=True).due(*intervals)


def test_progress_without_a_terminal() -> None:
    stream = io.StringIO()
    progress = Progress(128, stream=stream, seconds=10.0)
    for seconds in (1.0, 5.0, 12.0):
        progress.on_row(ROW | {"seconds": seconds})
    progress.on_row(ROW | {"images": 128, "seconds": 13.0, "loss": None})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "64 px  64 of 128 images  loss 0.5000  1,234 images/s  1:15 left"
    assert "loss not finite" in lines[2]
    assert len(lines) == 3


def test_progress_tells_utilisation_and_dollars_where_they_are_known() -> None:
    stream = io.StringIO()
    Progress(128, stream=stream).on_row(ROW | {"utilisation": 0.412, "dollars": 1234.5})
    assert stream.getvalue() == (
        "64 px  64 of 128 images  loss 0.5000  1,234 images/s  41% MFU  $1,234.50  1:15 left\n"
    )
    Progress(128, stream=stream).on_row(ROW | {"utilisation": None})
    assert "MFU" not in stream.getvalue().splitlines()[1] and "$" not in stream.getvalue().splitlines()[1]


def test_progress_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(128, stream=stream)
    progress.on_row(ROW)
    progress.close()
    assert "1,234 images/s" in stream.getvalue()


def test_costs_count_every_device_and_go_on_after_a_resume(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an hour on one device at 2 dollars; a kill; a row that will be dropped; 15 minutes on four at 3 dollars."""
    now, devices, log = 0.0, 1, tmp_path / "log.jsonl"
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now)
    monkeypatch.setattr(hooks, "device_count", lambda: devices)
    state = first_state(recipe, downscale=8, device=torch.device("cpu"))
    moment = Moment(recipe.stages[0], before=0, after=8, stage_ends=False)
    first = Costs(log, price=2.0)
    now = 1800.0
    row = first.after_step(state, moment)
    assert row == pytest.approx({"device_hours": 0.5, "dollars": 1.0})
    log.write_text(json.dumps({"images": 8, "device_hours": 0.25, "dollars": 0.5}) + "\n" + json.dumps(row) + "\n")
    now, devices = 100_000.0, 4
    second = Costs(log, price=3.0)
    now += 900.0
    assert second.after_step(state, moment) == pytest.approx({"device_hours": 1.5, "dollars": 4.0})
    assert Costs(log, price=None).after_step(state, moment) == {"device_hours": 0.5}


class FakeWandB(ModuleType):
    """Notes how it is called."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **named: Any) -> "FakeWandB":
            self.calls.append((name, named or arguments))
            return self

        return call


def test_wandb_gets_numbers_pictures_and_the_same_run_after_a_resume(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    picture = Image.new("RGB", (4, 4))
    for _ in range(2):
        board = WandB("emoji", tmp_path, recipe=recipe)
        assert not fake.calls or fake.calls[-1][0] == "finish"  # nothing is opened before there is something to say
        board.on_row(ROW | {"loss/level_0": None})
        board.add_image(picture, 64)
        board.close()
    names = [name for name, _ in fake.calls]
    assert names == ["init", "define_metric", "log", "Image", "log", "finish"] * 2
    first, second = (arguments for name, arguments in fake.calls if name == "init")
    assert first == second
    assert first["id"] == (tmp_path / "wandb-id").read_text() and first["resume"] == "allow"
    assert (first["project"], first["name"], first["dir"]) == ("emoji", tmp_path.name, str(tmp_path))
    assert Recipe.from_json(json.dumps(first["config"])) == recipe
    assert fake.calls[1][1] == {"step_metric": "images"}
    assert fake.calls[2][1] == (ROW,)
    assert fake.calls[3][1] == (picture,)
    assert fake.calls[4][1] == ({"images": 64, "samples": fake},)


def test_wandb_without_a_row_opens_nothing(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    WandB("emoji", tmp_path, recipe=recipe).close()
    assert not fake.calls and not list(tmp_path.iterdir())


def test_wandb_without_its_package(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'micro-diffusion\[wandb\]'"):
        WandB("emoji", tmp_path, recipe=recipe)


def test_tensorboard_has_numbers_and_pictures(recipe: Recipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    board.on_row(ROW)
    board.add_image(Image.new("RGB", (4, 4)), 64)
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("loss")[0].step == 64
    assert events.Tags()["images"] == ["samples"]
    assert "seconds" not in events.Tags()["scalars"]


def test_tensorboard_hides_what_training_goes_back_over(recipe: Recipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    for images, loss in ((64, 1.0), (128, 9.0), (192, 9.0), (128, 0.5), (192, 0.25)):
        board.on_row(ROW | {"images": images, "loss": loss})
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(64, 1.0), (128, 0.5), (192, 0.25)]


def test_samples_are_drawn_at_their_interval(recipe: Recipe, tmp_path: Path) -> None:
    state = first_state(recipe, downscale=8, device=torch.device("cpu"))
    drawn, shown = [], []

    class Board(Hook):
        def add_image(self, image: Image.Image, images: int) -> None:
            shown.append(images)

    def draw(dit: torch.nn.Module) -> Image.Image:
        drawn.append(dit)
        return Image.new("RGB", (4, 4))

    samples = Samples(draw, tmp_path, every=16, boards=[Board(), Board()])
    for after in (8, 16, 24, 32):
        samples.after_step(state, Moment(recipe.stages[0], before=after - 8, after=after, stage_ends=False))
    assert drawn == [state.shown] * 2
    assert shown == [16, 16, 32, 32]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000016.png", "000000032.png"]


def test_validation_does_not_depend_on_the_split_into_batches(recipe: Recipe, loaders: dict[int, Loader]) -> None:
    state = first_state(recipe, downscale=8, device=torch.device("cpu"))
    results = []
    for micro_batch in (0, 2):
        stage = replace(recipe.stages[0], micro_batch=micro_batch)
        results.append(Validation(loaders, recipe).after_step(state, Moment(stage, before=0, after=8, stage_ends=True)))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert len(results[0]) == 9


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3675, "1:01:15")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_evaluation_scores_the_average_when_it_is_due(recipe: Recipe) -> None:
    state = first_state(recipe, downscale=8, device=torch.device("cpu"))
    asked = list[DiT]()

    def score(dit: DiT) -> dict[str, float]:
        asked.append(dit)
        return {"top-1": 0.25}

    hook, moment = Evaluation(score, every=24), Moment(recipe.stages[0], before=8, after=16, stage_ends=False)
    assert hook.after_step(state, moment) == {} and not asked
    assert hook.after_step(state, replace(moment, before=16, after=24)) == {"evaluation/top-1": 0.25}
    state.ema = follow(None, state.dit, replace(recipe.stages[0], ema_halflife_images=8), images=8)
    hook.after_step(state, replace(moment, stage_ends=True))
    assert state.ema is not None and asked == [state.dit, state.ema.dit]
