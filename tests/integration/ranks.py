"""Training runs in processes of their own, alone or with others under torchrun, for the tests beside this file.

`python ranks.py FOLDER '{"parallel": "fsdp", ...}'` trains the tiny recipe on random rows; settings that are no option:
`micro` for its micro-batch, `dim` for the model's width, `kill` for when and where to be killed, `steps` of a stage,
`device`, `fits` for how many images a rank has memory for, and `compile` for a backend of torch.compile. `graphs.txt`
has how many graphs that was given since memory was enough, or how many CUDA graphs were captured.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.registry import lookup_backend

from micro_diffusion.data.loader import Batch, Loader
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.runtime.distributed import Stuck, World, join
from micro_diffusion.runtime.files import UserError
from micro_diffusion.training import loop
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.loop import Interrupted, train
from micro_diffusion.training.options import Options
from micro_diffusion.training.stages import State

ROOT = Path(__file__).parents[2]
BATCH = 8


class RandomRows(Loader):
    """Twenty-four rows of random latents and captions; each batch that is read is written down."""

    def __init__(self, size: int, run: Path, settings: dict[str, Any], world: World) -> None:
        generator = torch.Generator().manual_seed(size)
        self.latents = torch.randn(24, 4, size, size, generator=generator)
        self.text = torch.randn(24, 3, 8, generator=generator)
        self.settings, self.world, self.seen = settings, world, run / f"seen-{world.size}-{world.rank}.txt"

    def __len__(self) -> int:
        return 24

    def rows(self, indices: Sequence[int]) -> Batch:
        rows = torch.tensor(indices)
        mask = torch.ones(len(rows), 3, dtype=torch.bool)
        return Batch(self.latents[rows], self.text[rows], mask, tuple(map(str, indices)))

    def batch(self, start: int, count: int) -> Batch:
        self.seen.parent.mkdir(parents=True, exist_ok=True)
        with self.seen.open("a") as file:
            file.write(f"{start} {count}\n")
        kind, rank, images = self.settings.get("kill", ("never", 0, 0))
        if rank == self.world.rank and start // BATCH == images // BATCH:
            if kind == "step":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "stuck":
                signal.sigtimedwait([], 3600)
            if kind == "term":
                os.kill(os.getpid(), signal.SIGTERM)
        return self.rows([5 * position % 24 for position in range(start, start + count)])

    def batches(
        self, start: int, stop: int, batch_size: int, *, rank: int = 0, world: int = 1, prefetch: int = 2
    ) -> Iterator[Batch]:
        share = batch_size // world
        return (self.batch(first + rank * share, share) for first in range(start, stop, batch_size))


def die_while_saving(settings: dict[str, Any], world: World) -> None:
    """Let this rank be killed, or find the disk full, half-way through the checkpoint at the given images."""
    kind, rank, images = settings.get("kill", ("never", 0, 0))
    write = dcp.FileSystemWriter.write_data

    def half(self: dcp.FileSystemWriter, plan: Any, planner: Any) -> Any:
        if str(images) in str(self.path) and rank == world.rank:
            if kind == "save":
                (Path(self.path) / "half").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "slow":
                time.sleep(600)
            if kind == "full":
                raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    dcp.FileSystemWriter.write_data = half  # type: ignore[method-assign]


def recipe(settings: dict[str, Any]) -> Recipe:
    """Two stages: masked at 64 px, then 128 px, with everything switched on."""
    model = replace(
        PRESETS["MicroDiT_Nano_4"](in_channels=4, caption_channels=8, text_mask="padding"),
        dim=settings.get("dim", 32), depth=2, head_dim=16, multiple_of=16, patch_mixer_dim=32, patch_mixer_depth=1,
        qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 4.0),
    )  # fmt: skip
    first = Stage(
        name="64 px masked", resolution=64, images=BATCH * settings.get("steps", 10), batch_size=BATCH,
        learning_rate=1e-3, warmup_images=32, mask_ratio=0.5, start="scratch", ema_halflife_images=32,
        ema_start_images=8, micro_batch=settings.get("micro", 0),
    )  # fmt: skip
    second = replace(first, name="128 px", resolution=128, pos_interp_scale=2.0, start="weights", mask_ratio=0.0)
    stages = (first, second)[: settings.get("stages", 2)]
    return Recipe(
        name="ranks", model=model, stages=stages, log_every=BATCH, checkpoint_every=settings.get("every", 3 * BATCH),
        sample_every=2 * BATCH, compile="compile" in settings,
        text_length=3 if settings.keys() & {"compile", "cuda_graph"} else None,
    )  # fmt: skip


def main(folder: Path, settings: dict[str, Any]) -> int:
    """Train in `folder`; the exit code."""

    def release(path: Path, state: State) -> None:
        path.mkdir(exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in state.dit.state_dict().items()}, path / "model.safetensors"
        )

    if machines := settings.get("machines"):
        os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // machines)
    graphs = 0

    def counted(*args: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return lookup_backend(settings["compile"])(*args)

    if "compile" in settings:
        torch.compile = partial(torch.compile, backend=counted)
    add_gradient = loop.add_gradient

    def limited(*args: Any) -> Any:
        nonlocal graphs
        losses = add_gradient(*args)
        if len(losses) > settings.get("fits", BATCH):
            graphs = 0
            raise torch.OutOfMemoryError
        return losses

    loop.add_gradient = limited
    capture, device = torch.cuda.graph, settings.get("device", "cpu")

    def captured(*args: Any, **settings: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return capture(*args, **settings)

    torch.cuda.graph = captured  # type: ignore[assignment,misc]
    options = Options(**{name: settings[name] for name in settings.keys() & Options.__dataclass_fields__.keys()})
    try:
        with join(device, timeout=options.timeout) as world:
            die_while_saving(settings, world)
            loaders = {size: RandomRows(size // 8, folder, settings, world) for size in (64, 128)}
            train(
                recipe(settings), run=folder, loaders=loaders, downscale=8, device=torch.device(device),
                release=release, options=options, world=world,
            )  # fmt: skip
            if world.rank == 0:
                (folder / "graphs.txt").write_text(str(graphs))
    except Interrupted as stopped:
        return 128 + stopped.signal
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except Stuck as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(75)
    return 0


def start(folder: Path, ranks: int = 1, **settings: Any) -> subprocess.Popen[str]:
    """Begin such a run."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environment["PYTHONFAULTHANDLER"] = "1"  # a rank once died of a segmentation fault, and left no trace
    return subprocess.Popen(
        [sys.executable, *launch, __file__, str(folder), json.dumps(settings)],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(folder: Path, ranks: int = 1, *, fails: bool = False, **settings: Any) -> str:
    """Run to the end and return what was printed."""
    process = start(folder, ranks, **settings)
    out, err = process.communicate(timeout=300)
    assert (process.returncode != 0) == fails, err
    return out + err


def weights(folder: Path, model: str = "model") -> dict[str, torch.Tensor]:
    """What the run released."""
    return load_file(folder / model / "model.safetensors")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
