# Every target sets up what it needs in .venv. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-all check format setup clean

help:
	@echo "make demo      set up, then run nest demo (results in nest_demo/)"
	@echo "make test      set up, then the default tests"
	@echo "make test-all  the slow tests too"
	@echo "make check     format, lint, types, import directions"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "nest needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[demo,dev]"
	@touch $(INSTALLED)

demo: setup
	$(VENV)/bin/nest demo --out nest_demo

test: setup
	$(VENV)/bin/python -m pytest -m "not slow and not nemo and not gpu"

test-all: setup
	$(VENV)/bin/python -m pytest -m "not nemo and not gpu"

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) build dist nest_demo .pytest_cache .mypy_cache .ruff_cache
