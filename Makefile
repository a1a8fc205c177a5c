# Everything happens in .venv; nothing is installed globally. `make demo` and `make test` each set it up first.
# On Linux pip fetches torch with CUDA; for a CPU-only one: make setup PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.unpaint-setup

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-slurm test-kills lint format clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with the exact versions of constraints.txt (does nothing if it is up to date)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "unpaint needs Python 3.11 or newer, and '$(PYTHON)' is not: make setup PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev,slurm,sweep]'
	@touch $@

demo: setup ## Erase "cat" from the built-in model with ESD, evaluate, print the table (minutes on a laptop)
	$(BIN)/unpaint run concept=cat method=esd evaluator=quick

test: setup lint ## Lint, types and the fast tests
	$(BIN)/python -m pytest -m "not slow and not slurm and not kills"

test-slow: setup ## The slow tests alone
	$(BIN)/python -m pytest -m slow

test-slurm: setup ## Sweep, ranks, preemption and templates on a SLURM of this machine, which it installs (root, apt-get)
	$(BIN)/python -m pytest -m slurm -s tests/slurm

test-kills: setup ## Kill a run at 20 random moments, of five kinds, and compare with an undisturbed one
	$(BIN)/python -m pytest -m kills -s tests/integration

lint: setup ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv and caches; outputs/ stays
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
