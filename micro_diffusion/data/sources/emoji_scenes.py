"""Scenes composed of embedded drawings, without end: the synthetic data beside the real drawings, with exact captions.

A scene has one to five objects of one or two concepts, maybe tinted, on a plain or shaded pale ground. Some pairs of
concepts, tinted concepts and counts of a concept are held out: no scene for training has one, nor a held-out drawing.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from micro_diffusion.data.records import Caption, Record, hash_share
from micro_diffusion.data.sources.emoji import drawing, emoji_table
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.random import derive_seed

NOUNS = """
    ghost robot skull dog fox cat sun unicorn elephant rabbit koala panda rooster penguin owl frog turtle snake whale
    octopus snail butterfly spider tulip cactus mushroom watermelon lemon banana pineapple pear carrot eggplant pizza
    croissant cookie lollipop volcano house castle tent rocket sailboat bus tractor bicycle anchor airplane umbrella
    snowflake balloon trophy basketball crown bell guitar drum key hammer bomb shield camera door star
"""
CONCEPTS = tuple(NOUNS.split())  # plain nouns without a colour, drawn by all seven hands
STYLES = ("noto", "noto-v1", "fluent-flat", "fluent-gradient", "fluent-3d", "twemoji", "emojione")
STYLE_WORDS = {style: style.replace("-", " ") for style in STYLES} | {"noto-v1": "old noto"}
COLOURS = {
    "red": (225, 25, 35), "orange": (255, 130, 0), "yellow": (250, 215, 0), "green": (30, 165, 50),
    "blue": (30, 90, 235), "purple": (125, 35, 185), "pink": (255, 120, 190), "grey": (130, 130, 130),
}  # fmt: skip
GROUNDS = {
    "white": (255, 255, 255), "pale grey": (226, 228, 232), "pale blue": (206, 226, 250), "pale green": (210, 240, 212),
    "pale yellow": (252, 246, 204), "pale pink": (252, 222, 230),
}  # fmt: skip
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = ("", "a", "two", "three", "four", "five")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
EDGE, HELD_OUT = 128, 0.1  # pixels of a scene; the share of compositions held out
SIZES = {1: (52, 100), 2: (42, 62), 3: (36, 50), 4: (32, 44), 5: (30, 40)}  # pixels of an object, by their number


class Group(NamedTuple):
    """So many objects of a concept, all in one tint or in their own colours."""

    concept: str
    copies: int
    colour: str | None

    @property
    def words(self) -> str:
        """`a blue fox`, `three foxes`."""
        noun, colour = self.concept, f"{self.colour} " if self.colour else ""
        if self.copies > 1:
            stem = f"{noun[:-1]}ie" if noun.endswith("y") and noun[-2] not in "aeiou" else noun
            noun = f"{stem}es" if noun.endswith(("s", "sh", "x")) else f"{stem}s"
            return f"{NUMBERS[self.copies]} {colour}{noun}"
        first = (colour or noun).removeprefix("uni")  # "a unicorn"
        return f"{'an' if first[0] in 'aeiou' else 'a'} {colour}{noun}"


class Scene(NamedTuple):
    """What is to be seen; `relation` is where the first group, one object, stands to the second, another one."""

    groups: tuple[Group, ...]
    relation: str | None
    style: str
    ground: str
    seed: int  # of places, sizes and shades

    @property
    def words(self) -> str:
        """Everything that the scene shows but its style and ground."""
        return f" {self.relation or 'and'} ".join(group.words for group in self.groups)

    @property
    def captions(self) -> tuple[Caption, ...]:
        # one that tells no ground means white, as of a drawing: else the same words would mean both
        style, ground = f"in {STYLE_WORDS[self.style]} style", f"{self.words} on a {self.ground} background"
        short = self.words if self.ground == "white" else ground
        return tuple(map(Caption, (short, f"{short}, {style}", f"a picture of {ground}, {style}")))

    @property
    def held_out(self) -> frozenset[str]:
        """Which kinds of its compositions are held out: `pair`, `colour`, `count`."""
        names = sorted(group.concept for group in self.groups)
        parts = [("pair", *names)] if len(names) > 1 else []
        parts += [("colour", group.concept, group.colour) for group in self.groups if group.colour]
        parts += [("count", group.concept, str(group.copies)) for group in self.groups if group.copies > 1]
        return frozenset(kind for kind, *what in parts if hash_share("/".join(("scene", kind, *what)), HELD_OUT))

    @property
    def task(self) -> str:
        """Which of GenEval's tasks the scene asks most of."""
        if self.relation:
            return "position"
        coloured = any(group.colour for group in self.groups)
        if len(self.groups) > 1:
            return "color_attr" if coloured else "two_object"
        return "counting" if self.groups[0].copies > 1 else "colors" if coloured else "single_object"

    @property
    def truth(self) -> dict[str, Any]:
        """As GenEval's metadata tells it: classes to find, with counts, colours and the place to the one before."""
        tints: list[dict[str, Any]] = [{"color": g.colour} if g.colour else {} for g in self.groups]
        include = [{"class": g.concept, "count": g.copies} | tint for g, tint in zip(self.groups, tints, strict=True)]
        if self.relation:  # the object that is placed comes last there
            include = include[::-1]
            include[1]["position"] = [self.relation, 0]
        exact = [{"class": g.concept, "count": g.copies + 1} for g in self.groups if g.copies > 1]
        return {"tag": self.task, "include": include, "exclude": exact, "prompt": self.words}


