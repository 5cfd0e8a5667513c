"""The launch files in docs/cluster: their syntax, and flags that `train` and `torchrun` have."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from torch.distributed.run import get_args_parser

from micro_diffusion.cli import main as cli
from micro_diffusion.cli.train import Train

FOLDER = Path(__file__).parents[2] / "docs" / "cluster"
PARALLEL = {"--parallel", "--deadline", "--keep", "--keep-every"}  # these come together


def sky() -> dict[str, Any]:
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    assert isinstance(task, dict)
    return task


def scripts() -> dict[str, str]:
    return {"slurm": (FOLDER / "slurm.sh").read_text(), "sky run": sky()["run"], "sky setup": sky()["setup"]}


@pytest.fixture
def train_flags(capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out))


def stand_in(folder: Path, **commands: str) -> None:
    """Commands of those names that do what the bash says."""
    for name, body in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)


def environment(folder: Path) -> dict[str, str]:
    return {
        "PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "one,two", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.1",
        "RECIPE": "emoji", "STORES": "a b", "PRICE": "1.50",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["slurm", "sky run", "sky setup"])
def test_bash_can_read_it(name: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=scripts()[name], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("name", ["slurm", "sky run"])
def test_what_is_called_has_those_flags(name: str, train_flags: set[str], tmp_path: Path) -> None:
    stand_in(tmp_path, scontrol="echo one", srun='shift; "$@"', torchrun='printf "%s\\n" "$@" > called')
    subprocess.run(
        ["bash", "-s", "emoji", "run", "a", "b"],
        input=scripts()[name], text=True, cwd=tmp_path, env=environment(tmp_path), check=True,
    )  # fmt: skip
    called = (tmp_path / "called").read_text().splitlines()
    launcher = get_args_parser().parse_args(called)
    assert (launcher.training_script, launcher.module) == ("micro_diffusion", True)
    assert launcher.nproc_per_node == "8"
    verb, *arguments = launcher.training_script_args
    assert verb == "train"
    coming = PARALLEL - train_flags
    assert coming in (set(), PARALLEL)  # all of them, or not yet
    for flag in coming & set(arguments):
        place = arguments.index(flag)
        arguments[place : place + 2] = []
    train = tyro.cli(Train, args=arguments)
    assert train.recipe == "emoji" and list(train.store) == ["a", "b"]


def test_the_job_asks_for_its_own_end_and_goes_back_into_the_queue() -> None:
    text = scripts()["slurm"]
    options = dict(re.findall(r"^#SBATCH (--[a-z-]+)=?(\S*)", text, re.MULTILINE))
    number, seconds = re.fullmatch(r"B:(\w+)@(\d+)", options["--signal"]).groups()  # type: ignore[union-attr]
    deadline, patience = (
        int(re.search(pattern, text)[1])  # type: ignore[index]
        for pattern in (r"--deadline (\d+)", r"SHUTDOWN_TIMEOUT=(\d+)")
    )
    assert deadline < patience < int(seconds)
    assert re.search(rf"^trap .*scancel --signal=TERM .* {number}\b", text, re.MULTILINE)
    assert "--requeue" in options and "scontrol requeue" in text
    assert text.index("#SBATCH --output") < text.index("set -euo")  # Slurm reads options before the first command


def test_a_step_that_saves_on_the_signal_is_waited_for_and_requeued(tmp_path: Path) -> None:
    """The script itself, with stand-ins for Slurm's commands that write down how they are called."""
    stand_in(
        tmp_path,
        scontrol='case "$1" in show) echo one;; *) echo "scontrol $*" >> calls;; esac',
        scancel='echo "scancel $*" >> calls; kill -TERM "$(cat pid)"',
        srun='echo $$ > pid; trap "sleep 0.2; echo saved >> calls; exit 143" TERM; '
        'kill -USR1 "$PPID"; for i in $(seq 100); do sleep 0.05; done',
    )
    ended = subprocess.run(
        ["bash", FOLDER / "slurm.sh", "emoji", "run", "store"], cwd=tmp_path, env=environment(tmp_path), timeout=30
    )
    assert ended.returncode == 143
    assert (tmp_path / "calls").read_text().splitlines() == ["scancel --signal=TERM 7.0", "saved", "scontrol requeue 7"]


def test_skypilot_names_what_it_needs() -> None:
    task = sky()
    assert task["resources"]["use_spot"] is True
    assert task["num_nodes"] == 1
    (mount,) = task["file_mounts"]
    assert task["file_mounts"][mount]["mode"] == "MOUNT_CACHED"
    assert f'--run "{mount}/' in task["run"]
    used = set(re.findall(r"\$([A-Z_]+)", task["run"]))
    assert {name for name in used if not name.startswith("SKYPILOT_")} == set(task["envs"])
