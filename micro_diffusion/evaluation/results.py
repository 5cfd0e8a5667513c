"""What an evaluation leaves: results.json, report.html, and the comparison of two."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from micro_diffusion.evaluation.generate import GENERATION
from micro_diffusion.evaluation.pictures import PictureFolder, Scores
from micro_diffusion.runtime.files import UserError, write_atomic
from micro_diffusion.runtime.parse import read_json
from micro_diffusion.runtime.report import curve_svg, facts, figure, grid, html_page, paragraph, table, table_grid

RESULTS, REPORT, COMPARISON = "results.json", "report.html", "compare.html"
SHOWN = 6  # pictures in a row


class Point(NamedTuple):
    """A folder of pictures, and what each metric says of it."""

    pictures: PictureFolder
    scores: Mapping[str, Scores]

    @property
    def made(self) -> dict[str, Any]:
        """How the pictures were drawn, if that is known."""
        file = self.pictures.path / GENERATION
        return read_json(file.read_text(), str(file)) if file.is_file() else {}

    @property
    def numbers(self) -> dict[str, float]:
        return {name: value for scores in self.scores.values() for name, value in scores.numbers.items()}


def write_report(out: Path, points: Mapping[str, Point]) -> None:
    """Write results.json and report.html of points that the same metrics scored, such as those of a guidance sweep."""
    out.mkdir(parents=True, exist_ok=True)
    results = {
        label: {
            "pictures": os.path.relpath(point.pictures.path, out), "made": point.made,
            "scores": {name: asdict(scores) for name, scores in point.scores.items()},
        }
        for label, point in points.items()
    }  # fmt: skip
    sections = {}
    for name in next(iter(points.values())).scores:
        scored = [point.scores[name] for point in points.values()]
        rows = {key: [f"{each.numbers[key]:.4g}" for each in scored] for key in scored[0].numbers}
        warned = [f"Not comparable: {warning}" for each in scored for warning in each.warnings]
        said = dict.fromkeys([*(each.protocol for each in scored), *warned])
        sections[name] = table(list(points), rows) + "".join(map(paragraph, said))
    swept = {point.made["guidance"]: point.numbers for point in points.values() if "guidance" in point.made}
    if len(swept) > 1:
        sections["Guidance"] = _curves(swept)
    for label, point in points.items():
        sections[f"Pictures, {label}"] = _examples(point) + facts(point.made)
    page = html_page(
        "Evaluation", f"Pictures of {next(iter(points.values())).made.get('model', 'a folder')}.", sections
    )
    write_atomic(out / RESULTS, json.dumps(results, indent=1) + "\n")
    write_atomic(out / REPORT, page)


def _curves(swept: Mapping[float, Mapping[str, float]]) -> str:
    """The first number over guidance, and FID over CLIP score where both are there."""
    first = next(iter(next(iter(swept.values()))))
    swept = dict(sorted(swept.items()))
    by_guidance = [(guidance, numbers[first]) for guidance, numbers in swept.items()]
    svg = curve_svg({first: by_guidance}, title=f"{first} by guidance", x_label="guidance", y_label=first)
    body = figure(svg, alt=f"{first} over guidance", caption="The same prompts and noise at each guidance.")
    if all({"FID", "CLIP score"} <= numbers.keys() for numbers in swept.values()):
        pairs = [(numbers["CLIP score"], numbers["FID"]) for numbers in swept.values()]
        marks = [(numbers["CLIP score"], f"{guidance:g}") for guidance, numbers in swept.items()]
        title = "FID against CLIP score"
        svg = curve_svg({"by guidance": pairs}, title=title, x_label="CLIP score", y_label="FID", marks=marks)
        body += figure(svg, alt=title, caption="Each mark is a guidance: low FID and high CLIP score are better.")
    return body


def _examples(point: Point) -> str:
    """The best, median and worst pictures by the first score that tells of each; without one, some of all."""
    pictures, count = point.pictures, len(point.pictures)
    notes = next((scores.notes for scores in point.scores.values() if scores.notes), [""] * count)
    texts = [prompt.text for prompt in pictures.prompts] if pictures.prompts else [""] * count
    found = [(name, values) for scores in point.scores.values() for name, values in scores.each.items()]
    some, shown = min(SHOWN, count), min(SHOWN, math.ceil(count / 3))
    groups, values = {"Some of all": [index * count // some for index in range(some)]}, None
    if found:
        name, values = found[0]
        order = sorted(range(count), key=lambda index: (-found[0][1][index], index * 0.618 % 1))  # ties: spread
        starts = {"Best": 0, "Median": (count - shown) // 2, "Worst": count - shown}
        groups = {f"{kind} by {name}": order[start : start + shown] for kind, start in starts.items()}
    body = ""
    for title, chosen in groups.items():
        said = [f"{texts[i]} {f'({values[i]:.3g}) ' if values else ''}{notes[i]}" for i in chosen]
        drawn = grid([pictures[i] for i in chosen], said, columns=SHOWN)
        body += figure(drawn, alt=f"Pictures with their prompts: {title}", caption=title)
    return body


def read_results(place: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the content of results.json there."""
    file = place / RESULTS if place.is_dir() else place
    if not file.is_file():
        raise UserError(f"There is no {RESULTS} in {place}; give a folder that evaluate wrote.")
    return file.parent, read_json(file.read_text(), str(file))


def compare(first: Path, second: Path, out: Path) -> dict[str, tuple[float, float]]:
    """Write compare.html with the numbers of two evaluations, their differences and pictures of the same prompts.

    Points are paired by their name, or as they are where each side has one. Returns the numbers.
    """
    (here, a), (there, b) = (read_results(place) for place in (first, second))
    pairs = [(label, a[label], b[label]) for label in a if label in b]
    if len(a) == len(b) == 1:
        pairs = [("", *a.values(), *b.values())]
    numbers, said, sections = dict[str, tuple[float, float]](), list[str](), dict[str, str]()
    for label, one, other in pairs:
        for name in one["scores"].keys() & other["scores"].keys():
            left, right = (point["scores"][name] for point in (one, other))
            numbers |= {
                f"{key} {label}".strip(): (value, right["numbers"][key])
                for key, value in left["numbers"].items() if key in right["numbers"]
            }  # fmt: skip
            if left["protocol"] != right["protocol"]:
                said.append(f"{name} was not measured in the same way: {left['protocol']}; {right['protocol']}.")
        folders = [PictureFolder(root / point["pictures"]) for root, point in ((here, one), (there, other))]
        indices = [{tuple(p[:2]): i for i, p in enumerate(folder.prompts or [])} for folder in folders]
        if shared := [key for key in indices[0] if key in indices[1]]:
            keys = [shared[i * len(shared) // min(SHOWN, len(shared))] for i in range(min(SHOWN, len(shared)))]
            rows = [[folder[index[key]] for key in keys] for folder, index in zip(folders, indices, strict=True)]
            sheet = table_grid(rows, [str(first), str(second)], [str(key[0]) for key in keys])
            sections[f"The same prompts and noise {label}".strip()] = figure(
                sheet,
                alt="Pictures of the same prompts, a row for each side",
                caption="Above the first, below the second.",
            )
    if not numbers:
        raise UserError(f"{first} and {second} have no number in common: evaluate both in the same way.")
    cells = {name: [f"{x:.4g}", f"{y:.4g}", f"{y - x:+.4g}"] for name, (x, y) in numbers.items()}
    body = table([str(first), str(second), "difference"], cells) + "".join(map(paragraph, said))
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(
        out / COMPARISON, html_page("Comparison", "Two evaluations side by side.", {"Numbers": body, **sections})
    )
    return numbers
