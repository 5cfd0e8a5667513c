"""`prepare` on a local Ray of two workers, one of which is lost half-way, leaves the store of an undisturbed run."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from integration.test_prepare_kill import SCRIPT, finish, snapshot
from PIL import Image

RAY = """
import os, signal, ray
from micro_diffusion.data import prepare as module

def work(world, helpers=None):
    lost = Path(out).parent / "lost"
    def fragile(images):
        if world.rank == 2 and Path(out, "part-00001", "part.json").exists() and not lost.exists():
            lost.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return encode_images(images)
    return prepare(
        SOURCES["folder"](Path(folder)), Path(out), resolutions=[int(size) for size in resolutions], info=info,
        encode_images=fragile, encode_text=encode_text, rows_per_part=20, batch_size=5, world=world, helpers=helpers,
    )

folder, out, *resolutions = sys.argv[1:]
info = StoreInfo(AutoencoderInfo("mean", "aa", 1.0, 0.0, 3, 4), {"letters": TextInfo("bb", 1, 99, "padding")})
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
report = work(module.ALONE, lambda: module.on_ray(work, gpus=0))
print("written", report.parts_written, report.rows, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs the extra 'ray'")
def test_a_lost_worker_loses_and_doubles_nothing(tmp_path: Path) -> None:
    pictures, draw = tmp_path / "pictures", np.random.default_rng(0)
    pictures.mkdir()
    for number in range(200):
        Image.fromarray(draw.integers(0, 256, (20, 16, 3), np.uint8)).save(pictures / f"{number:03}.png")
        (pictures / f"{number:03}.txt").write_text(f"picture {number}")
    (pictures / "050.png").write_bytes(b"damage")
    assert finish(pictures, tmp_path / "undisturbed", 16) == "written 10"
    script = SCRIPT.partition("folder, out,")[0] + RAY
    command = [sys.executable, "-c", script, str(pictures), str(tmp_path / "ray"), "16"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == "written 0 199"  # all by the workers
    assert (tmp_path / "lost").exists()
    assert snapshot(tmp_path / "ray") == snapshot(tmp_path / "undisturbed")
