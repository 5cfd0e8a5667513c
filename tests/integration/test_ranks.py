"""One rank or several, whole or sharded, undisturbed or killed: the same training."""

import contextlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.ranks import BATCH, run, start, weights

from micro_diffusion.runtime.log import read_log

pytestmark = pytest.mark.slow
FSDP = {"parallel": "fsdp"}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["images"], row["loss"]) for row in read_log(folder / "log.jsonl")]


def positions(folder: Path, world: int) -> set[int]:
    """What the ranks of a run have read."""
    seen = [line.split() for path in folder.glob(f"seen-{world}-*") for line in path.read_text().splitlines()]
    return {position for first, count in seen for position in range(int(first), int(first) + int(count))}


def same_bits(one: Path, other: Path) -> bool:
    return all(
        torch.equal(value, weights(other, model)[name])
        for model in ("model-stage-1", "model")
        for name, value in weights(one, model).items()
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps on one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed_ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    run(folder, 2)
    return folder


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {"micro": 2}),
        (2, {}),
        (2, {"micro_batch": 2}),
        (2, FSDP),
        (2, {**FSDP, "micro_batch": 1, "activation_checkpointing": True}),
        (2, {**FSDP, "micro_batch": 2, "reshard": True}),
        (2, {**FSDP, "micro_batch": "auto"}),
        (2, {"parallel": "hybrid"}),
        (4, {"parallel": "hybrid", "machines": 2}),
    ],
)
def test_the_same_mathematics(undisturbed: Path, tmp_path: Path, ranks: int, settings: dict[str, Any]) -> None:
    run(tmp_path, ranks, **settings)
    assert [images for images, _ in losses(tmp_path)] == [BATCH * step for step in range(1, 21)]
    assert [loss for _, loss in losses(tmp_path)] == pytest.approx([loss for _, loss in losses(undisturbed)], rel=1e-5)
    assert positions(tmp_path, ranks) == set(range(BATCH * 20))
    for model in ("model-stage-1", "model"):
        expected, found = weights(undisturbed, model), weights(tmp_path, model)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("settings", "graphs"), [({}, 2), ({"micro_batch": 2, "activation_checkpointing": True}, 6), (FSDP, 4)]
)
def test_compiled_whole_or_in_parts(undisturbed: Path, tmp_path: Path, settings: dict[str, Any], graphs: int) -> None:
    """A graph in each of two stages; of each of three blocks to recompute them; of mixer and backbone to shard them."""
    run(tmp_path, 2, compile="aot_eager", **settings)
    assert dict(losses(tmp_path)) == pytest.approx(dict(losses(undisturbed)), rel=1e-5)
    for name, value in weights(undisturbed).items():
        torch.testing.assert_close(weights(tmp_path)[name], value, rtol=0, atol=1e-5, msg=name)
    assert int((tmp_path / "graphs.txt").read_text()) == graphs


