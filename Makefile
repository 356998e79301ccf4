# `make demo` and `make test` set everything up by themselves, in .venv. To use an environment of your own:
#   make test PYTHON=/path/to/python          (it must have torch and pip)
#   make test TORCH="torch==2.13.0"           (what to install into a new .venv)
#   make test TRITON="triton==3.6.0"          (the same, where torch does not bring a Triton; 3.6 to 3.8 are tested)

TORCH ?= torch>=2.6
TRITON ?= triton>=3.6,<3.9
BOOTSTRAP ?= python3
VENV := .venv
CXX ?= g++
# The CUDA toolkit of the nvcc on the path, which may be a wrapper script.
CUDA_HOME ?= $(shell nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^\#\$$ _*TOP=//p' | head -1)
ifneq ($(CUDA_HOME),)
  export CUDA_HOME
endif
STRESS_FLAGS = -std=c++17 -O1 -g -Wall -Wextra -ffp-contract=off -fno-math-errno -fno-trapping-math \
  -I"$$($(PY) -c 'from torch.utils.cpp_extension import include_paths; print(include_paths()[0])')"

ifdef PYTHON
  PY := $(PYTHON)
  ENVIRONMENT :=
else
  PY := $(VENV)/bin/python
  ENVIRONMENT := $(PY)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test interpret lint docs bench figures pareto sanitize sass ptx aot gpu setup-demo setup-test setup-lint setup-docs setup-all clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo "variables: PYTHON=<existing interpreter>  TORCH=\"torch==2.13.0\"  ARGS=<passed on>"

$(VENV)/bin/python:
	@$(BOOTSTRAP) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "Python 3.10 or newer is needed as $(BOOTSTRAP): install it, or name it with BOOTSTRAP=..."; exit 1; }
	@$(BOOTSTRAP) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "the venv module is missing: on Debian and Ubuntu, apt install python3-venv"; exit 1; }

# torch first, so that the core is built against it; then the same torch again, so that no dependency replaces it; then
# the core in place, which is compiled only when a source or torch has changed
define install
	@$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --quiet "$(TORCH)" || \
	  { echo "torch could not be installed: see https://pytorch.org, then make $@ PYTHON=<that interpreter>"; exit 1; }
	@$(PY) -c 'import setuptools as s; assert int(s.__version__.split(".")[0]) >= 77' 2>/dev/null || \
	  $(PY) -m pip install --quiet --upgrade "setuptools>=77" wheel
	@$(PY) -m ninja --version >/dev/null 2>&1 || $(PY) -m pip install --quiet ninja
	@GAM_FAST_BUILD=none $(PY) -m pip install --quiet --no-build-isolation -e ".[$(1)]" \
	    "torch==$$($(PY) -c 'import importlib.metadata as m; print(m.version("torch"))')" || \
	  { echo "gam_fast could not be installed into $(PY): the message above says what is missing"; exit 1; }
	@mkdir -p build && { $(PY) setup.py -q build_ext --inplace >build/core.log 2>&1 || \
	  { cat build/core.log; echo "the compiled core could not be built; on Debian and Ubuntu: apt install g++"; exit 1; }; }
	@grep '^gam_fast:' build/core.log || true
endef

