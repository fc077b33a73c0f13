# Everything needs only a Python (3.10 or newer) with venv: each target sets up what it uses, and a repeated set-up is a no-op.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo
RESULTS ?= build/benchmarks.json
NVCC := $(or $(shell command -v nvcc 2>/dev/null),$(wildcard $(CUDA_HOME)/bin/nvcc))
KERNELS := $(VENV)/kernels-$(if $(NVCC),built,without-nvcc)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test slow lint bench gpu demo reproduce claims clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

venv: $(VENV)/installed $(KERNELS) ## virtual environment in .venv with the package (editable) and its tools; PYTHON=... chooses the Python

# torch first and by itself: the constraint decides which one, before anything that depends on it is looked at.
$(VENV)/installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ovseg-fast needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt torch
	OVSEG_BUILD_CUDA=0 $(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The CUDA kernels by themselves: pip would hide what is said, and would not see that a kernel has changed. Where there is
# no nvcc it says so; where one appears later, the file waited for is another.
$(KERNELS): $(VENV)/installed $(shell find csrc -type f)
	@$(BIN)/python setup.py --quiet build_native --inplace
	@touch $@

test: lint ## linter, type checker, then all tests but the slow ones
	$(BIN)/pytest -n auto --dist worksteal

slow: venv ## the slow tests
	$(BIN)/pytest -m slow

lint: venv ## ruff (rules and format), clang-format and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

bench: venv ## benchmarks: each checks that the results agree, then times them; RESULTS=... names the JSON file
	@mkdir -p $(dir $(RESULTS))
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-json=$(RESULTS)

# On a machine with a GPU, in the Python that is active: its PyTorch is the one to measure, so nothing is installed but
# this package itself.
gpu: ## on a machine with a GPU: build, test every operator on it, time it, write benchmarks/results/<gpu>.json and plots
	$(PYTHON) -m pip install --no-build-isolation --no-deps -e .
	$(PYTHON) benchmarks/gpu.py $(GPU_OPTIONS)

demo: venv ## segment a scene with classes that the model was never trained on, by words
	$(BIN)/ovseg-fast demo --out $(DEMO)

reproduce: venv ## train the tiny models of the package again and measure them: hours on a CPU; goes on where it was stopped
	$(BIN)/python -m ovseg_fast.tiny.reproduce --out build/reproduce --workers 1

claims: venv ## the claims of both papers, tested small: about three hours of a core; goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/claims.py

clean: ## remove everything that make made, the virtual environment too
	rm -rf $(VENV) build dist ovseg_fast.egg-info ovseg_fast/libovseg.so .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find ovseg_fast kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
