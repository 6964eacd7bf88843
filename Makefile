# Everything here works on a fresh machine with Python 3.11 or newer: the first target run sets up .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FIRST := runs/quickstart/first

.DEFAULT_GOAL := help
.PHONY: help setup quickstart reproduce test test-all lint format tensorboard docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) --version) found; Python 3.11 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	@echo "setting up $(VENV) (once; a few minutes and about 6 GB, most of it PyTorch with CUDA)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(READY)  ## make the virtual environment and install the project into it

quickstart: $(READY)  ## train a small Mamba on the embedded digits (2 CPU cores: a minute or two)
	@if [ -f $(FIRST)/config.yaml ]; then $(BIN)/python ray_jobs/train.py --resume $(FIRST); \
	else $(BIN)/python ray_jobs/train.py --preset quickstart --trial $(notdir $(FIRST)); fi

reproduce: $(READY)  ## the best measured CIFAR-10 run (downloads it; 17 minutes of training on two H100, all GPUs are used)
	@$(BIN)/python ray_jobs/train.py --preset best_cifar10

test: $(READY)  ## run the tests but the long ones; some start a local Ray cluster
	@$(BIN)/python -m pytest -q -n auto -m "not long"

test-all: $(READY)  ## run all tests, killed sweeps and clusters of several nodes too
	@$(BIN)/python -m pytest -q -n auto

lint: $(READY)  ## ruff (lint and format) and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(READY)  ## let ruff fix what it can
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

tensorboard: $(READY)  ## compare the runs under runs/ at http://localhost:6006
	@$(BIN)/tensorboard --logdir runs

docs: $(READY)  ## build all pages and the API reference into build/docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet && echo "open build/docs/index.html"

clean:  ## remove the virtual environment and caches (not runs/ and data/)
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
