"""What watches a run: the progress line, TensorBoard, validation, sample grids."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from PIL import Image

from micro_diffusion.data.loader import Loader
from micro_diffusion.models.dit import DiT, conditioned
from micro_diffusion.runtime.random import draw_normal
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.stages import State

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from torch.utils.tensorboard import SummaryWriter

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Moment:
    """Where the clock stands after a step."""

    stage: Stage
    before: int  # images seen
    after: int
    stage_ends: bool

    def due(self, *intervals: int) -> bool:
        """Whether this step ended the stage or crossed a multiple of an interval; 0 is no interval."""
        return self.stage_ends or any(self.before // every != self.after // every for every in intervals if every)


class Hook:
    """Does nothing; a hook overrides what it needs."""

    def after_step(self, state: State, moment: Moment) -> Row:
        """Called after a step that crosses one of the recipe's intervals; the numbers returned go into the log."""
        return {}

    def on_row(self, row: Row) -> None:
        """Called with each row of the log."""

    def close(self) -> None:
        """Called once, at the end or on an error."""


class Progress(Hook):
    """A line with stage, images/s, loss and time left: redrawn on a terminal, else printed at most every `seconds`."""

    def __init__(self, images: int, *, stream: TextIO | None = None, seconds: float = 10.0) -> None:
        self.images, self.stream, self.seconds = images, stream or sys.stderr, seconds
        self._bar: Bar | None = None
        self._printed = float("-inf")

    def on_row(self, row: Row) -> None:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        left = format_seconds(row["seconds_left"])
        text = f"{row['stage']}  {row['images_per_second']:,.0f} images/s  loss {loss}  {left} left"
        if self.stream.isatty():
            self._redraw(text, row["images"])
        elif row["seconds"] - self._printed >= self.seconds or row["images"] == self.images:
            self._printed = row["seconds"]
            self.stream.write(f"{row['images']:,} of {self.images:,} images  {text}\n")
            self.stream.flush()

    def _redraw(self, text: str, images: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("{task.description}")
            self._bar = Bar(*columns, console=Console(file=self.stream))
            self._bar.add_task("", total=self.images)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=images, description=text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class TensorBoard(Hook):
    """Every number of the log, by images seen, and the pictures that `Samples` draws."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None

    def writer(self, images: int) -> "SummaryWriter":
        """The writer; opened at the first use, which hides what an interrupted run wrote past `images`."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=images)
        return self._writer

    def on_row(self, row: Row) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("images", "seconds", "seconds_left"):
                self.writer(row["images"]).add_scalar(name, value, row["images"])

    def add_image(self, image: Image.Image, images: int) -> None:
        self.writer(images).add_image("samples", np.asarray(image.convert("RGB")), images, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Samples(Hook):
    """Draws a picture with `draw` every `every` images and at the end of each stage, as samples/000001024.png."""

    def __init__(
        self, draw: Callable[[DiT], Image.Image], folder: Path, *, every: int, board: TensorBoard | None = None
    ) -> None:
        self.draw, self.folder, self.every, self.board = draw, folder, every, board

    @torch.no_grad()
    def after_step(self, state: State, moment: Moment) -> Row:
        if moment.due(self.every):
            image = self.draw(state.shown)
            self.folder.mkdir(parents=True, exist_ok=True)
            image.save(self.folder / f"{moment.after:09d}.png")
            if self.board:
                self.board.add_image(image, moment.after)
        return {}


class Validation(Hook):
    """Loss without mask on up to 256 held-out rows, at 8 fixed noise levels with fixed noise, and its mean.

    The levels are the midpoints of the eight equally likely parts of the stage's noise distribution, so that the mean
    estimates the stage's own unmasked loss.
    """

    LEVELS = 8
    ROWS = 256

    def __init__(self, loaders: Mapping[int, Loader], recipe: Recipe) -> None:
        self.loaders, self.recipe = loaders, recipe

    @torch.no_grad()
    def after_step(self, state: State, moment: Moment) -> Row:
        if not moment.due(self.recipe.validate_every):
            return {}
        loader, stage = self.loaders[moment.stage.resolution], moment.stage
        rows = np.linspace(0, len(loader) - 1, min(self.ROWS, len(loader))).round().astype(int).tolist()
        size = stage.micro_batch or stage.batch_size
        losses = torch.zeros(self.LEVELS, dtype=torch.float64)
        for start in range(0, len(rows), size):
            losses += self._losses(state.shown, loader, rows[start : start + size], stage)
        losses /= len(rows)
        levels = {f"validation/level_{index}": value for index, value in enumerate(losses.tolist())}
        return {"validation": losses.mean().item(), **levels}

    def _losses(self, dit: DiT, loader: Loader, rows: list[int], stage: Stage) -> torch.Tensor:
        """Sum over the rows of the loss at each level."""
        objective = self.recipe.make_objective(stage)
        batch = loader.rows(rows)
        device = next(dit.parameters()).device
        latents = batch.latents.to(device)
        network = conditioned(dit, batch.text.to(device), batch.text_mask.to(device), precision=self.recipe.precision)
        quantiles = torch.special.ndtri((torch.arange(self.LEVELS, dtype=torch.float64) + 0.5) / self.LEVELS).float()
        sums = []
        for index, quantile in enumerate(quantiles):
            positions = torch.tensor(rows) * self.LEVELS + index
            noise = draw_normal(self.recipe.seed, "validation-noise", positions, tuple(latents.shape[1:])).to(device)
            level = objective.noise_level(quantile.expand(len(rows))).to(device)
            loss = objective.loss(network, latents, level, noise, patch_size=self.recipe.model.patch_size)
            sums.append(loss.per_image.double().sum())
        return torch.stack(sums).cpu()


def format_seconds(seconds: float) -> str:
    """`75` as `1:15`, `3675` as `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
