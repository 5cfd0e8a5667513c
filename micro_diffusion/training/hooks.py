"""What watches a run: costs, the progress line, TensorBoard, Weights & Biases, validation, sample grids."""

import json
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from PIL import Image

from micro_diffusion.data.loader import Loader
from micro_diffusion.models.dit import DiT, conditioned
from micro_diffusion.runtime.files import UserError, write_atomic
from micro_diffusion.runtime.hardware import device_count
from micro_diffusion.runtime.log import read_log
from micro_diffusion.runtime.random import draw_normal
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.meter import LEVELS
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

    def add_image(self, image: Image.Image, images: int) -> None:
        """Called with each picture that `Samples` draws."""

    def close(self) -> None:
        """Called once, at the end or on an error."""


class Costs(Hook):
    """Hours of all devices, and dollars at `price` for an hour of one; resumed, it goes on from what the log has."""

    def __init__(self, log: Path, *, price: float | None) -> None:
        self.price, self.since, rows = price, time.monotonic(), read_log(log)  # rows that will be dropped were paid too
        paid = ([row.get(name) or 0.0 for row in rows] for name in ("device_hours", "dollars"))
        self.hours, self.dollars = (max(each, default=0.0) for each in paid)

    def after_step(self, state: State, moment: Moment) -> Row:
        hours = (time.monotonic() - self.since) / 3600 * device_count()
        dollars = {"dollars": self.dollars + hours * self.price} if self.price else {}
        return {"device_hours": self.hours + hours, **dollars}


class Progress(Hook):
    """A line with stage, images, loss, speed, part of the devices' peak, dollars and time left, where they are known.

    It is redrawn on a terminal, and else printed at most every `seconds`.
    """

    def __init__(self, images: int, *, stream: TextIO | None = None, seconds: float = 10.0) -> None:
        self.images, self.stream, self.seconds = images, stream or sys.stderr, seconds
        self._bar: Bar | None = None
        self._printed = float("-inf")

    def on_row(self, row: Row) -> None:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        text = f"{row['stage']}  {row['images']:,} of {self.images:,} images  loss {loss}"
        text += f"  {row['images_per_second']:,.0f} images/s"
        text += f"  {row['utilisation']:.0%} MFU" if row.get("utilisation") is not None else ""
        text += f"  ${row['dollars']:,.2f}" if "dollars" in row else ""
        text += f"  {format_seconds(row['seconds_left'])} left"
        if self.stream.isatty():
            self._redraw(text, row["images"])
        elif row["seconds"] - self._printed >= self.seconds or row["images"] == self.images:
            self._printed = row["seconds"]
            self.stream.write(f"{text}\n")
            self.stream.flush()

    def _redraw(self, text: str, images: int) -> None:
        if self._bar is None:
            from rich import console, progress, table

            text_column = progress.TextColumn("{task.description}", table_column=table.Column())  # which may wrap
            columns = progress.BarColumn(bar_width=12), text_column
            self._bar = progress.Progress(*columns, console=console.Console(file=self.stream))
            self._bar.add_task("", total=self.images)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=images, description=text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class TensorBoard(Hook):
    """Every number of the log, by images seen, and the pictures that `Samples` draws."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._images = folder, 0
        self._writer: SummaryWriter | None = None

    def writer(self, images: int) -> "SummaryWriter":
        """The writer; opened anew where training goes back, which hides what was written past `images`."""
        if self._writer is None or images < self._images:
            from torch.utils.tensorboard import SummaryWriter

            self.close()
            self._writer = SummaryWriter(str(self.folder), purge_step=images)
        self._images = images
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


class WandB(Hook):
    """Every number of the log, by images seen, and the samples, as one run of a project at Weights & Biases.

    UserError without its package. Its id is kept in the run folder, so that a resumed run stays one run.
    """

    def __init__(self, project: str, folder: Path, *, recipe: Recipe) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb needs a package: pip install 'micro-diffusion[wandb]'") from error
        self.wandb, self.project, self.folder, self.recipe = wandb, project, folder, recipe
        self._run: Any = None

    def run(self) -> Any:
        """The run; opened at the first use, when its folder is there."""
        if self._run is None:
            if not (name := self.folder / "wandb-id").exists():
                write_atomic(name, secrets.token_hex(4))
            self._run = self.wandb.init(
                project=self.project, name=self.folder.name, id=name.read_text(), resume="allow", dir=str(self.folder),
                config=json.loads(self.recipe.to_json()),
            )  # fmt: skip
            self._run.define_metric("*", step_metric="images")  # its own steps cannot go back to a checkpoint
        return self._run

    def on_row(self, row: Row) -> None:
        self.run().log({name: value for name, value in row.items() if value is not None})

    def add_image(self, image: Image.Image, images: int) -> None:
        self.run().log({"images": images, "samples": self.wandb.Image(image)})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class Samples(Hook):
    """Draws a picture with `draw` every `every` images and at the end of each stage, as samples/000001024.png."""

    def __init__(self, draw: Callable[[DiT], Image.Image], folder: Path, *, every: int,
                 boards: Sequence[Hook] = ()) -> None:  # fmt: skip
        self.draw, self.folder, self.every, self.boards = draw, folder, every, boards

    @torch.no_grad()
    def after_step(self, state: State, moment: Moment) -> Row:
        if moment.due(self.every):
            image = self.draw(state.shown)
            self.folder.mkdir(parents=True, exist_ok=True)
            image.save(self.folder / f"{moment.after:09d}.png")
            for board in self.boards:
                board.add_image(image, moment.after)
        return {}


class Evaluation(Hook):
    """Logs the numbers that `score` gives of the weights, every `every` images and at the end of each stage."""

    def __init__(self, score: Callable[[DiT], Mapping[str, float]], *, every: int) -> None:
        self.score, self.every = score, every

    def after_step(self, state: State, moment: Moment) -> Row:
        numbers = self.score(state.shown) if moment.due(self.every) else {}
        return {f"evaluation/{name}": value for name, value in numbers.items()}


class Validation(Hook):
    """Loss without mask on up to 256 held-out rows, at 8 fixed noise levels with fixed noise, and its mean.

    The levels are the midpoints of the eight equally likely parts of the stage's noise distribution, so that the mean
    estimates the stage's own unmasked loss.
    """

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
        parts = (self._losses(state.shown, loader, rows[at : at + size], stage) for at in range(0, len(rows), size))
        losses = sum(parts, torch.zeros(LEVELS, dtype=torch.float64)) / len(rows)
        levels = {f"validation/level_{index}": value for index, value in enumerate(losses.tolist())}
        return {"validation": losses.mean().item(), **levels}

    def _losses(self, dit: DiT, loader: Loader, rows: list[int], stage: Stage) -> torch.Tensor:
        """Sum over the rows of the loss at each level."""
        objective, batch, device = self.recipe.make_objective(stage), loader.rows(rows), next(dit.parameters()).device
        latents = batch.latents.to(device)
        network = conditioned(dit, batch.text.to(device), batch.text_mask.to(device), precision=self.recipe.precision)
        quantiles = torch.special.ndtri((torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS).float()
        sums = []
        for index, quantile in enumerate(quantiles):
            positions = torch.tensor(rows) * LEVELS + index
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
