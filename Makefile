# Every target sets up all it needs in a virtual environment of its own.
# Another interpreter or place: make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help test lint fuzz sweep demo adapters bench quality gpu clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

test: lint ## lint, then every test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

lint: $(VENV)/.installed-test ## style and types: ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/.installed-test ## random inputs to ops, configs, files and models for five minutes; ARGS="--seconds 60 --only ops"
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(ARGS)

sweep: $(VENV)/.installed-test ## every model type of transformers: convert, compare, save, restore; results in docs/architectures.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.sweep $(ARGS)

# Threads that wait for each other without spinning cost nothing on idle cores and save minutes on busy ones.
demo: $(VENV)/.installed-bench ## train a small language model in every variant; outputs in build/demo
	@OMP_WAIT_POLICY=passive $(BIN)/python examples/train_text.py --out build/demo $(ARGS)

adapters: $(VENV)/.installed-bench ## fine-tune the demo's model with adapters; outputs in build/adapters
	@OMP_WAIT_POLICY=passive $(BIN)/python examples/finetune_adapters.py --out build/adapters $(ARGS)

bench: $(VENV)/.installed-bench $(VENV)/.installed-encoder ## measure on this machine, in 20 minutes; ARGS=--long adds the cases that take minutes each
	$(BIN)/python -m benchmarks.run --repeats 5 --out benchmarks/results/cpu $(ARGS)
	$(BIN)/python -m benchmarks.tables

quality: $(VENV)/.installed-bench ## losses and variances of training, an hour and a half; goes on where it was stopped
	$(BIN)/python -m benchmarks.run --suite quality --out benchmarks/results/cpu $(ARGS)
	$(BIN)/python -m benchmarks.tables

# For a machine that is lent for minutes: no virtual environment, no network. It uses the packages that PYTHON has.
gpu: ## on a GPU machine: tests, cases and tiles into OUT=DIR; PART=tests|bench|tune, WHEELS=DIR, DEVICE=cpu (dry run)
	@$(PYTHON) -m benchmarks.gpu --out '$(OUT)' --part $(or $(PART),all) $(if $(WHEELS),--wheels '$(WHEELS)') \
		$(if $(filter cpu,$(DEVICE)),--device cpu --tiny,--install) $(ARGS)

clean: ## remove what was built, not the virtual environment
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis memsave/_libmemsave.*
	find memsave tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed-*

# "%" is the extra to install. torch comes first and from constraints.txt; everything else follows by range.
# The editable install compiles the native library where there is a C++ compiler, hence the dependency on csrc.
$(VENV)/.installed-%: pyproject.toml constraints.txt $(wildcard setup.py csrc/*) | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
