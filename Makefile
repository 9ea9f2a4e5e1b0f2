# Needs python3 (3.10 or newer), pip and make; everything else goes into $(VENV).
#   make demo PYTHON=python3.12          another interpreter
#   make demo PIP_ARGS="--index-url ..." another package index, e.g. one with CPU or CUDA builds of torch
#   make test PYTEST_ARGS="-k lokr"      a part of the tests

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?= -n auto
BENCH_ARGS ?= --markdown docs/benchmarks.md
COMPARE_ARGS ?= --out comparison-output --markdown docs/adapters-compared.md
MODELS_ARGS ?= --json docs/benchmarks.json --chart docs/images/benchmarks.png --markdown docs/benchmarks.md --readme README.md

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow quality style bench bench-models compare notebooks clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

demo: export HF_HUB_OFFLINE = 1
demo: $(VENV)/.installed-core  ## install, then train and draw with the embedded model
	$(BIN)/lycoris-diff demo

test: export HF_HUB_OFFLINE = 1
test: $(VENV)/.installed-test  ## the quick tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: export HF_HUB_OFFLINE = 1
test-slow: $(VENV)/.installed-test  ## the slow tests only
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

quality: $(VENV)/.installed-dev  ## lint, format check and types; changes nothing
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

style: $(VENV)/.installed-dev  ## fix what can be fixed and format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(VENV)/.installed-bench  ## measure single layers against PEFT and LyCORIS
	$(BIN)/python scripts/benchmark_layers.py $(BENCH_ARGS)

bench-models: $(VENV)/.installed-bench  ## measure whole models, hours of it; goes on where it was interrupted
	$(BIN)/python scripts/benchmark.py $(MODELS_ARGS)
	$(BIN)/python scripts/benchmark_operations.py --markdown docs/benchmarks.md
	$(BIN)/python scripts/benchmark_compiled.py --markdown docs/benchmarks.md

compare: $(VENV)/.installed-bench  ## compare all adapters on the embedded model, hours of it; goes on where it was interrupted
	$(BIN)/python scripts/compare_adapters.py $(COMPARE_ARGS)

notebooks: $(VENV)/.installed-test  ## run the notebooks and keep what they show
	$(BIN)/python scripts/run_notebooks.py

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# --- installation: one stamp file for each set of extras, renewed when the dependencies change

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is %d.%d; try: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-core: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[$*]"
	@touch $@
