# All targets but gpu need only Python 3.10 or newer with venv: each sets up what it uses, and repeating a set-up does nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo
RESULTS ?= build/benchmarks.json
NVCC := $(or $(shell command -v nvcc 2>/dev/null),$(wildcard $(CUDA_HOME)/bin/nvcc))
CORE := tests/test_import.py tests/cli/test_core.py
COMPILER := $(firstword $(foreach name,$(CXX) c++ g++ clang++,$(shell command -v $(name) 2>/dev/null)))
KERNELS := $(VENV)/kernels$(if $(NVCC),-cuda)$(if $(COMPILER),-cpu)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-oldest slow lint bench gpu reproduce claims torture venv clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/installed ## segment a scene of things that the model was never trained on, by words
	$(BIN)/ovseg-fast demo --out $(DEMO)

test: lint venv ## linters, type checker, all tests but the slow ones, then the core with the oldest versions allowed
	$(BIN)/pytest -n auto --dist worksteal
	$(BIN)/python tests/oldest.py $(CORE)

test-oldest: $(VENV)/installed ## images, masks, CLI and operators with the oldest versions that pyproject.toml allows
	$(BIN)/python tests/oldest.py $(CORE) tests/cli/test_main.py tests/data tests/test_images.py tests/test_operators.py tests/ops

slow: venv ## the slow tests
	$(BIN)/pytest -m slow

lint: $(VENV)/installed ## ruff (rules and format), clang-format and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

bench: venv ## benchmarks: each checks that results agree, then times them; RESULTS=... names the JSON file
	@mkdir -p $(dir $(RESULTS))
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-json=$(RESULTS)

# Measures the PyTorch of the Python that is active, so it installs nothing but this package.
gpu: ## on a machine with a GPU: build, test every operator on it, time it, write benchmarks/results/<gpu>.json and plots
	$(PYTHON) -m pip install --no-build-isolation --no-deps -e .
	$(PYTHON) benchmarks/gpu.py $(GPU_OPTIONS)

reproduce: $(VENV)/installed ## train the tiny models from scratch and measure them: hours on a CPU; resumes if stopped
	$(BIN)/python -m ovseg_fast.tiny.reproduce --out build/reproduce --workers 1

claims: $(VENV)/installed ## the claims of both papers, tested small: about three hours of one core; resumes if stopped
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/claims.py

torture: $(VENV)/installed ## threads, kills and damaged files, at random: nothing is lost, wrong or half; some minutes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/torture/threads.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/torture/kills.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/torture/mutations.py

venv: $(VENV)/installed $(KERNELS) ## .venv with the package (editable), its tools and the native kernels; PYTHON=... chooses the Python

# torch first, by itself: the constraint decides which build, before anything that depends on torch is resolved.
$(VENV)/installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ovseg-fast needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt torch
	OVSEG_BUILD_CUDA=0 $(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The native kernels by themselves: pip would hide their messages and would not see that a source has changed. Without
# nvcc or a C++ compiler this says so; if one appears later, the file to make has another name.
$(KERNELS): $(VENV)/installed $(shell find csrc -type f)
	@$(BIN)/python setup.py --quiet build_native --inplace
	@touch $@

clean: ## remove everything that make made, the virtual environment too
	rm -rf $(VENV) build dist ovseg_fast.egg-info ovseg_fast/*.so .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find ovseg_fast kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
