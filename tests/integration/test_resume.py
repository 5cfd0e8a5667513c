"""A run killed with SIGKILL and started again ends with the same bits as one that nobody disturbed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from micro_diffusion.data.loader import Batch, Loader
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.runtime.log import read_log
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.hooks import Hook, Moment, Row
from micro_diffusion.training.loop import train
from micro_diffusion.training.stages import State

ROOT = Path(__file__).parents[2]


class RandomRows(Loader):
    """Twelve rows of random latents and captions."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self.latents = torch.randn(12, 4, size, size, generator=generator)
        self.text = torch.randn(12, 3, 8, generator=generator)

    def __len__(self) -> int:
        return 12

    def rows(self, indices: Sequence[int]) -> Batch:
        rows = torch.tensor(indices)
        mask = torch.ones(len(rows), 3, dtype=torch.bool)
        return Batch(self.latents[rows], self.text[rows], mask, tuple(map(str, indices)))

    def batches(
        self, start: int, stop: int, batch_size: int, *, rank: int = 0, world: int = 1, prefetch: int = 2
    ) -> Iterator[Batch]:
        for position in range(start, stop, batch_size):
            yield self.rows([5 * p % 12 for p in range(position, position + batch_size)])


class Kill(Hook):
    """Ends the process with SIGKILL, after a step or in the middle of writing a checkpoint."""

    def __init__(self, moment: str, images: int) -> None:
        self.moment, self.images = moment, images

    def after_step(self, state: State, moment: Moment) -> Row:
        if moment.after == self.images:
            if self.moment == "step":
                os.kill(os.getpid(), signal.SIGKILL)
            write = dcp.save

            def half(state_dict: dict[str, object], *, checkpoint_id: Path, process_group: None) -> None:
                write(state_dict, checkpoint_id=checkpoint_id)
                data = next(checkpoint_id.glob("*.distcp"))
                data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
                os.kill(os.getpid(), signal.SIGKILL)

            dcp.save = half  # type: ignore[assignment]
        return {}


def recipe() -> Recipe:
    model = replace(
        PRESETS["MicroDiT_Nano_4"](in_channels=4, caption_channels=8, text_mask="padding"),
        dim=32, depth=2, head_dim=16, multiple_of=16, patch_mixer_dim=32, patch_mixer_depth=1,
        qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 4.0),
    )  # fmt: skip
    first = Stage(
        name="64 px masked", resolution=64, images=60, batch_size=4, learning_rate=3e-3, warmup_images=20,
        mask_ratio=0.5, start="scratch", ema_halflife_images=16, ema_start_images=8,
    )  # fmt: skip
    second = replace(
        first, name="128 px", resolution=128, pos_interp_scale=2.0, start="weights", mask_ratio=0.0, micro_batch=2
    )
    return Recipe(name="killed", model=model, stages=(first, second), log_every=4, checkpoint_every=12)


def main(folder: Path, moment: str, images: int) -> None:
    """Train in `folder` up to the kill, if there is one."""

    def release(path: Path, state: State) -> None:
        path.mkdir(exist_ok=True)
        save_file(state.shown.state_dict(), path / "model.safetensors")

    loaders = {64: RandomRows(8), 128: RandomRows(16)}
    train(
        recipe(), run=folder, loaders=loaders, downscale=8, device=torch.device("cpu"), release=release,
        hooks=[Kill(moment, images)],
    )  # fmt: skip


def start(folder: Path, moment: str = "never", images: int = 0) -> int:
    command = [sys.executable, __file__, str(folder), moment, str(images)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=False, env=environment).returncode


def same_models(undisturbed: Path, killed: Path) -> None:
    for model in ("model-stage-1", "model"):
        expected, found = (load_file(run / model / "model.safetensors") for run in (undisturbed, killed))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_kill_and_resume_is_bit_identical(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(undisturbed) == 0
    for moment, images in (("step", 8), ("step", 28), ("save", 48), ("step", 64), ("step", 100), ("save", 120)):
        assert start(killed, moment, images) == -signal.SIGKILL
    assert start(killed) == 0
    same_models(undisturbed, killed)
    losses = [[(row["images"], row["loss"]) for row in read_log(run / "log.jsonl")] for run in (undisturbed, killed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 30


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
