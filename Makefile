# `make test` and `make demo` set up everything they need in .venv; PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all check lint types layers bench versions gpu gpu-report clean

$(STAMP): requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

install: $(STAMP)

# Two files at a time: most of a test's time is Python's, and several start processes with threads of their own.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

# All families, targets, damaged files and mixes besides: twice the time.
test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

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

# The adapter's tests with other versions of transformers, each in a folder of its own over the same environment.
VERSIONS ?= 5.17.0 5.20.2 5.23.0
ADAPTER := $(wildcard tests/engine/test_transformers*.py)

build/versions/%/.installed: requirements/dev.txt | $(STAMP)
	mkdir -p $(@D)
	grep -vE '^(transformers|huggingface_hub)=' requirements/dev.txt > $(@D)/constraints.txt
	$(BIN)/python -m pip install --quiet --upgrade --target $(@D) --constraint $(@D)/constraints.txt transformers==$*
	touch $@

versions: $(VERSIONS:%=build/versions/%/.installed)
	for version in $(VERSIONS); do \
	  echo "transformers $$version"; \
	  PYTHONPATH=build/versions/$$version $(BIN)/python -m pytest -q $(ADAPTER) || exit 1; \
	done

# On a machine with a GPU, with the Python that has its PyTorch: no environment is built. ARGS="--minutes 8" and such.
GPU_PYTHON ?= python3
OUT ?= gpu-results

gpu:
	$(GPU_PYTHON) benchmarks/gpu/run.py --out $(OUT) $(ARGS)

gpu-report:
	$(GPU_PYTHON) benchmarks/gpu/report.py $(if $(wildcard $(OUT)),--collect $(OUT)) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
