# `make` alone lists the targets. Everything runs in .venv, which `install` makes and keeps in step with pyproject.toml.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first interpreter that is new enough and can make a virtual environment with pip; else the first new enough.
PYTHON ?= $(shell \
	for wanted in "venv, ensurepip" "sys"; do \
	  for candidate in python3.11 python3.13 python3.12 python3; do \
	    if $$candidate -c "import sys, $$wanted; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1 </dev/null; then \
	      echo $$candidate; exit; \
	    fi; \
	  done; \
	done)

# Extra arguments for pytest, the demo and the benchmark: make test ARGS="-k sampler -x"
ARGS ?=

# Two workers; a group of tests that share what they made runs in one of them (tests/tiers.py).
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-full soak style quality bench wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  Variables: PYTHON=/path/to/python (3.11 or newer, for a new .venv), ARGS=\"...\" (test, demo, bench)"

install: $(STAMP) ## create .venv and install flowaccel with its development tools

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
	  echo "error: no Python 3.11 or newer found; name one: make install PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	  echo "error: $(PYTHON) does not run or is older than Python 3.11." >&2; \
	  echo "       Name another: make install PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c "import venv, ensurepip" 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments (its module ensurepip is missing)." >&2; \
	  echo "       Debian and Ubuntu: apt install python3-venv." >&2; \
	  echo "       Or name another: make install PYTHON=/path/to/python" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt -e ".[dev]"
	@touch $@

demo: install ## sample the embedded model with and without acceleration, and write a report
	$(BIN)/flowaccel demo $(ARGS)

test: install ## run the default tests: every feature, family and method once (minutes)
	$(PYTEST) $(ARGS)

test-full: install ## run all tests but the soak tests
	$(PYTEST) --tier full $(ARGS)

soak: install ## kill, damage and crowd it, for long
	$(PYTEST) --tier soak $(ARGS)

style: install ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: install ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python scripts/typecheck.py

bench: install ## run the FlowTurbo benchmark
	$(BIN)/python benchmarks/flowturbo.py $(ARGS)

wheel: install ## build the wheel and the sdist, and try the wheel in an empty environment
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python scripts/check_wheel.py

clean: ## remove what the targets made, .venv excepted
	rm -rf dist build .typetree .mypy_cache .ruff_cache .pytest_cache *.egg-info
