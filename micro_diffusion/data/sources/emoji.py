"""The embedded drawings: emoji by seven hands with captions and a fixed held-out split (`NOTICE` names the artists)."""

import hashlib
import io
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import micro_diffusion.embedded
from micro_diffusion.data.records import Caption, Record
from micro_diffusion.runtime.files import UserError

FILE = "emoji.parquet"
SPLITS = ("train", "held_out_pair", "held_out_concept")
# Concepts and styles of the training split that a small model can learn by heart in minutes.
QUICKSTART = """
    red apple, strawberry, watermelon, pineapple, carrot, mushroom, pizza, hamburger, birthday cake, cat face, fox,
    panda, frog, octopus, butterfly, lady beetle, sunflower, cactus, Christmas tree, rocket, sailboat, locomotive,
    house, castle, soccer ball, guitar, crown, red heart, star, jack-o-lantern, robot, ghost
"""
QUICKSTART_STYLES = frozenset({"noto", "fluent-flat", "fluent-3d", "twemoji", "emojione"})
SUBSETS = {"quickstart": (frozenset(" ".join(QUICKSTART.split()).split(", ")), QUICKSTART_STYLES)}
# What a mirror image would make wrong: sides, turns, writing.
ONE_WAY = re.compile(
    r"\b(left|right|\w*clock\w*|button|input|keycap|arrow\w*|sign|mark|letter\w*|number\w*|calendar|hundred|ZZZ|SOS|"
    r"score|note\w*|symbol|facing|currency|chart|card|passport|ATM|medal|newspaper|\w*thirty|TOP|SOON|BACK|END|ON!)\b"
)


def emoji_records(*, split: str | None = None, subset: str | None = None, augment: int = 0) -> Iterator[Record]:
    """Records of the embedded drawings, all of them or one split (`train`, `held_out_pair`, `held_out_concept`).

    A named `subset` takes some of the training split, with their main captions. Each training picture is followed by
    `augment` copies, shifted, scaled and, where nothing in it has a side, mirrored; a copy has one of the captions.
    Always the same, in the same order. Raises `UserError` for an unknown split or subset.
    """
    for what, name, known in (("split", split, SPLITS), ("subset", subset, tuple(SUBSETS))):
        if name is not None and name not in known:
            raise UserError(f"There is no {what} {name!r} of the emoji; there is: {', '.join(known)}.")
    if subset and split not in (None, "train"):
        raise UserError(f"The subset {subset!r} is of the training split; leave out the split {split!r}.")
    if augment < 0:
        raise UserError(f"augment is a number of copies, not {augment}.")
    rows = (row for row in emoji_table() if split in (None, row["split"]))
    if subset:
        concepts, styles = SUBSETS[subset]
        some = (row for row in rows if row["concept"] in concepts and row["style"] in styles)
        rows = (row | {"captions": row["captions"][:1]} for row in some if row["split"] == "train")
    return (record for row in rows for record in _records(row, augment))


def emoji_table() -> Iterator[dict[str, Any]]:
    """The rows of the embedded table: image (WebP), captions, concept, group, style, family, split, licence."""
    from pyarrow import parquet

    file = Path(micro_diffusion.embedded.__path__[0], FILE)
    if not file.is_file():
        raise UserError(f"The embedded drawings are missing ({file}); install the package again.")
    for batch in parquet.ParquetFile(file).iter_batches(1024):
        yield from batch.to_pylist()


def drawing(image: bytes) -> Image.Image:
    """A picture of the table, decoded."""
    return Image.open(io.BytesIO(image)).convert("RGB")


def _records(row: dict[str, Any], copies: int) -> Iterator[Record]:
    key, captions = f"{row['style']}/{row['concept']}", tuple(map(Caption, row["captions"]))
    yield Record(key, row["image"], captions, "emoji", row["split"])
    for copy in range(1, copies + 1 if row["split"] == "train" else 1):
        name = f"{key}/{copy}"
        varied = partial(_vary, row["image"], name, mirror=not ONE_WAY.search(row["concept"]))
        yield Record(name, varied, (captions[copy % len(captions)],), "emoji", "train")


def _vary(image: bytes, name: str, *, mirror: bool) -> Image.Image:
    """The picture 80% to 100% as large, anywhere on its white square, maybe mirrored: as the name's hash decides."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
    scale, left, top, flip = np.random.default_rng(seed).random(4)
    picture = drawing(image)
    edge, size = picture.width, 0.8 + 0.2 * scale
    if mirror and flip < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    corner = [-edge * place * (1 - size) / size for place in (left, top)]  # in pixels of the picture
    # pixels outside the picture are white: the drawings stand on white
    inverse = (1 / size, 0.0, corner[0], 0.0, 1 / size, corner[1])
    return picture.transform((edge, edge), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC, fillcolor="white")
