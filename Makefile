# `make test` and `make demo` set up everything they need in .venv; PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check lint types layers bench gpu gpu-report clean

$(STAMP): requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# Two files at a time: most of a test's time is Python's, and several start processes with threads of their own.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

layers: $(STAMP)
	$(BIN)/lint-imports --no-logo

check: lint types layers test

demo: $(STAMP)
	$(BIN)/python -m tilecast demo

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

# On a machine with a GPU, with the Python that has its PyTorch: no environment is built. ARGS="--minutes 8" and such.
GPU_PYTHON ?= python3
OUT ?= gpu-results

gpu:
	$(GPU_PYTHON) benchmarks/gpu/run.py --out $(OUT) $(ARGS)

gpu-report:
	$(GPU_PYTHON) benchmarks/gpu/report.py $(if $(wildcard $(OUT)),--collect $(OUT)) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
