"""Training on CUDA: a killed run in deterministic mode ends with the same bits; pictures encoded beside the steps."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from integration.test_resume import ROOT, Kill, RandomRows, recipe, same_models
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from micro_diffusion.data.loader import Batch
from micro_diffusion.data.records import Caption, Record
from micro_diffusion.data.store import AutoencoderInfo, StoreInfo, TextInfo
from micro_diffusion.data.stream import Stream
from micro_diffusion.runtime.log import read_log
from micro_diffusion.training.feed import Examples, feed
from micro_diffusion.training.loop import train
from micro_diffusion.training.options import Options
from micro_diffusion.training.parallel import make_deterministic
from micro_diffusion.training.stages import State


class Rows(RandomRows):
    """As a store is read: any batch, by any worker."""

    def batch(self, start: int, count: int) -> Batch:
        return self.rows([5 * position % 12 for position in range(start, start + count)])


def main(folder: Path, moment: str, images: int) -> None:
    """Train in `folder` on a GPU, compiled, in bf16, up to the kill, if there is one."""

    def release(path: Path, state: State) -> None:
        path.mkdir(exist_ok=True)
        save_file(state.shown.state_dict(), path / "model.safetensors")

    make_deterministic()
    made = replace(recipe(), precision="bf16", compile=True, text_length=3)
    train(
        made, run=folder, loaders={64: Rows(8), 128: Rows(16)}, downscale=8, device=torch.device("cuda"),
        release=release, hooks=[Kill(moment, images)],
    )  # fmt: skip


def start(folder: Path, moment: str = "never", images: int = 0) -> int:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])}
    command = [sys.executable, __file__, str(folder), moment, str(images)]
    return subprocess.run(command, check=False, env=environment).returncode


def test_kill_and_resume_is_bit_identical_in_deterministic_mode(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(undisturbed) == 0
    for moment, images in (("step", 28), ("save", 84)):
        assert start(killed, moment, images) == -signal.SIGKILL
    assert start(killed) == 0
    same_models(undisturbed, killed)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_as_one_cuda_graph_is_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Literal["adamw", "muon"]
) -> None:
    """With a change of the mask, micro-batches, a learning rate that moves, checkpoints in between."""
    made = replace(recipe(), precision="bf16", compile=True, text_length=3, optimizer=optimizer)
    first, second = made.stages
    made = replace(made, stages=(replace(first, mask_schedule=((32, 0.25),)), second))
    captures, capture = [], torch.cuda.graph

    def counted(graph: torch.cuda.CUDAGraph, **settings: Any) -> torch.cuda.graph:
        captures.append(graph)
        return capture(graph, **settings)

    monkeypatch.setattr(torch.cuda, "graph", counted)
    for name in ("launches", "graph"):
        train(
            made, run=tmp_path / name, loaders={64: Rows(8), 128: Rows(16)}, downscale=8, device=torch.device("cuda"),
            release=lambda path, state: None, options=Options(cuda_graph=name == "graph"),
        )  # fmt: skip
        assert len(captures) == (3 if name == "graph" else 0)
    expected, found = (read_log(tmp_path / name / "log.jsonl") for name in ("launches", "graph"))
    assert len(expected) == len(found) == 30
    for a, b in zip(expected, found, strict=True):
        assert (a["images"], a["learning_rate"], b["skipped"]) == (b["images"], b["learning_rate"], 0)
        for name in ("loss", "grad_norm", "weight_norm"):
            assert b[name] == pytest.approx(a[name], rel=2e-2), (a["images"], name)
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)


class Encoders:
    """A few convolutions and an embedding with fixed random weights."""

    def __init__(self, device: str) -> None:
        self.device = device
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = (layer for _ in range(6) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.SiLU()))
            self.picture = nn.Sequential(nn.Conv2d(3, 64, 8, 8), *layers, nn.Conv2d(64, 4, 1)).to(device)
            self.words = torch.randn(128, 8).to(device)

    @torch.no_grad()
    def images(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.picture(pictures.to(self.device))
        return mean, torch.full_like(mean, 0.1)

    def text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        length = max(map(len, captions))
        letters = torch.tensor([[ord(letter) for letter in caption.ljust(length)] for caption in captions])
        return self.words[letters.to(self.device)], letters != ord(" ")


def streamed(marks: Path, device: str) -> list[Examples]:
    """What training gets of 96 pictures, ten batches of 32, on this device; a GPU is kept busy meanwhile."""
    draw, records = np.random.default_rng(0), []
    for number in range(96):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "PNG")
        records.append(Record(f"{number}", buffer.getvalue(), (Caption(f"picture{number}"),), "noise"))
    encoders = Encoders(device)
    info = StoreInfo(AutoencoderInfo("random", "0", 1.0, 0.0, 4, 8), {"random": TextInfo("0", 8, 16, "padding")})
    stream = Stream(
        lambda: records, 64, encoders.images, encoders.text, info, seed=7, marks=marks, text_length=12,
        device=device, workers=2,
    )  # fmt: skip
    made = replace(recipe(), text_length=12)
    stage = replace(made.stages[0], batch_size=32, images=320)
    given = []
    for each in feed(stream, made, stage, patches=16, data=[(0, 320)], device=torch.device(device)):
        if device == "cuda":
            busy = torch.randn(4096, 4096, device=device)
            for _ in range(20):
                busy = busy @ busy / 64
        given.append(Examples(*(column.clone() for column in each)))
    return [Examples(*(column.cpu() for column in each)) for each in given]


def test_pictures_encoded_beside_the_steps_are_the_cpus(tmp_path: Path) -> None:
    expected, found = streamed(tmp_path / "cpu", "cpu"), streamed(tmp_path / "cuda", "cuda")
    assert len(found) == len(expected) == 10
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.latents, one.latents, rtol=0, atol=5e-3)
        assert one.latents.std() > 0.05
        for name in ("text", "text_mask", "sigma_normal", "noise", "mask_noise", "caption_dropped"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
