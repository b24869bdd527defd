# `make demo` and `make test` need Linux, Python >= 3.11 and nothing else: they make their own environment in .venv.
#   make test VENV=path             another environment
#   make test TORCH=torch           another torch build (on a GPU machine)
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# With a compiler a failing build is an error; without one the library runs on its other backends.
LTP_SPARSE_EXT ?= $(if $(shell command -v c++),cpu,auto)
export LTP_SPARSE_EXT
# Bytecode is kept, whatever the environment says: without it each process that imports torch takes 3 seconds more, with
# transformers 9, and pytest rewrites all tests anew.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install --no-compile --constraint constraints.txt
BASE := $(VENV)/.installed-torch
TRAIN := $(VENV)/.installed-train
TEST := $(VENV)/.installed-test
# Half as many processes again as cores, at most 8: many tests wait for others that they have started.
WORKERS ?= $(shell n=$$(($$(nproc) * 3 / 2)); echo $$((n > 8 ? 8 : n)))
PYTEST = $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
CPP := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
CPP_OF_TESTS := $(wildcard tests/*/*.cpp tests/*/*/*.cpp tests/*/*/*.h)

.PHONY: help demo test test-fast check docs wheels hashes faults soak ptx ranks asan tsan bench gpu gpu-full lint lint-ruff lint-format lint-mypy lint-cpp format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

demo: $(TRAIN)  ## the whole job on generated data, offline: ticket, LTP, controls, report in demo-report/
	$(BIN)/ltp-sparse demo --output demo-report

test: $(TEST)  ## all tests, on all cores (narrow them with ARGS="-k name"; ARGS="-n 0": in one process)
	$(PYTEST) --durations=15 $(ARGS)

check: $(TEST)  ## for daily work: linters, types and the fast tests
	$(MAKE) --jobs --output-sync=target lint test-fast

# None of these waits for others.
test-fast: WORKERS := $(shell n=$$(nproc); echo $$((n > 8 ? 8 : n)))
test-fast: $(TEST)
	$(PYTEST) -q -m "not slow and not faults and not ptx and not ranks" $(ARGS)

docs: $(TEST)  ## the site of all documents and docstrings in build/site, strictly, without network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheels:  ## sdist and checked wheels of this commit in dist/, for every Python 3.11 to 3.14 of this machine
	$(PYTHON) tools/wheels.py $(ARGS)

hashes:  ## constraints-hashes.txt: the pins of constraints.txt with the hashes of their files
	$(PYTHON) -m venv build/hashes
	build/hashes/bin/python -m pip --disable-pip-version-check -q install --constraint constraints.txt uv
	build/hashes/bin/uv pip compile -q --no-deps --no-header --python-version 3.11 --generate-hashes \
		constraints.txt --output-file constraints-hashes.txt

# The C++ kernels under a sanitizer, as a module of their own in build/; threads: those of the kernels, not of OpenMP.
asan: SANITIZE = address,undefined  ## tests of the C++ kernels under AddressSanitizer and UBSan
asan: SANITIZER_TESTS = tests/backends/test_compiled.py tests/backends/test_compiled_precision.py tests/ops/test_raw_operators.py
tsan: SANITIZE = thread  ## the same under ThreadSanitizer
tsan: SANITIZER_TESTS = tests/backends/test_compiled.py
asan tsan: $(TEST)
	LTP_SPARSE_EXT=cpu LTP_SPARSE_SANITIZE=$(SANITIZE) $(BIN)/python setup.py -q build_ext \
		--build-lib build/$@ --build-temp build/$@/temp
	LD_PRELOAD="$$(c++ -print-file-name=lib$@.so) $$(c++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1:die_after_fork=0 OMP_NUM_THREADS=1 \
	$(BIN)/python -c "import sys, ltp_sparse, pytest; \
		ltp_sparse.__path__.insert(0, 'build/$@/ltp_sparse'); sys.exit(pytest.main(sys.argv[1:]))" \
		-q -p no:cacheprovider --timeout 1200 $(SANITIZER_TESTS) $(ARGS)

faults: $(TEST)  ## full disks, low memory, two writers, kills at random moments: the long version
	$(BIN)/pytest -m faults $(ARGS)

soak: $(TEST)  ## 1,000 published versions, trainer and follower killed 20 times each, every followed bit compared
	$(BIN)/pytest -s -m "faults or not faults" tests/sync/test_sync_soak.py -k long $(ARGS)

ptx: $(TEST)  ## the kernels' compiled PTX in an emulated GPU: every kernel, dtype, encoding, sm_80 and sm_90
	$(PYTEST) -m "ptx or not ptx" --timeout 3600 tests/ptx tests/backends/test_cuda_build.py $(ARGS)

ranks: $(TEST)  ## sharded training on 2, 3 and 4 ranks: every sharding, option and checkpoint
	$(BIN)/pytest -m ranks tests/optim/test_sharded.py $(ARGS)

bench: $(TEST)  ## CPU benchmarks: CSV, table and plots in benchmarks/results/cpu (about 24 GB of memory, an hour)
	$(BIN)/python benchmarks/run.py $(ARGS)

gpu:  ## on a GPU machine, with its own Python (PYTHON=...): build, tests, what matters most measured; 7 minutes
	$(PYTHON) benchmarks/gpu/run.py $(ARGS)

gpu-full:  ## the second command there: goes on where the first was cut, then the other cells; 5 minutes
	$(PYTHON) benchmarks/gpu/run.py --full $(ARGS)

lint: lint-ruff lint-format lint-mypy lint-cpp  ## ruff, mypy, clang-format: check only

lint-ruff: $(TEST)
	$(BIN)/ruff check .

lint-format: $(TEST)
	$(BIN)/ruff format --check .

lint-mypy: $(TEST)
	$(BIN)/mypy

lint-cpp: $(TEST)
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(CPP_OF_TESTS)

format: $(TEST)  ## the same tools, repairing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP) $(CPP_OF_TESTS)

clean:  ## remove builds, caches and the demo's report; keep the environment
	rm -rf build dist *.egg-info demo-report .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f ltp_sparse/*.so $(TRAIN) $(TEST)
	find benchmarks csrc kernels ltp_sparse tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and by its exact version, so that no later step replaces it. Where the package sources have a CPU build
# of that version (`torch==2.13.0+cpu` there, or a wheel that pip finds), it is taken; else the default build.
$(BASE): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, $(PYTHON) is " + sys.version)'
	@echo "[setup] $(TORCH) into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) pybind11 setuptools wheel
	@$(PIP) "$(TORCH)"
	@touch $@

$(TRAIN): $(BASE) pyproject.toml setup.py $(CPP)
	@echo "[setup] ltp_sparse with its training extra (compiled extension: LTP_SPARSE_EXT=$(LTP_SPARSE_EXT))"
	@$(PIP) --no-build-isolation -e '.[train]'
	@touch $@

$(TEST): $(TRAIN)
	@echo "[setup] tools for tests, benchmarks and lint"
	@# the extension lies in the package since the step before: it is not compiled a second time
	@LTP_SPARSE_EXT=off $(PIP) --no-build-isolation -e '.[train,triton,ray,slurm,quantised,test,bench,dev,docs]'
	@touch $@
