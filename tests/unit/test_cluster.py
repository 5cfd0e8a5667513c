"""The launch files in docs/cluster: their syntax, and flags that `train` and `torchrun` have."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from micro_diffusion.cli import main as cli

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


def flags(text: str) -> tuple[set[str], set[str]]:
    """Flags given to torchrun, and to `micro-diffusion train`."""
    command = re.sub(r"\\\n", " ", text).partition("torchrun ")[2].partition("\n")[0]
    launcher, found, train = command.partition("-m micro_diffusion train")
    assert found
    return tuple(set(re.findall(r"(?<!\S)--[a-z][a-z-]*", part)) for part in (launcher, train))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["slurm", "sky run", "sky setup"])
def test_bash_can_read_it(name: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=scripts()[name], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("name", ["slurm", "sky run"])
def test_every_flag_exists(name: str, train_flags: set[str]) -> None:
    launcher, train = flags(scripts()[name])
    assert {"--store", "--run"} <= train
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert launcher <= known
    assert train - train_flags <= (PARALLEL if not PARALLEL & train_flags else set())


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
    stand_ins = {
        "scontrol": 'case "$1" in show) echo one;; *) echo "scontrol $*" >> calls;; esac',
        "scancel": 'echo "scancel $*" >> calls; kill -TERM "$(cat pid)"',
        "srun": 'echo $$ > pid; trap "sleep 0.2; echo saved >> calls; exit 143" TERM; '
        'kill -USR1 "$PPID"; for i in $(seq 100); do sleep 0.05; done',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "one,two",
    }  # fmt: skip
    ended = subprocess.run(
        ["bash", FOLDER / "slurm.sh", "emoji", "run", "store"], cwd=tmp_path, env=environment, timeout=30
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
