# Every target sets up what it needs in .venv. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

# NeMo has an environment of its own: it needs other versions of Lightning and OmegaConf.
NEMO_VENV := .venv-nemo
NEMO_INSTALLED := $(NEMO_VENV)/.installed-3.0.0
NEMO := NEST_NEMO_PYTHON=$(NEMO_VENV)/bin/python

AUDIT_VENV := .venv-audit

# One process of tests for each core, eight at most. One thread each: threads of PyTorch wait for one another by
# spinning, which on a busy core takes far longer than the work.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: help demo reference results gpu test test-all test-slow test-ray trace check audit pins dist parity docs docs-cli format setup setup-nemo clean

help:
	@echo "make demo      set up, then run nest demo (results in nest_demo/)"
	@echo "make reference SPEECH=DIR NOISE=DIR   the reference recipe: prepare, pretrain, with PROBE=DIR also probe"
	@echo "make results   the tables and pictures of docs/results.md; with OUT=DIR, those of a new run"
	@echo "make gpu       try everything on a GPU in 8 minutes, nothing is installed; REHEARSE=1 on a processor (docs/gpu.md)"
	@echo "make test      set up, then the default tests"
	@echo "make test-all  the slow tests too"
	@echo "make test-ray  set up Ray (70 MB), prepare data on a cluster of this machine's"
	@echo "make check     format, lint, types, import directions, nothing unsafe, plain English"
	@echo "make trace     write the reading order in CONTRIBUTING.md from one traced batch"
	@echo "make audit     known vulnerabilities of the pinned packages (asks PyPI)"
	@echo "make docs      set up MkDocs, build the site into build/docs; dead links are errors"
	@echo "make docs-cli  write docs/cli.md, the commands' reference, from the code"
	@echo "make pins      is every pinned package there for Python 3.10 to 3.13 (asks PyPI)"
	@echo "make dist      sdist and wheel, in dist/"
	@echo "make parity    set up NeMo 3.0.0 beside us (2.2 GB), compare everything with it"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "There is no $(PYTHON) here. Try make PYTHON=python3 ..."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "nest needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try make PYTHON=python3.12 ..."; exit 2; }
	@echo "Installing into $(VENV): some minutes, and 2 GB (6 GB where pip takes PyTorch with CUDA) ..."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[demo,dev]"
	@touch $(INSTALLED)

demo: setup
	$(VENV)/bin/nest demo --out nest_demo

reference: setup
	@test -n "$(SPEECH)" -a -n "$(NOISE)" || { echo "Give folders: make reference SPEECH=DIR NOISE=DIR [PROBE=DIR] [OUT=DIR] [WITHOUT=PATTERN] [CONTROL=1]"; exit 2; }
	$(VENV)/bin/python docs/reference/run.py "$(SPEECH)" "$(NOISE)" "$(or $(OUT),nest_reference)" $(if $(WITHOUT),--without "$(WITHOUT)") \
	  $(if $(PROBE),--probe "$(PROBE)") $(if $(CONTROL),--control)

# Tables and pictures of docs/ from the stored results; OUT=DIR stores those of a new run first.
results: setup
	$(VENV)/bin/python docs/reference/results.py $(OUT)

# Nothing is installed: it runs with PYTHON if that is given, otherwise with .venv if it is there.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(VENV)/bin/python),$(PYTHON)),$(PYTHON))

gpu:
	PYTHONPATH="src$(if $(PYTHONPATH),:$(PYTHONPATH))" $(GPU_PYTHON) docs/gpu/run.py --out "$(or $(OUT),nest_gpu)" $(if $(REHEARSE),--rehearse) \
	  $(if $(SPEECH),--speech "$(SPEECH)") $(if $(NOISE),--noise "$(NOISE)") $(if $(PROBE),--probe "$(PROBE)") \
	  $(if $(MINUTES),--minutes "$(MINUTES)")

test: setup
	$(PYTEST) -m "not slow and not nemo and not gpu and not ray"

test-slow: setup
	$(PYTEST) -m "slow and not nemo and not gpu and not ray"

test-all: setup
	$(PYTEST) -m "not nemo and not gpu and not ray"

test-ray: setup
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[ray]"
	$(VENV)/bin/python -m pytest -m ray

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/python .ci/gate.py
	$(VENV)/bin/python .ci/english.py

# Known vulnerabilities of what constraints.txt pins; asks PyPI, so it is no part of `check`. Without --strict, packages
# for which no advisories can be had would count as clean.
audit:
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip install --quiet "pip-audit>=2.10"
	$(AUDIT_VENV)/bin/python -m pip_audit --strict -r constraints.txt --no-deps --disable-pip --desc on || { \
	  echo "audit: not clean. A package that is \"not found on PyPI\" was not looked at: its advisories cannot be had from"; \
	  echo "here; run make audit where PyPI itself answers. Any other one named above has a known vulnerability."; exit 1; }

# Older pips download what they are only to look at.
pins: setup
	$(VENV)/bin/python -m pip install --quiet "pip>=25.1"
	$(VENV)/bin/python .ci/pins.py

# The wheel is built out of the sdist; tests/packaging looks into both.
dist: setup
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation --outdir dist .

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

# What the site needs is no part of `dev`; tests/docs holds links and commands without it.
docs: setup
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "the site is build/docs/index.html"

docs-cli: setup
	$(VENV)/bin/python -m nestcli.cli.reference > docs/cli.md

trace: setup
	$(VENV)/bin/python .ci/trace.py --write

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) $(NEMO_VENV) $(AUDIT_VENV) build dist nest_demo nest_gpu .pytest_cache .hypothesis .mypy_cache .ruff_cache
