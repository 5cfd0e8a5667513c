"""Folders of pictures for metrics."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from micro_diffusion.evaluation.pictures import PictureFolder


def write_pictures(
    folder: Path, count: int, *, seed: int = 0, size: tuple[int, int] = (40, 40), captions: Sequence[str] = (),
    suffix: str = "png",
) -> PictureFolder:  # fmt: skip
    """Random colours in smooth blots, so that no two pictures are alike and resizing keeps what there is."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        small = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:03}.{suffix}")
    for index, caption in enumerate(captions):
        (folder / f"{index:03}.txt").write_text(caption)
    return PictureFolder(folder)
