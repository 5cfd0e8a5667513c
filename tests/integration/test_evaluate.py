"""Pictures for metrics from processes of their own: by one rank or two, killed or not, and while a model is trained."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from integration.command_line import ROOT, make_autoencoder, make_pictures, tiny_recipe
from tiny_parts import dit_config, write_autoencoder, write_text_encoder

from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.models.checkpoints import ModelCard, Part, write_folder
from micro_diffusion.models.dit import DiT

SCRIPT = '''
"""The command line with one more benchmark; it dies half-way through the picture DIE_AT."""
import os, signal, sys
from micro_diffusion.cli import evaluate
from micro_diffusion.evaluation import generate
from micro_diffusion.cli.main import main
from micro_diffusion.evaluation.pictures import Prompt, Scores

class Count:
    def prompts(self):
        return [Prompt("a red apple" + ", in green style" * (index % 3), index) for index in range(40)]

    def score(self, pictures, device):
        assert len(list(pictures)) == len(pictures.prompts)
        return Scores("Counts pictures.", {"count": len(pictures)})

def save(file, picture, save=generate._save):
    if file.name == os.environ.get("DIE_AT"):
        file.with_name(".tmp-" + file.name).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(file, picture)

generate._save = save
evaluate.BENCHMARKS["count"] = lambda weights, prompts: Count()
sys.exit(main(sys.argv[1:]))
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("script") / "script.py"
    file.write_text(SCRIPT)
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    parts = write_autoencoder(folder / "autoencoder"), write_text_encoder(folder / "text")
    torch.manual_seed(0)
    dit = DiT(dit_config())
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    autoencoder, text = (Part(str(part), None) for part in parts)
    write_folder(
        folder / "model", dit.state_dict(), card=ModelCard(dit.config, EDM(), autoencoder, text, 32, 0, "tiny")
    )
    return folder / "model"


def start(script: Path, *arguments: str | Path, ranks: int = 1) -> subprocess.Popen[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launch, str(script), *map(str, arguments), "--device", "cpu"],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(script: Path, *arguments: str | Path, ranks: int = 1) -> str:
    process = start(script, *arguments, ranks=ranks)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_ranks_and_kills_do_not_change_a_byte(
    script: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("evaluate", model, "--benchmark", "count", "--steps", "8", "--batch-size", "2", "--out")
    assert re.search(r"guidance 3, count \(Counts pictures.\):\n  40 +count", run(script, *ask, tmp_path / "one"))
    printed = run(script, *ask, tmp_path / "two", ranks=2)
    assert printed.count("Counts pictures.") == 1  # rank 0 alone tells
    drawn = contents(tmp_path / "one" / "guidance-3")
    assert len(drawn) == 42 and contents(tmp_path / "two" / "guidance-3") == drawn

    monkeypatch.setenv("DIE_AT", "000019.png")
    process, folder = start(script, *ask, tmp_path / "killed", ranks=2), tmp_path / "killed" / "guidance-3"
    process.communicate(timeout=300)
    monkeypatch.delenv("DIE_AT")
    assert process.returncode and (folder / ".tmp-000019.png").exists()
    there = {path: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.png")}
    assert 0 < len(there) < 40
    run(script, *ask, tmp_path / "killed")
    assert contents(folder) == drawn and all(path.stat().st_mtime_ns == when for path, when in there.items())


def test_training_is_scored_on_its_way(script: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 60)
    make_autoencoder(tmp_path / "autoencoder")
    recipe = replace(tiny_recipe(tmp_path / "autoencoder"), validate_every=0, evaluate_every=160)
    (tmp_path / "tiny.json").write_text(recipe.to_json())
    command = ("train", tmp_path / "tiny.json", "--source", tmp_path / "pictures", "--run", tmp_path / "run")
    process = start(script, *command)
    assert "evaluate_every does nothing without --evaluate" in process.communicate(timeout=300)[1]
    assert process.returncode == 2
    run(script, *command, "--evaluate", "count,3")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    scored = {row["images"]: row["evaluation/count"] for row in rows if "evaluation/count" in row}
    assert scored == {160: 3, 240: 3, 320: 3, 480: 3}
    assert len(list((tmp_path / "run" / "evaluation").glob("*.png"))) == 3
