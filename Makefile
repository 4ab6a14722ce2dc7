# make demo: the demonstration. make test: all tests. make docs: the site, in build/site. They set up .venv first, and only
# when needed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# The first that runs and is Python 3.11 to 3.14; or say make PYTHON=/path/to/python.
PYTHON ?= $(shell for p in python3.11 python3.13 python3.12 python3.14 python3 python; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test docs notebooks lint format clean
demo: .venv/demo
	$(BIN)/hvpkit demo

test: .venv/dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 MPLBACKEND=agg OMP_NUM_THREADS=1 $(BIN)/mkdocs build --quiet
	@echo "The site is in build/site; $(BIN)/mkdocs serve shows it"

notebooks: .venv/dev
	$(BIN)/python notebooks/execute.py

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv build hvpkit-demo

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.14 found; install one, or: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# A file for each set of extras that is installed, older than what says what they are: install again.
.venv/demo .venv/dev .venv/docs: .venv/%: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing hvpkit[$*] into .venv (torch is large; the first time takes minutes)"
	$(PIP) --editable '.[$*]'
	@touch $@
