# Every target sets up what it needs in .venv. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

# NeMo has an environment of its own: it needs other versions of Lightning and OmegaConf.
NEMO_VENV := .venv-nemo
NEMO_INSTALLED := $(NEMO_VENV)/.installed-3.0.0
NEMO := NEST_NEMO_PYTHON=$(NEMO_VENV)/bin/python

.PHONY: help demo test test-all test-slow test-ray check parity format setup setup-nemo clean

help:
	@echo "make demo      set up, then run nest demo (results in nest_demo/)"
	@echo "make test      set up, then the default tests"
	@echo "make test-all  the slow tests too"
	@echo "make test-ray  set up Ray (70 MB), prepare data on a cluster of this machine's"
	@echo "make check     format, lint, types, import directions"
	@echo "make parity    set up NeMo 3.0.0 beside us (2.2 GB), compare everything with it"

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
	$(VENV)/bin/python -m pytest -m "not slow and not nemo and not gpu and not ray"

test-slow: setup
	$(VENV)/bin/python -m pytest -m "slow and not nemo and not gpu and not ray"

test-all: setup
	$(VENV)/bin/python -m pytest -m "not nemo and not gpu and not ray"

test-ray: setup
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[ray]"
	$(VENV)/bin/python -m pytest -m ray

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

setup-nemo: $(NEMO_INSTALLED)

$(NEMO_INSTALLED):
	$(PYTHON) -m venv $(NEMO_VENV)
	$(NEMO_VENV)/bin/python -m pip install --quiet "nemo_toolkit[asr]==3.0.0" torch==2.13.0 pytest
	@touch $(NEMO_INSTALLED)

# All presets' parameters are part of every comparison; the numerics run for the models that are named here. The last
# two run in NeMo's environment: NeMo in the same process, and NeMo's encoder as a drop-in.
parity: setup setup-nemo
	$(NEMO) $(VENV)/bin/nest compare small --nemo --html parity-small.html
	$(NEMO) $(VENV)/bin/nest compare large model.encoder.n_layers=3 --nemo
	$(NEMO) $(VENV)/bin/nest compare xlarge model.encoder.n_layers=1 --nemo --only encoder --only gradients
	$(NEMO) $(VENV)/bin/python -m pytest -m nemo tests/live
	PYTHONPATH=src $(NEMO_VENV)/bin/python -m nestcli compare demo --nemo --only encoder --only loss --only checkpoint
	PYTHONPATH=src $(NEMO_VENV)/bin/python -m pytest -m nemo tests/live/test_nemo_encoder.py

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) $(NEMO_VENV) build dist nest_demo .pytest_cache .mypy_cache .ruff_cache
