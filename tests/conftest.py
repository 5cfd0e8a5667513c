"""What all tests share: no network, reproducible examples, a marker for each directory.

Unit tests check every annotated shape at every call, by a hook that must be in place before the package is imported and
that stays for the life of the process. Compiled code does not bear it, so unit tests have a process of their own:
`pytest` alone runs them, `pytest tests/parity tests/integration tests/gpu` the rest, `make test` both.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    directories = set()
    for item in items:
        directory = item.path.relative_to(TESTS).parts[0]
        directories.add(directory)
        item.add_marker(directory)
    if "unit" in directories and len(directories) > 1:
        raise pytest.UsageError("Run tests/unit in a pytest of its own: its shape checks last as long as the process.")
