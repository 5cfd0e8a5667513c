"""`prepare` killed with SIGKILL again and again, then run to its end, leaves the store of an undisturbed run."""

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = """
import sys, time
from pathlib import Path
import torch
from micro_diffusion.data.prepare import prepare
from micro_diffusion.data.sources import SOURCES
from micro_diffusion.data.store import AutoencoderInfo, StoreInfo, TextInfo

def encode_images(images):
    time.sleep(0.01)
    mean = torch.nn.functional.avg_pool2d(images, 4)
    return mean, torch.full_like(mean, 0.1)

def encode_text(captions):
    lengths = torch.tensor([len(caption) for caption in captions])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return mask[..., None] * lengths[:, None, None].float(), mask

folder, out, *resolutions = sys.argv[1:]
info = StoreInfo(AutoencoderInfo("mean", "aa", 1.0, 0.0, 3, 4), {"letters": TextInfo("bb", 1, 99, "padding")})
report = prepare(
    SOURCES["folder"](Path(folder)), Path(out), resolutions=[int(size) for size in resolutions], info=info,
    encode_images=encode_images, encode_text=encode_text, rows_per_part=20, batch_size=5,
    progress=lambda done, rejected: print("batch", flush=True),
)
print("written", report.parts_written, flush=True)
"""


def start(folder: Path, out: Path, *resolutions: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(out), *map(str, resolutions)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def finish(folder: Path, out: Path, *resolutions: int) -> str:
    process = start(folder, out, *resolutions)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.splitlines()[-1]


def kill_after(batches: int, wait: float, *arguments) -> None:
    """Kill a run when it has reported so many batches, a little later."""
    process = start(*arguments)
    for _ in range(batches):
        process.stdout.readline()
    time.sleep(wait)
    process.kill()
    process.communicate()


def snapshot(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """200 pictures, of which two do not decode."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(200):
        Image.fromarray(draw.integers(0, 256, (20, 16, 3), np.uint8)).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"picture {number}")
    (folder / "050.png").write_bytes(b"damage")
    (folder / "150.png").write_bytes(b"")
    return folder


def check(pictures: Path, folder: Path, kills: int) -> None:
    assert finish(pictures, folder / "undisturbed", 16, 32) == "written 10"
    chance = random.Random(kills)
    out = folder / "killed"
    for kill in range(kills):
        resolutions = (16,) if kill < kills // 2 else (16, 32)  # the second resolution is added half-way
        kill_after(chance.randrange(1, 1 + 40 * 2 // kills), chance.uniform(0, 0.03), pictures, out, *resolutions)
    finish(pictures, out, 16, 32)
    assert snapshot(out) == snapshot(folder / "undisturbed")
    assert len(list(out.glob("part-*"))) == 10
    assert not list(out.rglob(".tmp-*"))
    assert finish(pictures, out, 16, 32) == "written 0"


def test_killed_prepare_is_finished(pictures, tmp_path):
    check(pictures, tmp_path, kills=3)


@pytest.mark.slow
def test_prepare_killed_twenty_times_is_finished(pictures, tmp_path):
    check(pictures, tmp_path, kills=20)