define install-triton
	@$(PY) -c 'import platform as p, sys; sys.exit(p.system() != "Linux")' || exit 0; \
	  $(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install --quiet --no-deps "$(TRITON)" || \
	  { echo "$(TRITON) could not be installed: name another by TRITON=..."; exit 1; }
endef

comma := ,
# The extras of the package that tests need: test-core is enough for those of the core and the engine.
EXTRAS ?= demo,test

# INSTALLED=yes leaves what is installed as it is, for several commands at the same time.
INSTALLED ?=
ifdef INSTALLED
setup-demo setup-test setup-lint setup-docs setup-all: ;
else
setup-demo: $(ENVIRONMENT)
	$(call install,demo)

setup-test: $(ENVIRONMENT)
	$(call install,$(EXTRAS))
	$(install-triton)

setup-lint: $(ENVIRONMENT)
	$(call install,demo$(comma)lint)

setup-docs: $(ENVIRONMENT)
	$(call install,docs)

setup-all: $(ENVIRONMENT)
	$(call install,demo$(comma)docs$(comma)lint$(comma)test)
	$(install-triton)
endif

demo: setup-demo  ## train on handwritten digits by SGD, SAM and GAM, and write a report (5 minutes)
	$(PY) examples/digits.py $(ARGS)

test: setup-test  ## all tests and doctests; without ARGS those of the Triton kernels too
	$(PY) -m pytest $(ARGS)
	@$(if $(ARGS),,$(MAKE) --no-print-directory interpret)

# A process of its own, because Triton decides when it is imported how kernels are run. Primitives and the short table of
# the engine run on Triton here.
INTERPRETED_TESTS ?= $(addprefix tests/,test_interpreted.py test_backends.py test_every_backend.py)
interpret: setup-test  ## the Triton kernels by Triton's interpreter, without a GPU (Linux)
	@$(PY) -c 'import platform as p, sys; sys.exit(p.system() != "Linux")' || { echo "Triton is for Linux: not tested"; exit 0; }; \
	  $(PY) -c 'import sys, triton; sys.exit(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6))' || \
	    { echo "the Triton of this torch is older than 3.6: its kernels are not tested"; exit 0; }; \
	  TRITON_INTERPRET=1 $(PY) -m pytest -k "triton or interpreted" $(INTERPRETED_TESTS) $(ARGS)

lint: setup-lint  ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@files="$$(git ls-files '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh')"; \
	  if [ -n "$$files" ]; then $(PY) -c 'from clang_format import clang_format; clang_format()' --dry-run -Werror $$files; fi

docs: setup-docs  ## the pages as a site, in build/site
	$(PY) -m sphinx -q -W --keep-going -b html docs build/site $(ARGS)

# Peaks of memory, and how much of it is there, are read from Linux's /proc.
LINUX = $(PY) -c 'import platform as p, sys; sys.exit(p.system() != "Linux")'
bench: setup-test  ## time of steps and primitives, whole training steps, growth, memory (10 minutes at most; ARGS=--quick: one)
	$(PY) -m bench.overhead $(ARGS)
	$(PY) -m bench.kernels $(ARGS)
	$(PY) -m bench.throughput --model mlp,resnet18 --batch 16 --repeats 7 $$($(LINUX) && echo --memory mlp) $(ARGS)
	@! $(LINUX) || { $(PY) -m bench.growth $(ARGS) && $(PY) -m bench.memory $(ARGS); }

figures: setup-test  ## the figures of docs/performance.md, measured anew on this machine (12 minutes)
	$(PY) -m bench.overhead --json bench/results/overhead_cpu.json
	$(PY) -m bench.overhead --base AdamW --json bench/results/overhead_cpu_adamw.json
	$(PY) -m bench.throughput --json bench/results/throughput_cpu.json --png docs/throughput.png
	$(PY) -m bench.growth --json bench/results/growth_cpu.json --png docs/growth.png
	$(PY) -m bench.readme

# A quick run keeps away from the figures that are stored.
PARETO_FILES = $(if $(findstring --quick,$(ARGS)),build/pareto.json build/pareto build/pareto.md,bench/results/pareto_cpu.json docs/pareto docs/results/pareto.md)
pareto: setup-test  ## accuracy and flatness of cheaper ascents against gradients and time (50 minutes)
	@mkdir -p build
	$(PY) -m experiments.pareto $(join --json= --pictures= --markdown=,$(PARETO_FILES)) $(ARGS)

# The package is copied to build/sanitize with a core of its own; it is found first, as the tests run from there. Tests of
# the plain backend have nothing for a sanitizer.
SANITIZED_TESTS ?= test_backends.py test_native.py test_cuda.py test_properties.py
sanitize: setup-test  ## the core under the address, undefined-behaviour and thread sanitizers
	@$(PY) -c 'import platform as p, sys; sys.exit(p.system() != "Linux")' || { echo "make sanitize runs on Linux"; exit 1; }
	@mkdir -p build/sanitize
	$(CXX) $(STRESS_FLAGS) -fsanitize=thread tests/native/stress.cpp csrc/cpu/dispatch.cpp csrc/cpu/isa_*.cpp -o build/sanitize/stress -lpthread
	build/sanitize/stress
	GAM_FAST_BUILD=cpu GAM_FAST_SANITIZE=1 $(PY) setup.py -q build --build-base build/sanitize/work \
	  --build-lib build/sanitize/lib >build/sanitize/build.log 2>&1 || { cat build/sanitize/build.log; exit 1; }
	cd build/sanitize/lib && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY=PASSIVE GAM_FAST_SANITIZED=1 \
	  $(if $(findstring /,$(PY)),$(abspath $(PY)),$(PY)) -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) --confcutdir $(CURDIR)/tests -p no:cacheprovider \
	  -o pythonpath=$(CURDIR)/tests -k "not memory_is_lost and not three_buffers and not planted and not step_is_as_many \
	    and (not eager or test_native)" \
	  $(addprefix $(CURDIR)/tests/,$(SANITIZED_TESTS)) $(ARGS)

sass: setup-test  ## registers, spills, vector accesses, occupancy of the CUDA kernels (a core for CUDA, no GPU)
	$(PY) -m tools.sass $(ARGS)

ptx:  ## PTX of the CUDA kernels for sm_90, with their names and arguments as JSON, in build/ptx (nvcc, no GPU)
	$(PY) -m tools.ptx $(ARGS)

aot: setup-test  ## the Triton kernels compiled for six GPUs, and checked (no GPU)
	$(PY) -m tools.aot $(ARGS)

# With PYTHON=<interpreter that has torch, numpy, pytest, setuptools and ninja>, without a network.
STAGES ?=
gpu:  ## what waits for a real GPU, in stages of which each says what it found: STAGES="core smoke times" (9 minutes)
	$(if $(PYTHON)$(wildcard $(PY)),$(PY),$(BOOTSTRAP)) tools/gpu.py --stages "$(STAGES)" $(ARGS)

clean:  ## remove .venv and what was built
	rm -rf $(VENV) build dist *.egg-info .venv-cuda
