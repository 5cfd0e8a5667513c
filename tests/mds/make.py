"""Makes the folders beside it, with mosaicml-streaming 0.13: `python tests/mds/make.py` where that is installed."""

import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from streaming import MDSWriter
from streaming.base.util import merge_index

out = Path(__file__).parent
RAW = {"width": "int32", "height": "int32", "jpg": "jpeg", "caption": "str"}
LATENTS = {"caption": "str", "caption_latents": "bytes", "latents_16": "bytes", "latents_32": "bytes"}
for name in ("raw", "latents"):
    shutil.rmtree(out / name, ignore_errors=True)

with MDSWriter(out=str(out / "raw"), columns=RAW, size_limit=2200) as writer:
    for i in range(6):
        buffer = io.BytesIO()
        Image.fromarray(np.full((16 + i, 20, 3), (40 * i, 255 - 40 * i, 90), np.uint8)).save(buffer, "JPEG")
        picture = Image.open(buffer)
        writer.write({"width": 20, "height": 16 + i, "jpg": picture, "caption": f"picture {i}, café"})

for process in range(2):  # one subfolder a process and a merged index, as the reference leaves them
    with MDSWriter(out=str(out / "latents" / str(process)), columns=LATENTS, size_limit=3000) as writer:
        for number in range(3 * process, 3 * process + 3):
            row = {
                "caption_latents": np.full((5, 3), number, np.float16),
                "latents_16": np.arange(3 * 4 * 4, dtype=np.float16) + number,
                "latents_32": np.arange(3 * 8 * 8, dtype=np.float16) - number,
            }
            writer.write({"caption": f"latent {number}", **{name: value.tobytes() for name, value in row.items()}})
merge_index(str(out / "latents"), keep_local=True)
