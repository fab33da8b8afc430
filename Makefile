# Two commands: `make demo` and `make test`. Both set up .venv on their own.
# `make matrix` runs every cell of docs/matrix.md and every set-up of docs/zoo.md, and writes both;
# it goes on where it was stopped.
# `make gpu` measures on a GPU with what is installed: the Python of .venv, else $(PYTHON).
PYTHON ?= python3
# Processes that run tests side by side.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test matrix gpu lint pytest

demo: $(VENV)/.demo
	$(BIN)/python recipes/quickstart.py

test: $(VENV)/.dev
	$(MAKE) --no-print-directory --jobs 2 lint pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

pytest: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

matrix: $(VENV)/.dev
	$(BIN)/python -m tests.contracts.matrix
	$(BIN)/python -m tests.zoo

gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu --minutes 9

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "defend needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
