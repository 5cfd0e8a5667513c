"""Data that are not finite, or far too large: skipped, named, gone back from, left out, and at last given up on."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from integration.command_line import make_autoencoder, make_pictures, tiny_recipe
from integration.test_resume import RandomRows, recipe

from micro_diffusion.cli.main import main
from micro_diffusion.data.loader import Batch
from micro_diffusion.data.store import Store
from micro_diffusion.models.dit import DiT, conditioned
from micro_diffusion.runtime.log import read_log
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.feed import feed
from micro_diffusion.training.guard import TrainingFailed, watch
from micro_diffusion.training.hooks import Hook, Moment, Row
from micro_diffusion.training.loop import train
from micro_diffusion.training.stages import State


class Poisoned(RandomRows):
    """Rows whose latents are multiplied between two positions; remembers what was read for training."""

    def __init__(self, size: int, start: int, stop: int, factor: float) -> None:
        super().__init__(size)
        self.start, self.stop, self.factor = start, stop, factor
        self.read: list[int] = []

    def batch(self, start: int, count: int) -> Batch:
        positions = range(start, start + count)
        batch = self.rows([5 * position % 12 for position in positions])
        factors = torch.tensor([self.factor if self.start <= each < self.stop else 1.0 for each in positions])
        return batch._replace(latents=batch.latents * factors[:, None, None, None])

    def batches(
        self, start: int, stop: int, batch_size: int, *, rank: int = 0, world: int = 1, prefetch: int = 2
    ) -> Iterator[Batch]:
        for position in range(start, stop, batch_size):
            self.read += range(position, position + batch_size)
            yield self.batch(position, batch_size)


class Stop(Hook):
    """Ends the run as if the machine were gone, without a checkpoint, once its log is past a number of images."""

    def __init__(self, images: int, *, rollbacks: int) -> None:
        self.images, self.rollbacks = images, rollbacks

    def after_step(self, state: State, moment: Moment) -> Row:
        if moment.after == self.images and len(state.guard.rollbacks) == self.rollbacks:
            raise MemoryError("gone")
        return {}


def one_stage(**changes: object) -> Recipe:
    """Batches of four, a checkpoint every 12 images."""
    whole = recipe()
    stage = replace(whole.stages[0], images=120, ema_start_images=0)
    return replace(whole, stages=(stage,), guard_skips=3, **changes)  # type: ignore[arg-type]


def run(recipe: Recipe, folder: Path, loader: RandomRows, *hooks: Hook) -> DiT:
    return train(
        recipe, run=folder, loaders={64: loader}, downscale=8, device=torch.device("cpu"),
        release=lambda path, state: None, hooks=hooks,
    )  # fmt: skip


def flat(dit: DiT) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in dit.parameters()])


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "guard.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("factor", "start", "back_to", "window"),
    # NaN: the batches at 32, 36 and 40 are skipped, then it goes back over the checkpoint at 36 to that at 24
    [(float("nan"), 32, 24, [32, 44]), (1000.0, 84, 84, [84, 96])],
    ids=["NaN", "jump"],
)
def test_back_to_the_last_good_checkpoint_and_past_the_data(
    tmp_path: Path, factor: float, start: int, back_to: int, window: list[int]
) -> None:
    """It ends with the bits of a run that was told from the start to leave these data out, killed on the way or not."""
    loader = Poisoned(8, start, start + 16, factor)
    ended = run(one_stage(), tmp_path / "a", loader)
    assert flat(ended).isfinite().all()
    assert loader.read == [*range(window[1]), *range(back_to, window[0]), *range(window[1], 132)]
    happened = events(tmp_path / "a")
    (rollback,) = (event for event in happened if "windows" in event)
    assert rollback["windows"] == [window] and f"back to {back_to} images" in str(rollback["what"])
    skipped = [event for event in happened if "keys" in event]
    if factor == 1000.0:
        assert not skipped
    else:
        assert [event["position"] for event in skipped] == [32, 36, 40, 44]
        assert skipped[0]["keys"] == [str(5 * position % 12) for position in range(32, 36)]
        assert str(skipped[0]["keys"]) in str(skipped[0]["what"])
    images = [row["images"] for row in read_log(tmp_path / "a" / "log.jsonl")]
    assert images == list(range(4, 124, 4))

    told = tmp_path / "told"
    with pytest.raises(MemoryError):
        run(one_stage(), told, RandomRows(8), Stop(4, rollbacks=0))
    first = told / "checkpoints" / f"{0:012d}" / "state.json"
    clock = json.loads(first.read_text())
    clock["guard"]["windows"] = [window]
    first.write_text(json.dumps(clock))
    assert torch.equal(flat(run(one_stage(), told, Poisoned(8, start, start + 16, factor))), flat(ended))

    with pytest.raises(MemoryError):
        run(one_stage(), tmp_path / "b", Poisoned(8, start, start + 16, factor), Stop(back_to + 8, rollbacks=1))
    resumed = Poisoned(8, start, start + 16, factor)
    assert torch.equal(flat(run(one_stage(), tmp_path / "b", resumed)), flat(ended))
    assert resumed.read[0] == back_to or resumed.read[0] == window[1]
    assert not set(resumed.read) & set(range(*window))


def test_after_the_limit_it_stops_with_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with no checkpoint half-written, however long one takes."""
    save = dcp.save

    def slow(*args: Any, checkpoint_id: Path, **settings: Any) -> None:
        time.sleep(2 * checkpoint_id.name.endswith("36"))  # the last before the trouble
        save(*args, checkpoint_id=checkpoint_id, **settings)

    monkeypatch.setattr(dcp, "save", slow)
    loader = Poisoned(8, 32, 400, float("nan"))
    with pytest.raises(TrainingFailed, match="3 times.*images 32 to 44: 3 of 11 steps were not finite; .*guard.jsonl"):
        run(one_stage(guard_rollbacks=2), tmp_path, loader)
    assert sum("windows" in event for event in events(tmp_path)) == 2
    assert all(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(TrainingFailed):  # the same command meets the same data, and remembers
        run(one_stage(guard_rollbacks=2), tmp_path, Poisoned(8, 0, 400, float("nan")))


def test_a_corrupt_part_ends_in_exit_code_3_and_names_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_pictures(Path("pictures"), 40)
    make_autoencoder(Path("autoencoder"))
    tiny = replace(tiny_recipe(Path("autoencoder")), sample_every=0, validate_every=0, guard_rollbacks=1)
    Path("tiny.json").write_text(tiny.to_json())
    prepare = ("prepare", "pictures", "--out", "store", "--resolutions", "32", "64", "--autoencoder", "autoencoder")
    assert main([*prepare, "--rows-per-part", "20"]) == 0
    part = Path("store/part-00001")
    content = bytearray((part / "latents-32.arrow").read_bytes())
    values = np.frombuffer(content, np.uint16)  # a view: the latents are most of the file
    values[len(values) // 4 : len(values) * 3 // 4] = 0x7E00  # NaN
    (part / "latents-32.arrow").write_bytes(content)
    assert main(["train", "tiny.json", "--store", "store", "--run", "run", "--device", "cpu"]) == 3
    assert "training stopped: numbers went wrong 2 times" in capsys.readouterr().err
    broken = {key for event in events(Path("run")) for key in event.get("broken", ())}
    assert broken and broken <= set(Store.open("store").rows(1)["key"].to_pylist())

    (part / "latents-32.arrow").write_bytes(content[: len(content) // 2])
    assert main(["train", "tiny.json", "--store", "store", "--run", "second", "--device", "cpu"]) == 2
    assert "latents-32.arrow is damaged" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch._dynamo reads it
def test_watching_compiles_nothing() -> None:
    """Compiled whole, a block at a time or not at all: no graph more than without."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    one, loader = one_stage(), RandomRows(8)
    stage = one.stages[0]
    for whole in (True, False):
        torch.compiler.reset()
        dit = DiT(one.stage_model(stage, downscale=8))
        compiled = torch.compile(dit, backend=backend, dynamic=False) if whole else dit
        for block in () if whole else dit.blocks:
            block.compile(backend=backend, dynamic=False)
        counts = []
        for _ in range(3):
            (batch,) = feed(loader, one, stage, patches=dit.num_patches, data=[(0, 4)], device=torch.device("cpu"))
            network = conditioned(
                compiled, batch.text, batch.text_mask, precision="float32", mask_ratio=0.5, mask_noise=batch.mask_noise
            )
            network(batch.latents, batch.sigma_normal).sample.sum().backward()
            counts.append(len(graphs))
            expected = watch(dit, batch, recipe=one, stage=stage, mask_ratio=stage.mask_ratio)
            assert expected["activation_max"] > 0
        assert counts[0] > 0 and counts[1] == counts[2] == counts[0]
        graphs.clear()
