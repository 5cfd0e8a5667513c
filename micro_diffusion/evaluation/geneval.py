"""GenEval (arXiv 2310.11513): does a picture show the objects, counts, colours and places that its prompt asks for?

Thresholds and logic are those of the authors' evaluate_images.py (github.com/djghosh13/geneval).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from jaxtyping import Bool
from torch import Tensor

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
MOST = 16  # objects of a class that are looked at
SLACK = 0.1  # of the sizes of two boxes: how far apart their centres may be without one lying beside the other

Box = tuple[float, float, float, float]


class Detection(NamedTuple):
    """An object that a detector found in a picture."""

    label: str
    box: Box  # left, top, right, bottom in pixels
    score: float = 1.0
    colour: str | None = None  # filled in where the task asks for colours
    mask: Bool[Tensor, "h w"] | None = None  # its pixels in the picture, where the detector says so


class Verdict(NamedTuple):
    """Whether a picture shows what its prompt asks for, and if not, why."""

    correct: bool
    reason: str


def verdict(
    truth: Mapping[str, Any],
    found: Sequence[Detection],
    *,
    colour_of: Callable[[Detection], str | None] | None = None,
) -> Verdict:
    """Whether what was `found` in a picture is all that `truth` (the benchmark's metadata) includes and nothing it excludes.

    Of each class the surest objects over the confidence are looked at; boxes at the same place are not merged, as the
    benchmark's limit of overlap is 1. Colour and place are asked of the surest `count` only.
    """
    least = COUNTING_CONFIDENCE if truth["tag"] == "counting" else CONFIDENCE
    kept = sorted((each for each in found if each.score > least), key=attrgetter("score"), reverse=True)
    objects = {name: [each for each in kept if each.label == name][:MOST] for name in {each.label for each in kept}}
    groups: list[Sequence[Detection]] = []  # for each clause the objects that fulfil it; none if they do not
    faults = []
    for wanted in truth.get("include", []):
        group = objects.get(wanted["class"], [])[: wanted["count"]]
        if fault := _fault(wanted, group, groups, colour_of or attrgetter("colour")):
            faults.append(fault)
        groups.append([] if fault else group)
    for unwanted in truth.get("exclude", []):
        if (count := len(objects.get(unwanted["class"], []))) >= unwanted["count"]:
            faults.append(f"expected fewer than {unwanted['count']} {unwanted['class']}, found {count}")
    return Verdict(not faults, "; ".join(faults))


def _fault(
    wanted: Mapping[str, Any],
    group: Sequence[Detection],
    earlier: Sequence[Sequence[Detection]],
    colour_of: Callable[[Detection], str | None],
) -> str:
    """What keeps `group` from being what a clause wants, or nothing."""
    name, count = wanted["class"], wanted["count"]
    if len(group) < count:
        return f"expected {count} {name}, found {len(group)}"
    if colour := wanted.get("color"):
        colours = [colour_of(each) for each in group]
        if colours.count(colour) < count:
            return f"expected {colour} {name}, found {', '.join(each or 'no colour' for each in colours)}"
    relation, target = wanted.get("position", ("", 0))
    if relation and not earlier[target]:
        return f"nothing for {name} to be {relation}"
    for each, other in itertools.product(group, earlier[target] if relation else ()):
        if relation not in (seen := relative_position(each.box, other.box)):
            return f"expected {name} {relation} {other.label}, found {' and '.join(sorted(seen)) or 'no clear side'}"
    return ""


def relative_position(box: Box, other: Box) -> set[str]:
    """On which sides of the `other` box a box lies: of the distance between centres, what exceeds `SLACK` of the sizes.

    That must be more than half of the whole distance along an axis, so there are at most two sides, and often none.
    """
    offsets = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    slack = [SLACK * (abs(box[i + 2] - box[i]) + abs(other[i + 2] - other[i])) for i in (0, 1)]
    beyond = [max(abs(offset) - least, 0.0) for offset, least in zip(offsets, slack, strict=True)]
    if max(beyond) < 1e-3:
        return set()
    dx, dy = (math.copysign(b, o) / math.hypot(*offsets) for b, o in zip(beyond, offsets, strict=True))
    return {name for name, share in zip(RELATIONS, (-dx, dx, -dy, dy), strict=True) if share > 0.5}


def task_scores(truths: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of right pictures by task, in the order of `TASKS`, and "overall": the mean of the tasks that are there."""
    right: dict[str, list[bool]] = {}
    for truth, each in zip(truths, verdicts, strict=True):
        right.setdefault(truth["tag"], []).append(each.correct)
    scores = {task: sum(right[task]) / len(right[task]) for task in sorted(right, key=TASKS.index)}
    return scores | {"overall": sum(scores.values()) / len(scores)}
