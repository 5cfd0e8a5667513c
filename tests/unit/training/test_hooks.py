import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from micro_diffusion.data.loader import Loader
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.hooks import Moment, Progress, Samples, TensorBoard, Validation, format_seconds
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
    assert lines[0] == "64 of 128 images  64 px  1,234 images/s  loss 0.5000  1:15 left"
    assert len(lines) == 3


def test_progress_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(128, stream=stream)
    progress.on_row(ROW)
    progress.close()
    assert "1,234 images/s" in stream.getvalue()


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


def test_samples_are_drawn_at_their_interval(recipe: Recipe, tmp_path: Path) -> None:
    state = first_state(recipe, downscale=8, device=torch.device("cpu"))
    drawn = []

    def draw(dit: torch.nn.Module) -> Image.Image:
        drawn.append(dit)
        return Image.new("RGB", (4, 4))

    samples = Samples(draw, tmp_path, every=16)
    for after in (8, 16, 24, 32):
        samples.after_step(state, Moment(recipe.stages[0], before=after - 8, after=after, stage_ends=False))
    assert drawn == [state.shown] * 2
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
