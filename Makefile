# make run    set everything up, chat with a real model, show what chunked prefill does to running streams
# make test   set everything up, run the tests
# Each target makes what it needs in .venv and is quick when nothing changed.

VENV   := .venv
PY     := $(VENV)/bin/python
PYTHON ?= python3
MODEL  ?= smollm2
CXX_FILES := '*.h' '*.cpp' '*.cuh' '*.cu'
# One thread per test process and a process per core: two OpenMP pools on one core would wait for each other.
PYTEST ?= OMP_NUM_THREADS=1 MIXATTN_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help run test test-slow test-aarch64 sanitize lint format bench bench-gpu tune bench-peers static build env clean

help:
	@sed -n '1,3s/^# //p' Makefile
	@echo 'make lint | format | bench | static | build | test-slow | test-aarch64 | sanitize | clean'
	@echo 'make bench-gpu     attention on a GPU beside other libraries (BENCH_GPU: more arguments, such as --full)'
	@echo 'make tune          the tiles of Triton attention, measured on this GPU (TUNE: more arguments, such as --full)'
	@echo 'make bench-peers   the same work on mixattn, vLLM, OpenVINO and llama.cpp, one table (PEERS: where they are put)'

# The environment is made anew when what it is made from changes.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt tools/make_env.sh
	PYTHON=$(PYTHON) sh tools/make_env.sh $(VENV)
	@touch $@

env: $(VENV)/.ready

# ninja decides what is to be compiled.
build: env
	@$(PY) setup.py -q build_ext --inplace

run: build
	$(VENV)/bin/mixattn-engine chat $(MODEL) --temperature 0 --max-tokens 96 \
	  --message 'In two sentences: why should a long prompt not hold up everybody else?'
	$(VENV)/bin/mixattn-engine demo $(MODEL)

test: build
	$(PYTEST) -m 'not slow'

test-slow: build
	$(PYTEST) -m slow

# The emulated CUDA kernels under the compiler's sanitizers.
sanitize: build
	$(PYTEST) --dist load tests/cuda/test_sanitizers.py

# The kernels for aarch64 on an emulated one, on Debian: see tools/aarch64.sh.
AARCH64_TESTS ?= -q -k 'not scalar and not avx and not reference' $(addprefix tests/ops/test_,elementwise.py linear.py append_kv.py merge_states.py \
  quantized_kv.py tree_mask.py attention.py attention_invariant.py attention_prefix.py)
test-aarch64: env
	PYTHON=$(PY) sh tools/aarch64.sh build/aarch64 $(AARCH64_TESTS)

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files $(CXX_FILES))
	$(VENV)/bin/mypy

format: env
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files $(CXX_FILES))

bench: build
	$(PY) -m bench.kernels.bench_plan
	$(PY) -m bench.kernels.bench_mixed_attention
	$(PY) -m bench.kernels.bench_attention_options
	$(PY) -m bench.kernels.bench_linear
	$(PY) -m bench.serving.bench_scheduler
	$(PY) -m bench.serving.bench_step $(MODEL)
	$(PY) -m bench.serving.bench_offline $(MODEL)

# Attention on this machine's GPU, beside the libraries that are installed. Status 77 without one.
bench-gpu: build
	$(PY) -m bench.kernels.bench_mixed_attention --backend triton cuda $(BENCH_GPU)

# The attention kernel's tiles, measured on this machine's GPU and kept for it. Status 77 without one.
tune: build
	$(PY) -m bench.kernels.tune $(TUNE)

# The peers' environments and models go to PEERS (default .peers): 9 GB, about 20 minutes the first time.
bench-peers: build
	sh bench/peers/setup.sh $(PY)
	$(PY) -m bench.peers $(BENCH_PEERS)

# What the compilers make of the Triton kernels for GPUs that need not be there, against limits and record.
static: build
	$(PY) -m bench.static.contracts

clean:
	rm -rf $(VENV) build dist *.egg-info mixattn/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
