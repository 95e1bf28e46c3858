# Each target sets up what it needs: a fresh clone, Python 3.11 or newer and make are enough.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
QUICK ?=
# Two busy thread pools on shared cores can collapse; idle threads must not spin.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

.PHONY: setup fmt check test slow bench demo

setup: $(STAMP)

# torch first and by its exact version, so that pip takes the wheel your index offers for this machine.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

fmt: setup
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

check: setup
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/test_rules.py

# One thread for each of two workers: tiny models gain nothing from more.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "not slow"

slow: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m slow

bench: setup
	$(BIN)/python -m benchmarks

demo: setup
	$(BIN)/prefloop demo $(if $(QUICK),--quick)
