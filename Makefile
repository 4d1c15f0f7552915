# What a person does with the checkout. It needs python3 (3.11 or newer) and make; the rest goes into .venv.
#   make install PYTHON=python3.12     another interpreter
#   make test ARGS="-k kernels"        arguments for pytest
#   make speed ARGS="--minutes 14"     arguments for experiments/speed.py

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
# A process per core; a file's tests stay together, for the nets that they share.
SPREAD := -n auto --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install quickstart speed test test-slow test-lowest test-gpu test-slurm lint format typecheck wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install the project with all it needs

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed; make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[train,dev]'
	touch $(STAMP)

quickstart: install ## train a small octic ViT on the embedded digits and show what it learnt
	$(BIN)/python experiments/quickstart.py

speed: install ## measure the speed table of this machine
	$(BIN)/python experiments/speed.py $(ARGS)

test: lint typecheck ## lint, types and the fast tests
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

test-slow: install ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not slurm" $(SPREAD) $(ARGS)

test-lowest: ## the fast tests with the lowest versions that pyproject.toml asks for, in an environment of their own
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PYTHON) .ci/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[train,dev]' --constraint $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pytest $(SPREAD) $(ARGS)

test-gpu: install ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-slurm: install ## tests on a throwaway Slurm (as root on Debian or Ubuntu; installs its packages)
	@.ci/install_slurm $(BIN)/python
	$(BIN)/python -m pytest -m slurm -rs $(ARGS)

lint: install ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## mend style and format where a machine can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: install ## check the types of the library folders
	$(BIN)/mypy

wheel: install ## build a wheel of octic and vit into dist/
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

clean: ## remove what builds and tests leave behind; .venv, runs and data stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
