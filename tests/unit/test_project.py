"""Promises that the repository makes about itself: what is imported when, how large things are, what no file says."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from micro_diffusion.runtime.random import draw_normal

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "micro_diffusion"
MODULES = sorted(PACKAGE.rglob("*.py"))
LOOP = PACKAGE / "training" / "loop.py"


def test_shapes_and_types_are_checked_in_unit_tests() -> None:
    with pytest.raises(TypeCheckError):
        draw_normal(0, "a test", torch.zeros(2, 2, dtype=torch.int64))


def imported_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after `code`."""
    report = "\nimport sys; print('\\n', *{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "module",
    ["training.loop", "training.hooks", "models.dit", "models.presets", "diffusion.objectives", "diffusion.samplers"],
)
def test_model_and_training_need_little_more_than_torch(module: str) -> None:
    heavy = {"diffusers", "transformers", "datasets", "tyro", "rich", "tensorboard"}
    assert not imported_by(f"import micro_diffusion.{module}") & heavy


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["generate", "--help"],
        ["evaluate", "--help"],
        ["runs", "--help"],
        ["plan", "--help"],
    ],
)
def test_help_imports_no_library_that_takes_seconds(arguments: list[str]) -> None:
    code = f"""
from micro_diffusion.cli.main import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code
"""
    assert not imported_by(code) & {"torch", "diffusers", "transformers", "datasets", "pyarrow", "numpy", "PIL"}


def test_no_file_names_a_machine_or_a_registry() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    machine = r"(?<![\w.~\])}])/(work|home|root|mnt|opt|scratch|Users)/"
    registry = r"\b(pypi\.org|pythonhosted|registry\.npmjs|download\.pytorch\.org|(extra-)?index-url|find-links)\b"
    pattern = re.compile(f"{machine}|{registry}")
    files = [ROOT / name for name in listed.stdout.split("\0") if name and ROOT / name != Path(__file__)]
    said = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path.is_file() and b"\0" not in (content := path.read_bytes())
        for number, line in enumerate(content.decode().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not said


def test_what_ships_stays_small() -> None:
    embedded = sum(path.stat().st_size for path in (PACKAGE / "embedded").rglob("*") if path.is_file())
    assert embedded < 46e6


def lines_of_code(text: str) -> int:
    """Lines without blank ones, comments and docstrings."""
    skipped = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                skipped |= set(range(first.lineno, (first.end_lineno or 0) + 1))
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(number not in skipped and line[:1] not in ("", "#") for number, line in lines)


def test_lines_of_code_are_counted_as_they_should_be() -> None:
    assert (
        lines_of_code('"""What\n\nfor."""\n\n# why\nx = """a\nb"""  # so\n\ndef f():\n    "one"\n    return 1\n') == 4
    )


def test_modules_and_functions_stay_short() -> None:
    lines = {path: path.read_text().splitlines() for path in MODULES}
    assert sum(lines_of_code(path.read_text()) for path in MODULES) < 8000
    assert not {path.relative_to(ROOT): len(each) for path, each in lines.items() if len(each) >= 400}
    long = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length >= (200 if path == LOOP else 60):
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert not long


def test_no_module_is_empty_and_no_package_has_code_of_its_own() -> None:
    sizes = {path: len(ast.parse(path.read_text()).body) for path in MODULES}
    assert not [path for path, statements in sizes.items() if not statements]
    packages = {path for path in MODULES if path.name == "__init__.py" and path.parent.parent == PACKAGE}
    assert not [path.relative_to(ROOT) for path in packages if sizes[path] > 1]
