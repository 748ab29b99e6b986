# Two commands do all the set-up on a fresh machine with Python, a C++ compiler and make:
#   make train    trains a small language model by GRPO through rlkern's kernels
#   make test     runs the tests
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Options of the training run and of pytest, for example ARGS="--seed 1".
ARGS ?=

BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
PYTEST := $(BIN)/pytest
# One build for both architectures of tests and training: what changed is compiled again.
INSTALL := $(BIN)/pip install --quiet --no-build-isolation --editable

.PHONY: train test test-slow test-triton bench sanitize lint clean

train: $(VENV)/.loops
	$(BIN)/rlkern train grpo $(ARGS)

test: $(VENV)/.test
	$(PYTEST) -m "not slow" --numprocesses 2 $(ARGS)

# Whole training runs and installs into fresh environments: half an hour on two cores.
test-slow: $(VENV)/.test
	$(PYTEST) -m slow --verbose $(ARGS)

# The Triton tests on another Triton than the environment's, from 3.6 to 3.9: make test-triton
# TRITON=3.6.0. The interpreters before 3.9 fail under NumPy 2.4.
TRITON ?= 3.6.0
test-triton: $(VENV)/.test
	$(BIN)/pip install --quiet --upgrade --no-deps --target build/triton-$(TRITON) \
	  triton==$(TRITON) "numpy<2.4"
	PYTHONPATH=build/triton-$(TRITON) $(PYTEST) tests/triton $(ARGS)

# Measures on this machine, keeps each case under benchmarks/results as it is done, and writes the
# pages and the README's table from all that is kept, where a test failed too. About half an hour
# alone on two cores; it says how long at the start. ARGS="--only whiten,value_loss" for some files
# of it, ARGS=--quick for a smoke test, under five minutes, that touches no kept result or page.
bench: $(VENV)/.test
	status=0; $(PYTEST) benchmarks --results machine $(ARGS) || status=$$?; \
	$(if $(filter --quick,$(ARGS)),,$(BIN)/python -m benchmarks.report || status=$$?;) \
	exit $$status

# The native tests under the address and undefined-behaviour sanitizers, and the emulated CUDA
# kernels under the address and thread sanitizers.
sanitize: $(VENV)/.test
	tests/native/sanitize.sh $(BIN)
	tests/cuda/sanitize.sh $(BIN)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf build dist rlkern/*.so rlkern/_build_info.json $(VENV)/.loops $(VENV)/.test

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" wheel "cmake>=3.26" ninja
	touch $@

$(VENV)/.loops: $(VENV)/.torch $(SOURCES)
	$(INSTALL) ".[loops]"
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(INSTALL) ".[dev]"
	touch $@ $(VENV)/.loops
