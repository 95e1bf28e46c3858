# Each target sets up what it needs: a fresh clone, Python 3.11 or newer and make are enough.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
QUICK ?=
WORK ?= dpo
ARGS ?=
# Two busy thread pools on shared cores can collapse: idle threads must not spin.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
# Two workers of one thread each: tiny models gain nothing from more. Nothing is fetched in tests.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2

.PHONY: setup fmt check test test-oldest slow clients vllm bench cuda demo

setup: $(READY)

# torch first and alone: pip then takes the wheel that your index has for this machine.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,demo]'
	touch $@

fmt: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/test_rules.py

test: setup
	$(PYTEST) -m "not slow and not clients and not vllm"

# The oldest torch and Transformers that pyproject.toml admits, in an environment of their own.
OLDEST := .venv-oldest
CORE := tests/losses tests/models tests/generation tests/training tests/data

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt torch==2.11.0
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e . \
		pytest pytest-timeout pytest-xdist beartype
	touch $@

test-oldest: $(OLDEST)/.ready
	$(subst $(BIN),$(OLDEST)/bin,$(PYTEST)) -m "not slow" $(CORE)

slow: setup
	$(PYTEST) -m "slow and not clients and not vllm"

clients: setup  # several GB of other programs, under build/clients
	$(BIN)/python -m pytest -q -s -m clients tests/clients

vllm: setup  # a vLLM server under build/clients (3.4 GB), and SmolLM2 in prefloop's cache
	$(BIN)/prefloop fetch-model
	$(BIN)/python -m pytest -q -s -m vllm tests/rollouts

bench: setup
	$(BIN)/python -m benchmarks $(WORK) $(ARGS)

cuda: setup
	$(BIN)/python -m benchmarks.cuda $(ARGS)

demo: setup  # alone on the machine: threads wait as the command line has them wait
	env -u GOMP_SPINCOUNT $(BIN)/prefloop demo $(if $(QUICK),--quick)
