"""Training on several GPUs of one machine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from integration.ranks import run

from micro_diffusion.runtime.log import read_log


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"parallel": "ddp"}),
        (2, {"parallel": "ddp", "micro_batch": 2}),
        (2, {"parallel": "fsdp", "micro_batch": 2}),
        (2, {"parallel": "fsdp", "micro_batch": 2, "reshard": True, "activation_checkpointing": True}),
        (4, {"parallel": "hybrid", "machines": 2}),
    ],
)
def test_a_step_as_one_cuda_graph_is_the_same_step(tmp_path: Path, ranks: int, settings: dict[str, Any]) -> None:
    """With averages, pictures and checkpoints between the steps of two stages."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    for name, graph in (("launches", False), ("graph", True)):
        run(tmp_path / name, ranks, device="cuda", steps=16, cuda_graph=graph, **settings)
        assert int((tmp_path / name / "graphs.txt").read_text()) == 2 * graph
    expected, found = (read_log(tmp_path / name / "log.jsonl") for name in ("launches", "graph"))
    assert len(expected) == len(found) == 32
    for a, b in zip(expected, found, strict=True):
        assert (a["images"], a["skipped"]) == (b["images"], b["skipped"])
        for name in ("loss", "grad_norm", "weight_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), (a["images"], name)
