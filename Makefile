# Needs Python 3.11 or newer and make, nothing else: every target sets up what it uses in .venv.

PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/.ready
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadscope
UNIT   := tests/unit
OTHERS := tests/parity tests/integration tests/gpu

.PHONY: help setup lint format test test-slow quickstart clean

help:
	@echo "make quickstart   train a small model on this machine and draw pictures with it (about 10 minutes)"
	@echo "make test         lint, then the fast tests"
	@echo "make test-slow    the slow tests"
	@echo "make format       put the code into the house's format"
	@echo "make setup        only the virtual environment, .venv"
	@echo "make clean        remove what tests and builds left behind (.venv stays)"

setup: $(READY)

# torch comes first, in a step of its own: the large download, and what everything else is resolved against.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "micro-diffusion needs Python 3.11 or newer and '$(PYTHON)' is not: name one, as in 'make PYTHON=python3.12'." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { echo "The virtual environment could not be made; on Debian and Ubuntu 'apt install python3-venv' provides what is missing." >&2; exit 1; }
	$(PIP) setuptools torch torchvision
	$(PIP) --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip check
	@touch $@

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Two processes: unit tests check shapes at every call, which compiled code does not bear (tests/conftest.py).
test: lint
	$(PYTEST) --timeout 120 -m "not slow" $(UNIT)
	$(PYTEST) --timeout 300 -m "not slow" $(OTHERS)

# pytest ends with 5 where nothing is slow.
test-slow: $(READY)
	$(PYTEST) --timeout 1800 -m slow $(UNIT) || [ $$? -eq 5 ]
	$(PYTEST) --timeout 1800 -m slow $(OTHERS)

quickstart: $(READY)
	$(BIN)/micro-diffusion quickstart

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find micro_diffusion tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} +
