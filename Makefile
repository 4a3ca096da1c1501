.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

# Where there is no NVIDIA GPU, the torch of constraints-cpu.txt; otherwise any torch that will do.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
CONSTRAINTS := $(if $(filter-out 0,$(GPU)),,-c constraints-cpu.txt)
TORCH ?= $(if $(filter-out 0,$(GPU)),torch>=2.11,torch==2.13.0)
TORCH_INDEX ?=
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=

# Threads that wait without spinning: three times faster where other work shares the cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: help install check test gpu demo clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: PYTHON (python3), VENV (.venv), TORCH (a requirement, torch==2.13.0),"
	@echo "  TORCH_INDEX (URL of a package index that holds CPU builds of torch), PIP_ARGS,"
	@echo "  PYTEST_ARGS, DEMO_ARGS (DEMO_ARGS=\"--steps 8 --prompts butterfly 'lion face'\")."

install: $(STAMP) ## Make .venv with everything the other targets need

$(STAMP): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "permuquant needs Python 3.11 or later, and $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	  "name another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) $(CONSTRAINTS) \
	  --config-settings editable_mode=compat -e '.[dev]'
	@touch $@

check: $(STAMP) ## Lint, format and types: ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(STAMP) ## All tests but those for a GPU, two at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu" $(PYTEST_ARGS)

gpu: $(STAMP) ## The tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

demo: $(STAMP) ## Paint with emoji-flux in bf16 and in 4 bits: a table, pictures, a report
	$(BIN)/permuquant demo $(DEMO_ARGS)

clean: ## Remove the environment, caches and outputs
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
