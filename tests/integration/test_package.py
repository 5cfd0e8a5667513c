"""What a user gets from the wheel, and what a packager gets from the source distribution."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "micro_diffusion" / "embedded"
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs", "quickstart")


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, built from a copy of the sources."""
    sources, out = tmp_path_factory.mktemp("sources") / "copy", tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, sources, ignore=LEFT_OUT)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, sources, cwd=sources)
    return out


def test_source_distribution_can_be_tested(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "CHANGELOG.md", "LICENSE", "NOTICE"} <= names
    assert {"tests/conftest.py", "tests/integration/test_package.py", "micro_diffusion/cli/main.py"} <= names


def test_wheel_holds_all_that_is_embedded(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert "\nLicense-Expression: Apache-2.0 AND MIT AND CC-BY-4.0\n" in metadata
    assert {name.rsplit("/", 1)[1] for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert "micro_diffusion/py.typed" in names
    files = {path for path in EMBEDDED.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert not [name for name in names if not name.startswith("micro_diffusion")]


def test_wheel_works_in_an_empty_environment(built: Path, tmp_path: Path) -> None:
    """Only the wheel is installed; its dependencies are lent by the environment that runs the tests."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    bin_ = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    wheel = next(built.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", bin_ / "python"]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(run(bin_ / "python", "-c", where, cwd=tmp_path).strip())
    dependencies = Path(str(distribution("torch").locate_file("")))
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")

    code = "import micro_diffusion.training.loop, micro_diffusion.models.model; print(micro_diffusion.__file__)"
    assert Path(run(bin_ / "python", "-c", code, cwd=tmp_path).strip()).is_relative_to(site_packages)
    assert "quickstart" in run(bin_ / "micro-diffusion", "--help", cwd=tmp_path)
