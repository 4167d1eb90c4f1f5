# `make help` lists the targets.
#
# By default everything lives in the virtual environment $(VENV), made on first use. To use an
# interpreter as it is and download nothing:  make VENV= PYTHON=python3 test

VENV ?= .venv
# Set to nothing is not set, but for VENV.
override PYTHON := $(or $(PYTHON),python3)
override JOBS := $(or $(JOBS),$(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8))))

ifeq ($(strip $(VENV)),)
  PY := $(PYTHON)
  CLANG_FORMAT := clang-format
  STAMPS := build/stamps
else
  PY := $(VENV)/bin/python
  CLANG_FORMAT := $(VENV)/bin/clang-format
  STAMPS := $(VENV)/stamps
endif

SOURCES := setup.py pyproject.toml da_ops/_version.py $(wildcard build_tools/*.py) \
  $(shell find csrc -type f)
CSRC := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu*')
# For the GPUs of this machine, unless the environment asks for more.
ARCHS = TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$($(PY) -m build_tools.here)}"
# The CUDA compiler, into the environment, where there is a GPU and no other one. A failure is told.
NVCC = $(PY) -m build_tools.toolkit
# A build is current only while its record is there.
RECORD := da_ops/_build.json
BUILT := $(STAMPS)/built

# A worker of the test suite has one thread of torch; without pytest-xdist there is one worker.
WORKERS := -n $(JOBS) --dist loadgroup
PYTEST = $(PY) -m pytest $(shell $(PY) -c 'import xdist' 2>/dev/null && printf '%s' '$(WORKERS)')

# What depends on the version of torch. The library that $(PY) built runs as it is in environments
# with the same Python and another torch.
OLDEST := $(VENV)-oldest
NEWEST := $(VENV)-newest
VERSION_TESTS := $(patsubst %,tests/test_%.py,versions operator accuracy shapes sizes isolation \
  autograd module children distributed ecosystem compile errors choice explain reference triton)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two pips in one environment would collide
MAKEFLAGS += --no-builtin-rules
.PHONY: help env build test test-full test-oldest test-versions simt bench bench-full ablation \
  demo gpu lint format cuda-report wheel clean FORCE

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22
	@echo
	@echo '  VENV=$(VENV)  PYTHON=$(PYTHON)  JOBS=$(JOBS)'
	@echo '  make VENV= PYTHON=python3 ... uses that interpreter as it is and downloads nothing'

env: $(STAMPS)/env-dev  ## make or refresh the environment, with all that development needs

build: $(STAMPS)/env-base $(BUILT)  ## compile the kernels, and say what was built

test: $(STAMPS)/env-test $(BUILT)  ## run all tests
	OMP_NUM_THREADS=1 $(PYTEST) tests

test-full: $(STAMPS)/env-test $(BUILT)  ## run all tests, with many more random cases, all on Triton
	OMP_NUM_THREADS=1 DA_OPS_TEST_FULL=1 $(PYTEST) tests

test-oldest: $(BUILT) $(OLDEST)/stamps/env-test  ## test this build on the oldest torch promised
	$(OLDEST)/bin/python -m da_ops info
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(WORKERS) -k 'not triton' $(VERSION_TESTS)

test-versions: test-oldest $(NEWEST)/stamps/env-test  ## the same on the newest, and Triton on both
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(WORKERS) -k triton $(VERSION_TESTS)
	$(NEWEST)/bin/python -m da_ops info
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(WORKERS) $(VERSION_TESTS)

simt: $(STAMPS)/env-test $(BUILT)  ## run the CUDA sources on the CPU, under sanitizers
	OMP_NUM_THREADS=1 DA_OPS_TEST_FULL=1 $(PYTEST) tests/test_simt.py tests/test_cuda_kernels.py \
		tests/test_cuda_on_chip.py

# On the GPU if there is one, else on the CPU, unless DEVICE names either.
ON := $(if $(DEVICE),--device $(DEVICE))
bench: $(STAMPS)/env-bench $(BUILT)  ## compare with eager and torch.compile, in minutes
	$(PY) -m benchmarks.op --preset quick $(ON)
	$(PY) -m benchmarks.network --preset quick $(ON)
	$(PY) -m benchmarks.report

bench-full: $(STAMPS)/env-bench $(BUILT)  ## the same over all shapes, dtypes and networks
	$(PY) -m benchmarks.op --preset full $(ON)
	$(PY) -m benchmarks.network --preset full $(ON)
	$(PY) -m benchmarks.report

ablation: $(STAMPS)/env-bench $(BUILT)  ## the paper's Tables I, II and III in miniature, 45 minutes
	$(PY) -m benchmarks.paper.ablation

demo: $(STAMPS)/env-bench $(BUILT)  ## plain and DA: train small detectors, draw what they find, 15 minutes
	$(PY) -m benchmarks.paper.demo

gpu: $(STAMPS)/env-test $(STAMPS)/env-bench  ## on a machine with a GPU: build, test, measure
	$(PY) -m benchmarks.gpu

lint: $(STAMPS)/env-dev  ## check style and types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(CLANG_FORMAT) --dry-run -Werror $(CSRC)
	$(PY) -m mypy

format: $(STAMPS)/env-dev  ## put Python and C++ into the house style
	$(PY) -m ruff check --fix-only
	$(PY) -m ruff format
	$(CLANG_FORMAT) -i $(CSRC)

cuda-report: $(STAMPS)/env-base  ## read the CUDA kernels' machine code, fail beyond its limits
	$(PY) -m build_tools.cuda_report

wheel: $(STAMPS)/env-wheel  ## build a wheel for all GPUs in dist/, try it in fresh environments
	@$(if $(strip $(VENV)),$(NVCC))
	$(PY) -m build_tools.wheel $(if $(strip $(VENV)),--try $(if $(CPU_TORCH),'$(CPU_TORCH)'))

clean:  ## remove what was built, but not the environment
	rm -rf build dist *.egg-info da_ops/*.so $(RECORD) $(BUILT)
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find build_tools da_ops benchmarks tests -name __pycache__ -type d -exec rm -rf {} +

# What to install comes from pyproject.toml; "base" is what building and running take.

ifeq ($(strip $(VENV)),)

$(STAMPS)/env-%: FORCE
	@missing=$$($(PY) build_tools/requirements.py --missing $(filter-out base,$*)) || exit 1; \
	[ -z "$$missing" ] || echo "$(PY) lacks (and what needs it will be skipped or fail):" $$missing

$(BUILT): $(SOURCES) $(if $(wildcard $(RECORD)),,FORCE)
	PIP_NO_INDEX=1 $(ARCHS) $(PY) setup.py -q build_ext --inplace
	@mkdir -p $(@D) && touch $@

$(OLDEST)/% $(NEWEST)/%:
	@echo "this takes environments of its own, and with VENV= nothing is downloaded"; exit 1

else

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/env-%: pyproject.toml build_tools/requirements.py | $(VENV)/bin/python
	@mkdir -p $(@D)
	$(PY) build_tools/requirements.py $(filter-out base,$*) > $(@D)/$*.txt
	$(PY) -m pip install -r $(@D)/$*.txt
	@$(NVCC)
	@touch $@

$(OLDEST)/bin/python $(NEWEST)/bin/python: | $(VENV)/bin/python
	$(VENV)/bin/python -m venv $(@D:/bin=)

$(OLDEST)/stamps/env-test: pyproject.toml build_tools/requirements.py | $(OLDEST)/bin/python
	@mkdir -p $(@D)
	$(OLDEST)/bin/python build_tools/requirements.py --oldest test > $(@D)/test.txt
	$(OLDEST)/bin/python -m pip install -r $(@D)/test.txt
	@touch $@

$(NEWEST)/stamps/env-test: FORCE | $(NEWEST)/bin/python  # there may be a newer one by now
	@mkdir -p $(@D)
	$(NEWEST)/bin/python build_tools/requirements.py test > $(@D)/test.txt
	$(NEWEST)/bin/python -m pip install --upgrade -r $(@D)/test.txt

$(BUILT): $(SOURCES) $(if $(wildcard $(RECORD)),,FORCE) | $(STAMPS)/env-base
	@$(NVCC)
	$(ARCHS) $(PY) -m pip install --no-build-isolation --no-deps -e .
	@$(PY) -m build_tools.record
	@mkdir -p $(@D) && touch $@

endif
