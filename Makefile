# `make demo` and `make test` set everything up by themselves, in .venv. To use an environment of your own:
#   make test PYTHON=/path/to/python          (it must have torch and pip)
#   make test TORCH="torch==2.13.0"           (what to install into a new .venv)

TORCH ?= torch>=2.6
BOOTSTRAP ?= python3
VENV := .venv

ifdef PYTHON
  PY := $(PYTHON)
  ENVIRONMENT :=
else
  PY := $(VENV)/bin/python
  ENVIRONMENT := $(PY)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench gpu setup-demo setup-test setup-lint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo "variables: PYTHON=<existing interpreter>  TORCH=\"torch==2.13.0\"  ARGS=<passed on>"

$(VENV)/bin/python:
	@$(BOOTSTRAP) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "Python 3.10 or newer is needed as $(BOOTSTRAP): install it, or name it with BOOTSTRAP=..."; exit 1; }
	@$(BOOTSTRAP) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "the venv module is missing: on Debian and Ubuntu, apt install python3-venv"; exit 1; }

# torch first, so that the package is built against it; then the same torch again, so that no dependency replaces it
define install
	@$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --quiet "$(TORCH)" || \
	  { echo "torch could not be installed: see https://pytorch.org, then make $@ PYTHON=<that interpreter>"; exit 1; }
	@$(PY) -c 'import setuptools as s; assert int(s.__version__.split(".")[0]) >= 77' 2>/dev/null || \
	  $(PY) -m pip install --quiet --upgrade "setuptools>=77" wheel
	@$(PY) -m pip install --quiet --no-build-isolation -e ".[$(1)]" \
	    "torch==$$($(PY) -c 'import importlib.metadata as m; print(m.version("torch"))')" || \
	  { echo "gam_fast could not be installed into $(PY): the message above says what is missing"; exit 1; }
endef

setup-demo: $(ENVIRONMENT)
	$(call install,demo)

setup-test: $(ENVIRONMENT)
	$(call install,demo)
	$(call install,test)

setup-lint: $(ENVIRONMENT)
	$(call install,demo)
	$(call install,lint)

demo: setup-demo  ## train on handwritten digits by SGD, SAM and GAM, and write a report (4 minutes at most)
	$(PY) examples/digits.py $(ARGS)

test: setup-test  ## all tests and doctests
	$(PY) -m pytest $(ARGS)

lint: setup-lint  ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@files="$$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')"; \
	  if [ -n "$$files" ]; then $(PY) -m clang_format --dry-run -Werror $$files; fi

bench: setup-test  ## overhead of each method around a model, against SGD (table; ARGS="--help")
	$(PY) bench/overhead.py $(ARGS)

gpu: setup-test  ## what waits for a real GPU: the tests marked gpu, and the benchmark on it
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo "torch sees no CUDA GPU: install a CUDA build of torch and run on a machine with a GPU"; exit 1; }
	$(PY) -m pytest -m gpu $(ARGS)
	$(PY) bench/overhead.py --device cuda --json bench/results/overhead_cuda.json

clean:  ## remove .venv and what was built
	rm -rf $(VENV) build dist *.egg-info
