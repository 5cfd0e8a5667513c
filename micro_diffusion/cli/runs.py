"""`micro-diffusion runs`: what runs are there, how far they are, and in what they differ."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from tyro.conf import Positional, arg

from micro_diffusion.runtime.files import UserError, write_atomic

if TYPE_CHECKING:
    from rich.table import Table

    from micro_diffusion.training.config import Recipe

COLUMNS = ("run", "recipe", "stage", "images", "loss", "validation", "images/s", "device-hours", "dollars", "state")


class Run(NamedTuple):
    """A run folder as it was read."""

    name: str
    recipe: "Recipe"
    rows: list[dict[str, Any]]
    finished: bool

    def last(self, key: str, form: str) -> str:
        """The newest number of that name."""
        return next((format(row[key], form) for row in reversed(self.rows) if row.get(key) is not None), "")


@dataclass(frozen=True)
class Runs:
    """List runs, mark in which settings they differ, and plot their losses."""

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="FOLDER ...")]
    """Run folders, or folders that hold some."""
    plot: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also draw the curves of the loss, into a file that ends in .html, .svg or .png."""

    def __call__(self) -> None:
        from rich.console import Console

        if self.plot and self.plot.suffix not in (".html", ".svg", ".png"):
            raise UserError(f"--plot {self.plot}: name a file that ends in .html, .svg or .png.")
        runs, wrong = [], []
        for folder in [run for folder in self.folders for run in found(folder)]:
            try:
                runs.append(read_run(folder))
            except UserError as error:
                wrong.append(str(error))
        console = Console(width=None if sys.stdout.isatty() else 160)
        for table in tables(runs) if runs else ():
            console.print(table)
        if self.plot and runs:
            write_atomic(self.plot, drawn(runs, self.plot.suffix))
            print(f"{self.plot}: the losses of {len(runs)} runs")
        if wrong:
            raise UserError("\n".join(wrong))


def found(folder: Path) -> list[Path]:
    """The folder, if it is a run, or the runs in it; UserError if there are none."""
    runs = [folder] if (folder / "recipe.json").is_file() else [file.parent for file in folder.glob("*/recipe.json")]
    if not runs:
        raise UserError(f"{folder} holds no run: name what was given to train --run, or the folder around it.")
    return sorted(runs)


def read_run(folder: Path) -> Run:
    """Recipe and log of a run; UserError names the file that is damaged."""
    from micro_diffusion.runtime.log import read_log
    from micro_diffusion.training.config import Recipe

    try:
        recipe, rows = Recipe.from_json((folder / "recipe.json").read_text()), read_log(folder / "log.jsonl")
        seen = [row["images"] for row in rows]
    except (UserError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} is damaged or not a run of this version ({error}).") from error
    return Run(str(folder), recipe, rows, seen[-1:] == [recipe.images] and (folder / "model").is_dir())


def tables(runs: Sequence[Run]) -> "list[Table]":
    """The runs, and a table of the settings in which they differ, if they do."""
    from rich.table import Table

    from micro_diffusion.training.config import flat

    listed = Table(*COLUMNS)
    for run in runs:
        images = f"{run.last('images', ',') or 0} of {run.recipe.images:,}"
        numbers = (("loss", ".4f"), ("validation", ".4f"), ("images_per_second", ",.0f"), ("device_hours", ",.2f"))
        shown = [run.last(key, form) for key, form in (*numbers, ("dollars", ",.2f"))]
        state = "finished" if run.finished else "unfinished"
        listed.add_row(run.name, run.recipe.name, run.last("stage", ""), images, *shown, state)
    settings = [flat(run.recipe) for run in runs]
    differing = Table("settings that differ", *(run.name for run in runs))
    for key in dict.fromkeys(key for each in settings for key in each):
        values = [str(each.get(key, "")) for each in settings]
        if len(set(values)) > 1:
            differing.add_row(key, *values)
    return [listed, differing] if differing.row_count else [listed]


def drawn(runs: Sequence[Run], suffix: str) -> bytes | str:
    """The curves of the training loss, on a page with those of the validation loss."""
    from micro_diffusion.runtime.report import curve_png, curve_svg, figure, html_page, png_bytes

    def curve(key: str, title: str) -> str:
        points = {run.name: [(row["images"], row[key]) for row in run.rows if row.get(key)] for run in runs}
        return curve_svg(points, title=title, x_label="images seen", y_label="loss (log scale)", log_y=True)

    if not any(row.get("loss") for run in runs for row in run.rows):
        raise UserError("There is nothing to plot yet: no run has logged a loss.")
    loss = curve("loss", "Training loss")
    if suffix != ".html":
        return loss if suffix == ".svg" else png_bytes(curve_png(loss))
    sections = {"Training loss": figure(loss, alt="Training loss over images seen", caption="Of each run's log.")}
    if any(row.get("validation") for run in runs for row in run.rows):
        validation = curve("validation", "Validation loss")
        sections["Validation loss"] = figure(validation, alt="Validation loss", caption="Without mask, at fixed noise.")
    return html_page("Runs", ", ".join(run.name for run in runs), sections)
