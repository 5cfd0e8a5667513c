"""`data inspect`, `data verify`, and `prepare` under torchrun, as commands."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from integration.command_line import ROOT, make_autoencoder, make_pictures, run
from integration.test_prepare_kill import snapshot

from micro_diffusion.data.store import Store


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_pictures(folder / "pictures", 60)
    make_autoencoder(folder / "autoencoder")
    return folder


def arguments(folder: Path, out: Path) -> tuple[str | Path, ...]:
    return (
        "prepare", folder / "pictures", "--out", out, "--resolutions", "32", "64", "--rows-per-part", "16",
        "--autoencoder", folder / "autoencoder",
    )  # fmt: skip


def test_inspect_and_verify(pictures: Path, tmp_path: Path) -> None:
    run(*arguments(pictures, tmp_path / "store"), "--posterior", "--text-dtype", "int8", "--min-size", "66")
    printed = run("data", "inspect", tmp_path / "store", "--page", tmp_path / "page.html", "--pictures", "6")
    assert "pictures: 12 in 4 parts" in printed and "not wanted: smaller than 66 px 48" in printed
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "smaller than 66 px 48" in page
    assert "12 pictures in 4 parts, all as they were written" in run("data", "verify", tmp_path / "store")
    (tmp_path / "store" / "part-00001" / "latents-64.arrow").write_bytes(b"x")
    printed = run("data", "verify", tmp_path / "store", code=2)
    assert "part-00001/latents-64.arrow is missing, or is not the file that was written" in printed


def test_bf16_latents_are_nearly_the_same(pictures: Path, tmp_path: Path) -> None:
    run(*arguments(pictures, tmp_path / "exact"))
    run(*arguments(pictures, tmp_path / "bf16"), "--precision", "bf16")
    exact, fast = (
        np.concatenate([
            pc.list_flatten(store.latents(64, part)["latents"]).to_numpy().astype(np.float32)
            for part in range(len(store.parts))
        ])
        for store in map(Store.open, (tmp_path / "exact", tmp_path / "bf16"))
    )  # fmt: skip
    error = np.sqrt(np.mean((exact - fast) ** 2)) / exact.std()
    assert 1e-4 < error < 0.03


@pytest.mark.slow
def test_two_processes_under_torchrun_make_the_store_of_one(pictures: Path, tmp_path: Path) -> None:
    run(*arguments(pictures, tmp_path / "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "micro_diffusion", *map(str, arguments(pictures, tmp_path / "two"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("60 pictures in 4 parts") == 1
    assert snapshot(tmp_path / "two") == snapshot(tmp_path / "one")
