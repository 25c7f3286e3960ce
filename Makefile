# Two commands for a fresh machine with Python 3.10+ and git: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test nodes processors lint docs bench clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.installed ## install into .venv and run jobs/quickstart.yaml
	$(BIN)/fleetune run jobs/quickstart.yaml

test: $(VENV)/.tested ## install into .venv and run the tests
	$(BIN)/python -m pytest

nodes: $(VENV)/.tested ## the tests on several nodes and servers, which `make test` leaves out
	$(BIN)/python -m pytest -n 0 -m nodes

processors: $(VENV)/.tested ## the numeric tests at each level of instructions that this processor has (ARGS=--short: few)
	$(BIN)/python tests/processors.py $(ARGS)

lint: $(VENV)/.developed ## formatter, linter, type checker
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.tested ## write the generated pages of docs/ and the README's tree
	$(BIN)/python docs/generate.py

bench: $(VENV)/.tested ## measure the engine (benchmarks/README.md says what else there is)
	$(BIN)/python benchmarks/engine.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

$(VENV)/.developed: $(VENV)/.tested
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@
