"""What an evaluation leaves: results.json, report.html, and the comparison of two."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from micro_diffusion.evaluation.generate import GENERATION
from micro_diffusion.evaluation.pictures import PictureFolder, Scores
from micro_diffusion.runtime import report
from micro_diffusion.runtime.files import UserError, write_atomic
from micro_diffusion.runtime.parse import read_json

RESULTS, REPORT, COMPARISON = "results.json", "report.html", "compare.html"
SHOWN = 6  # pictures in a row
T = TypeVar("T")


class Point(NamedTuple):
    """A folder of pictures, and what each metric says of it."""

    pictures: PictureFolder
    scores: Mapping[str, Scores]

    @property
    def made(self) -> dict[str, Any]:
        """How the pictures were drawn, if that is known."""
        file = self.pictures.path / GENERATION
        return read_json(file.read_text(), str(file)) if file.is_file() else {}


def write_report(out: Path, points: Mapping[str, Point]) -> None:
    """Write results.json and report.html of points that the same metrics scored, such as those of a guidance sweep."""
    results, sections, first = {}, {}, next(iter(points.values()))
    for name in first.scores:
        scored = [point.scores[name] for point in points.values()]
        rows = {key: [f"{of.numbers[key]:.4g}" for of in scored] for key in scored[0].numbers}
        warned = [f"Not comparable: {warning}" for of in scored for warning in of.warnings]
        said = dict.fromkeys([*(of.protocol for of in scored), *warned])
        sections[name] = report.table(list(points), rows) + "".join(map(report.paragraph, said))
    if len(points) > 1:
        sections["Guidance"] = _curves(list(points.values()))
    for label, point in points.items():
        scores = {name: dict(vars(scores)) for name, scores in point.scores.items()}
        for told in scores.values():
            del told["true"]  # pictures
        results[label] = {"pictures": os.path.relpath(point.pictures.path, out), "made": point.made, "scores": scores}
        sections[f"Pictures, {label}"] = _examples(point) + report.facts(point.made)
    lead = f"Pictures of {first.made.get('model', 'a folder')}."
    write_atomic(out / RESULTS, json.dumps(results, indent=1) + "\n")
    write_atomic(out / REPORT, report.html_page("Evaluation", lead, sections))


def _curves(points: Sequence[Point]) -> str:
    """The first number over guidance, and FID over CLIP score where both are there."""
    titles = {"guidance": "guidance"} | {name: next(iter(of.numbers)) for name, of in points[0].scores.items()}
    swept, body = list[dict[str, float]](), ""
    for point in sorted(points, key=lambda point: float(point.made["guidance"])):
        numbers = {name: scores.numbers[titles[name]] for name, scores in point.scores.items()}
        swept.append({"guidance": point.made["guidance"], **numbers})
    for x, y in (("guidance", list(titles)[1]), ("clip-score", "fid")):
        if x in titles and y in titles:
            line, marks = [(each[x], each[y]) for each in swept], [(each[x], f"{each['guidance']:g}") for each in swept]
            title = f"{titles[y]} over {titles[x]}"
            svg = report.curve_svg({titles[y]: line}, title=title, x_label=titles[x], y_label=titles[y], marks=marks)
            body += report.figure(svg, alt=title, caption="Marked by guidance; the same prompts and noise at each.")
    return body


def _examples(point: Point) -> str:
    """The best, median and worst pictures by the first score that tells of each; without one, some of all."""
    pictures, count, scores = point.pictures, len(point.pictures), point.scores.values()
    texts = [prompt.text for prompt in pictures.prompts] if pictures.prompts else [""] * count
    notes = next((each.notes for each in scores if each.notes), [""] * count)
    true = next((each.true for each in scores if each.true), None)
    name, values = next((pair for each in scores for pair in each.each.items()), ("", None))
    groups, shown = {"Some of all": _spread(range(count))}, min(SHOWN, math.ceil(count / 3))
    if values is not None:
        order = sorted(range(count), key=lambda index: (-values[index], index * 0.618 % 1))  # equal ones: spread
        starts = {"Best": 0, "Median": (count - shown) // 2, "Worst": count - shown}
        groups = {f"{kind} by {name}": order[start : start + shown] for kind, start in starts.items()}
    body = ""
    for title, chosen in groups.items():
        said = [f"{texts[i]} {f'({values[i]:.3g})' if values else ''} {notes[i]}" for i in chosen]
        drawn = [pictures[i] for i in chosen]
        if true:
            sheet = report.pairs_grid(drawn, [true[i] for i in chosen], said, columns=3)
        else:
            sheet = report.grid(drawn, said, columns=SHOWN)
        body += report.figure(sheet, alt=f"Pictures with their prompts: {title}", caption=title)
    return body


def read_results(place: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the content of results.json there."""
    file = place / RESULTS if place.is_dir() else place
    if not file.is_file():
        raise UserError(f"There is no {RESULTS} in {place}; give a folder that evaluate wrote.")
    return file.parent, read_json(file.read_text(), str(file))


def compare(first: Path, second: Path, out: Path) -> dict[str, list[str]]:
    """Write compare.html: numbers of two evaluations, with their differences, and pictures of the same prompts.

    Points are paired by name, or as they are where each side has one. Returns the rows of the table of numbers.
    """
    (here, a), (there, b) = (read_results(place) for place in (first, second))
    pairs = [(label, a[label], b[label]) for label in a if label in b]
    if len(a) == len(b) == 1:
        pairs = [("both", *a.values(), *b.values())]
    rows, said, body, heads = dict[str, list[str]](), list[str](), "", [str(first), str(second)]
    for label, one, other in pairs:
        for name in [name for name in one["scores"] if name in other["scores"]]:
            left, right = (point["scores"][name] for point in (one, other))
            for key in [key for key in left["numbers"] if key in right["numbers"]]:
                x, y = left["numbers"][key], right["numbers"][key]
                rows[f"{label}, {key}"] = [f"{x:.4g}", f"{y:.4g}", f"{y - x:+.4g}"]
            if left["protocol"] != right["protocol"]:
                said.append(f"{name} was not measured in the same way: {left['protocol']}; {right['protocol']}")
        folders = [PictureFolder(root / point["pictures"]) for root, point in ((here, one), (there, other))]
        found = [{prompt[:2]: index for index, prompt in enumerate(folder.prompts or ())} for folder in folders]
        if shared := _spread([key for key in found[0] if key in found[1]]):
            drawn = [[folder[at[key]] for key in shared] for folder, at in zip(folders, found, strict=True)]
            sheet = report.table_grid(drawn, heads, [key[0] for key in shared])
            body += report.figure(sheet, alt="A row for each side", caption=f"The same prompts and noise ({label})")
    if not rows:
        raise UserError(f"{first} and {second} have no number in common: evaluate both in the same way.")
    numbers = report.table([*heads, "difference"], rows) + "".join(map(report.paragraph, said))
    sections = {"Numbers": numbers, "Pictures": body}
    write_atomic(out / COMPARISON, report.html_page("Comparison", "Two evaluations side by side.", sections))
    return rows


def _spread(of: Sequence[T]) -> list[T]:
    """At most `SHOWN` of them, evenly spread."""
    return [of[index * len(of) // min(SHOWN, len(of))] for index in range(min(SHOWN, len(of)))]
