"""`micro-diffusion runs`: what runs are there, how far they are, and in what they differ."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from tyro.conf import Positional, arg

from micro_diffusion.runtime.files import UserError, user_error, write_atomic

if TYPE_CHECKING:
    from rich.table import Table

    from micro_diffusion.training.config import Recipe

NUMBERS = {"loss": ".4f", "validation": ".4f", "images_per_second": ",.0f", "device_hours": ",.2f", "dollars": ",.2f"}


class Run(NamedTuple):
    """A run folder as it was read."""

    name: str
    recipe: "Recipe"
    rows: list[dict[str, Any]]
    state: str

    def last(self, key: str, form: str) -> str:
        """The newest number of that name."""
        return next((format(row[key], form) for row in reversed(self.rows) if row.get(key) is not None), "")


@dataclass(frozen=True)
class Runs:
    """List runs, with the settings in which they differ, and plot their losses."""

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="FOLDER ...")]
    """Run folders, or folders that hold some."""
    plot: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also draw the curves of the training loss, into a file that ends in .html or .svg."""

    def __call__(self) -> None:
        from rich.console import Console

        if self.plot and self.plot.suffix not in (".html", ".svg"):
            raise UserError(f"--plot {self.plot}: name a file that ends in .html or .svg.")
        folders, runs, wrong = [run for folder in self.folders for run in found(folder)], [], []
        for folder in folders:
            alone = sum(folder.name == other.name for other in folders) == 1
            try:
                runs.append(read_run(folder, name=folder.name if alone else str(folder)))
            except UserError as error:
                wrong.append(str(error))
        if runs:
            Console(width=None if sys.stdout.isatty() else 160).print(*tables(runs))
        if runs and self.plot:
            write_atomic(self.plot, drawn(runs, self.plot.suffix))
        if wrong:
            raise UserError("\n".join(wrong))


def found(folder: Path) -> list[Path]:
    """The folder, if it is a run, or the runs in it; UserError if there are none."""
    runs = [folder] if (folder / "recipe.json").is_file() else [file.parent for file in folder.glob("*/recipe.json")]
    if not runs:
        raise UserError(f"{folder} holds no run: name what was given to train --run, or the folder around it.")
    return sorted(runs)


def read_run(folder: Path, *, name: str) -> Run:
    """Recipe and log of a run; UserError if they are damaged."""
    from micro_diffusion.runtime.log import read_log
    from micro_diffusion.training.config import Recipe

    damage = f"{folder} is damaged, or no run of this version ({{}})."
    with user_error(damage, UserError, ValueError, TypeError, KeyError):
        recipe, rows = Recipe.from_json((folder / "recipe.json").read_text()), read_log(folder / "log.jsonl")
        ended = [row["images"] for row in rows][-1:] == [recipe.images] and (folder / "model").is_dir()
    return Run(name, recipe, rows, "finished" if ended else "unfinished")


def tables(runs: Sequence[Run]) -> "list[Table]":
    """The runs, and the settings in which they differ, if they do."""
    from rich.table import Table

    from micro_diffusion.training.config import flat

    listed = Table("run", "recipe", "stage", "images", *(name.replace("_", " ") for name in NUMBERS), "state")
    for run in runs:
        images = f"{run.last('images', ',') or 0} of {run.recipe.images:,}"
        numbers = (run.last(key, form) for key, form in NUMBERS.items())
        listed.add_row(run.name, run.recipe.name, run.last("stage", ""), images, *numbers, run.state)
    settings, differing = [flat(run.recipe) for run in runs], Table("setting", *(run.name for run in runs))
    for key in dict.fromkeys(key for each in settings for key in each):
        values = [str(each.get(key, "")) for each in settings]
        if len(set(values)) > 1:
            differing.add_row(key, *values)
    return [listed, differing] if differing.row_count else [listed]


def drawn(runs: Sequence[Run], suffix: str) -> str:
    """The curves of the training loss."""
    from micro_diffusion.runtime.report import figure, html_page, loss_curve

    if not any(row.get("loss") for run in runs for row in run.rows):
        raise UserError("There is nothing to plot yet: no run has logged a loss.")
    svg = loss_curve({run.name: run.rows for run in runs})
    if suffix == ".svg":
        return svg
    shown = figure(svg, alt="Training loss over images seen", caption=", ".join(run.name for run in runs))
    return html_page("Runs", f"{len(runs)} runs side by side.", {"Training loss": shown})