@pytest.mark.parametrize(
    ("settings", "graphs"),
    [({}, range(4, 9)), ({"micro_batch": 2}, range(1, 2)), ({"micro_batch": "auto", "fits": 2}, range(1, 2))],
)
def test_the_compiler_cuts_where_a_bucket_of_gradients_is_full(
    tmp_path: Path, settings: dict[str, Any], graphs: range
) -> None:
    """If a step is one micro-batch; the gradients of several, also by trial, are reduced after the last."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, dim=256, stages=1)
    run(two, 2, dim=256, stages=1, compile="aot_eager", **settings)
    assert dict(losses(two)) == pytest.approx(dict(losses(one)), rel=1e-5)
    assert int((two / "graphs.txt").read_text()) in graphs


@pytest.mark.parametrize(("before", "ranks", "after"), [({}, 1, {}), (FSDP, 4, {}), ({}, 4, FSDP), (FSDP, 1, {})])
def test_another_number_of_ranks_goes_on(
    undisturbed: Path, tmp_path: Path, before: dict[str, str], ranks: int, after: dict[str, str]
) -> None:
    run(tmp_path, 2, fails=True, kill=("term", 1, 52), **before)
    assert losses(tmp_path)[-1][0] == 56
    run(tmp_path, ranks, **after)
    assert positions(tmp_path, 2) == set(range(56))
    assert positions(tmp_path, ranks) == set(range(56, BATCH * 20))
    assert dict(losses(tmp_path)) == pytest.approx(dict(losses(undisturbed)), rel=1e-5)
    for name, value in weights(undisturbed).items():
        torch.testing.assert_close(weights(tmp_path)[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments(undisturbed: Path, undisturbed_ddp: Path, tmp_path: Path, ranks: int) -> None:
    """Ten kills, at moments of wall-clock time that no seed fixes: the last run ends with the same bits."""
    chance = random.Random(ranks)
    for number in range(10):
        process, before = start(tmp_path, ranks, every=BATCH), len(losses(tmp_path))
        if number % 4 == 3:  # while it starts, or reads its checkpoint
            time.sleep(chance.uniform(1, 5))
        while number % 4 != 3 and len(losses(tmp_path)) <= before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if ranks > 1 else []
        process.kill()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), signal.SIGKILL)
        process.communicate()
    run(tmp_path, ranks, every=BATCH)
    undisturbed = undisturbed if ranks == 1 else undisturbed_ddp
    assert same_bits(tmp_path, undisturbed)
    assert losses(tmp_path) == losses(undisturbed)


def test_terminated_and_resumed(undisturbed_ddp: Path, tmp_path: Path) -> None:
    """SIGTERM to one rank alone: both save the same step and leave with the code of the signal."""
    printed = run(tmp_path, 2, fails=True, kill=("term", 1, 36))
    assert re.search(r"exitcode\s*: 143", printed)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000000000024", "000000000040"]
    run(tmp_path, 2)
    assert same_bits(tmp_path, undisturbed_ddp)


@pytest.mark.parametrize("kind", ["step", "save", "full"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_lost_or_a_full_disk(
    undisturbed: Path, undisturbed_ddp: Path, tmp_path: Path, kind: str, ranks: int
) -> None:
    """Killed at a step or while it saves, or out of disk: the checkpoint before is whole, and the run goes on there."""
    printed = run(tmp_path, ranks, fails=True, kill=(kind, ranks - 1, 48))
    if kind == "full":
        assert f"the checkpoint at 48 images could not be written (rank {ranks - 1}: [Errno 28]" in printed
        assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
    assert max(path.name for path in (tmp_path / "checkpoints").glob("0*")) in ("000000000024", "000000000048")
    run(tmp_path, ranks)
    assert same_bits(tmp_path, undisturbed if ranks == 1 else undisturbed_ddp)


def test_a_stuck_rank_and_a_stuck_loader_are_named(tmp_path: Path) -> None:
    printed = run(tmp_path / "one", fails=True, kill=("stuck", 0, 32), timeout=3.0)
    assert "the data loader of rank 0 has given nothing for 3 s" in printed
    printed = run(tmp_path / "two", 2, fails=True, kill=("stuck", 1, 32), timeout=5.0)
    assert "the data loader of rank 1 has given nothing for 5 s" in printed or "Ranks 1 failed to pass" in printed


def test_a_truncated_newest_checkpoint(undisturbed_ddp: Path, tmp_path: Path) -> None:
    run(tmp_path, 2, fails=True, kill=("term", 0, 52))
    newest = max((tmp_path / "checkpoints").glob("0*"))
    data = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:1000])
    printed = run(tmp_path, 2)
    assert "000000000056 is damaged" in printed and "8 images more are trained again" in printed
    assert (tmp_path / "checkpoints" / "damaged-000000000056").is_dir()
    assert same_bits(tmp_path, undisturbed_ddp)


def test_too_slow_a_save_ends_at_the_deadline(tmp_path: Path) -> None:
    started = time.monotonic()
    process = start(tmp_path, kill=("slow", 0, 56), deadline=2.0)
    while len(losses(tmp_path)) < 6 and time.monotonic() < started + 60:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert json.dumps("nothing saved within 2 s of SIGTERM")[1:-1] in err


def test_a_batch_that_does_not_divide(tmp_path: Path) -> None:
    assert "a batch of 8 does not divide among 3 ranks" in run(tmp_path, 3, fails=True)