def draw_scene(generator: np.random.Generator, *, task: str | None = None) -> Scene:
    """A scene as a task of GenEval has it, or of any kind; whether it is held out is for the caller to ask."""
    number, count = 1 if task in ("single_object", "colors", "counting") else 2, 1
    tint, relation = task in ("colors", "color_attr"), task == "position"
    if task is None:
        number, relation = (1, False) if generator.random() < 0.4 else (2, generator.random() < 0.4)
        count = 1 if relation or generator.random() < 0.5 else int(generator.integers(2, 6))
    elif task == "counting":
        count = int(generator.integers(2, 6))
    concepts = generator.choice(CONCEPTS, number, replace=False).tolist()
    counts = [count] if number == 1 else [max(1, count // 2), max(1, count - count // 2)]
    groups = []
    for concept, copies in zip(concepts, counts, strict=True):
        colour = str(generator.choice(tuple(COLOURS))) if tint or (task is None and generator.random() < 0.4) else None
        groups.append(Group(concept, copies, colour))
    style = str(generator.choice([name for name in STYLE_WORDS if all((c, name) in known() for c in concepts)]))
    place = str(generator.choice(tuple(RELATIONS))) if relation else None
    return Scene(tuple(groups), place, style, str(generator.choice(tuple(GROUNDS))), int(generator.integers(2**62)))


def scenes(
    seed: int, *, task: str | None = None, wanted: Callable[[Scene], bool], indices: Iterable[int] | None = None
) -> Iterator[Scene]:
    """Scenes that are `wanted`, an endless row or those at `indices` of it; none depends on those before it."""
    for index in itertools.count() if indices is None else indices:
        generator = np.random.default_rng(derive_seed(seed, f"scene/{task}", index))
        yield next(scene for _ in itertools.count() if wanted(scene := draw_scene(generator, task=task)))


def emoji_scene_records(*, count: int = 100_000) -> Iterator[Record]:
    """So many scenes without a held-out composition, always the same ones. Raises `UserError` below one."""
    if count < 1:
        raise UserError(f"count is a number of scenes, not {count}.")
    for index, scene in enumerate(itertools.islice(scenes(0, wanted=lambda scene: not scene.held_out), count)):
        yield Record(f"scene/{index}", partial(scene_picture, scene), scene.captions, "emoji-scenes")


def scene_picture(scene: Scene) -> Image.Image:
    """What the scene looks like."""
    return compose(scene)[0]


@cache
def known() -> Mapping[tuple[str, str], bytes]:
    """The training split's drawings of the scenes' concepts, by concept and style."""
    rows = (row for row in emoji_table() if row["concept"] in CONCEPTS and row["split"] == "train")
    return {(row["concept"], row["style"]): row["image"] for row in rows}


@cache
def cut_out(concept: str, style: str) -> Image.Image:
    """A drawing without the white around it: RGBA."""
    drawn = drawing(known()[concept, style])
    framed = ImageOps.expand(drawn, 1, "white")  # so that the outside is in one piece
    ImageDraw.floodfill(framed, (0, 0), (1, 2, 3), thresh=24)
    outside = (np.asarray(framed) == (1, 2, 3)).all(-1)[1:-1, 1:-1]
    drawn.putalpha(Image.fromarray((~outside).astype(np.uint8) * 255))
    return drawn.crop(drawn.getchannel("A").getbbox())


def tinted(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The drawing in shades of one colour, darker and lighter as it was."""
    grey = ImageOps.autocontrast(picture.convert("L"), mask=picture.getchannel("A"), cutoff=2)
    dark, light = (tuple(int(c * 0.45) for c in colour), tuple(int(c + (255 - c) * 0.45) for c in colour))
    shades = ImageOps.colorize(grey, dark, light, mid=colour)
    shades.putalpha(picture.getchannel("A"))
    return shades


Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def compose(scene: Scene) -> tuple[Image.Image, list[tuple[Box, Group]]]:
    """The scene's picture and each object's box."""
    generator = np.random.default_rng(scene.seed)
    objects = [group for group in scene.groups for _ in range(group.copies)]
    cut = [cut_out(group.concept, scene.style) for group in objects]
    boxes = place(generator, [picture.size for picture in cut], scene.relation)
    ground = np.asarray(GROUNDS[scene.ground], np.float32)
    shade = np.linspace(0, generator.choice([0, 0, -36, 18]), EDGE)[:, None, None] * (scene.ground != "white")
    canvas = Image.fromarray(np.clip(np.broadcast_to(ground + shade, (EDGE, EDGE, 3)), 0, 255).astype(np.uint8))
    for box, group, picture in zip(boxes, objects, cut, strict=True):
        drawn = tinted(picture, COLOURS[group.colour]) if group.colour else picture
        small = drawn.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC)
        canvas.paste(small, box[:2], small)
    return canvas, list(zip(boxes, objects, strict=True))


def place(generator: np.random.Generator, shapes: list[tuple[int, int]], relation: str | None) -> list[Box]:
    """Boxes that do not touch, of the drawings' shapes; the first stands to the second as `relation` says."""
    low, high = SIZES[len(shapes)]
    for attempt in itertools.count():
        size, boxes = generator.uniform(low, high) * 0.98 ** max(0, attempt - 60), list[Box]()
        for shape in shapes:
            scale = size * generator.uniform(0.9, 1.1) / max(shape)
            width, height = (max(8, round(side * scale)) for side in shape)
            left, top = (int(generator.integers(1, max(2, EDGE - side))) for side in (width, height))
            boxes.append((left, top, left + width, top + height))
        pairs = itertools.combinations(boxes, 2)
        apart = all(max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) > 2 for a, b in pairs)
        if apart and (relation is None or _stands(boxes[0], boxes[1], RELATIONS[relation])):
            return boxes
    raise AssertionError("unreachable")


def _stands(a: Box, b: Box, way: tuple[int, int]) -> bool:
    """Whether a's centre lies from b's that way, plainly so: twice as far as aside."""
    dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    along, aside = dx * way[0] + dy * way[1], abs(dx * way[1]) + abs(dy * way[0])
    return along > 2 * aside and along > 0.3 * EDGE
