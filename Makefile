# Every command goes through .venv/bin/python: nothing needs to be activated.
#   make bench ARGS="--attention_type mka --epochs 5"      make test ARGS="tests/ops -x"

PYTHON_IN_VENV := .venv/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup bench test test-all check format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo '  Options for bench and test go into ARGS: make bench ARGS="--attention_type mka"'

setup: ## Create or update the environment in .venv
	@bash setup.sh

bench: setup ## Compare the attention mechanisms on Python's standard library
	$(PYTHON_IN_VENV) src/experiments/benchmark.py $(ARGS)

# One thread per worker, so that the two do not compete for the processor.
test: setup ## Run all tests except the slow ones
	OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -n 2 -m "not slow" $(ARGS)

test-all: setup ## Run all tests, including kill points, strategies and DeepSpeed
	OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -n 2 $(ARGS)

check: setup ## Check lint rules, formatting, types, and which module may import which
	$(PYTHON_IN_VENV) -m ruff check
	$(PYTHON_IN_VENV) -m ruff format --check
	$(PYTHON_IN_VENV) -m pyright
	$(PYTHON_IN_VENV) .venv/bin/lint-imports

format: setup ## Format the code and sort its imports
	$(PYTHON_IN_VENV) -m ruff check --fix-only
	$(PYTHON_IN_VENV) -m ruff format

clean: ## Remove caches and build files (.venv and runs/ are kept)
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist src/*.egg-info
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
