# make demo    the whole story on this machine: world, start policy, GRPO against SD-Search, table
# make test    style, and the tests that guard daily work: all but those marked slow
# make test-all   style and all tests: what continuous integration runs, with make test-vllm
# make trust   kills, full disks, stuck ranks, bad numbers at full counts (an hour), and docs/trust.md with what came out
# make test-vllm  the tests that need a real vLLM, in an environment of their own (.venv-vllm, 2.5 GB); -j2: as two halves
# make demo-vllm  the demo with vLLM as the rollout engine, in that environment
# make bench   benchmarks: ratios of two implementations in one run
# make lint    style only
# make gpu-check  on a machine with a CUDA GPU and nvcc: build, GPU tests, sanitizers, benchmarks; no set-up, PYTHON needs torch only
# make gpu-check-train  on a machine with a CUDA GPU and DeepSpeed: what updates of 0.5B, 3B and 7B cost; PYTHON needs the project's packages
# make gpu-check-all  the first hour on a GPU node, in order, with what is expected and what to send: launch/doctor/first_hour.py
# make docs    the site of docs/ in build/site, without a warning; the reference is written from the records of parameters
# make wheel   dist/megatron_sd-*.whl
# Every target sets up .venv by itself; it is renewed when setup.py changes. Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/ready
# Processes that share the tests; each takes a GiB, and as much for each rank that it starts.
JOBS   ?= 2
# A file's tests stay together, so that what they share is made once; tests/conftest.py puts the longest files first.
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
BENCH  := .venv/ready-bench
DOCS   := .venv/ready-docs
# Benchmark figures of this machine, to compare with later.
JSON   ?= runs/bench.json
# Those that need neither a GPU nor a pretrained model.
BENCHMARKS := kernels.jsd kernels.linear_jsd kernels.head_visits kernels.few_rows kernels.teacher_logits training.grpo_step training.shared_prompts \
  training.memory training.overhead algorithm.assemble training.checkpoint algorithm.estimators training.publish rollout.turns rollout.vllm_turns \
  retrieval.bm25 retrieval.bm25_size retrieval.service \
  retrieval.import_memory
# Without a CUDA GPU torch goes first and alone, so that a CPU build that pip can see is taken.
TORCH  := torch==2.13.0
PIP     = $(BIN)/python -m pip --quiet --disable-pip-version-check install

# vLLM's environment: exact versions, since vLLM pins torch and transformers tightly.
VLLM      := .venv-vllm/ready
VLLM_PACKAGES := .venv-vllm/packages
VLLM_LOCK := tests/vllm/cpu_lock.txt
# Two halves that take equally long, so that `make -j2 test-vllm` runs them side by side.
VLLM_SHARED := $(patsubst %,tests/vllm/test_vllm_%.py,engine failures publish gate)
VLLM_PIP   = .venv-vllm/bin/python -m pip --quiet --disable-pip-version-check install

.PHONY: demo demo-vllm test test-all trust test-vllm test-vllm-shared test-vllm-own bench gpu-check gpu-check-train \
  gpu-check-all lint docs wheel clean

demo: $(READY)
	@$(BIN)/sd-search demo

test: lint
	@echo "== tests"
	@$(PYTEST) -m "not slow"

# two processes more: real SLURM and real launchers wait more than they compute
test-all: JOBS = 4
test-all: lint
	@echo "== all tests"
	@$(PYTEST)

trust: $(READY)
	@$(BIN)/python -m tests.trust

lint: $(READY)
	@echo "== style"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary

bench: $(BENCH)
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name --json $(JSON); done

gpu-check:
	@$(PYTHON) -m benchmarks.kernels.gpu_check

gpu-check-train:
	@$(PYTHON) -m benchmarks.training.gpu_train

gpu-check-all:
	@$(PYTHON) -m launch.doctor.first_hour

test-vllm: test-vllm-shared test-vllm-own

test-vllm-shared: $(VLLM)
	@echo "== tests with vLLM: on servers that they share, and the gate"
	@.venv-vllm/bin/python -m pytest $(VLLM_SHARED)

test-vllm-own: $(VLLM)
	@echo "== tests with vLLM: runs that start it themselves"
	@.venv-vllm/bin/python -m pytest tests/vllm $(VLLM_SHARED:%=--ignore=%)

demo-vllm: $(VLLM)
	@.venv-vllm/bin/sd-search demo --engine vllm

# not --quiet: strict mode would not hear of warnings
docs: $(DOCS)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "the site: build/site/index.html"

wheel: $(READY)
	@echo "== wheel"
	@$(BIN)/python -m pip --quiet --disable-pip-version-check wheel --no-deps --wheel-dir dist .
	@ls dist/*.whl

$(READY): setup.py
	@echo "== set-up 1/3: virtual environment in .venv"
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, found {sys.version}" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv .venv
	@echo "== set-up 2/3: torch"
	@if nvidia-smi -L >/dev/null 2>&1; then $(PIP) "torch>=2.13,<2.14"; else $(PIP) "$(TORCH)"; fi
	@echo "== set-up 3/3: megatron-sd and its other packages"
	@$(PIP) --editable ".[dev]"
	@touch $@

$(BENCH): $(READY)
	@echo "== set-up: packages that only benchmarks need"
	@MEGATRON_SD_NATIVE=keep $(PIP) --editable ".[bench]"
	@touch $@

$(DOCS): $(READY)
	@echo "== set-up: packages that only the site needs"
	@MEGATRON_SD_NATIVE=keep $(PIP) --editable ".[docs]"
	@touch $@

# Apart from the project itself, so that continuous integration can install these while other tests run.
$(VLLM_PACKAGES): $(VLLM_LOCK)
	@echo "== set-up 1/3: virtual environment in .venv-vllm"
	@$(PYTHON) -m venv .venv-vllm
	@echo "== set-up 2/3: torch, then vLLM and everything else at locked versions"
	@$(VLLM_PIP) "$(TORCH)"
	@$(VLLM_PIP) --no-deps -r $(VLLM_LOCK)
	@touch $@

# A library that .venv's set-up compiled of the same sources is taken as it is.
$(VLLM): setup.py $(VLLM_PACKAGES)
	@echo "== set-up 3/3: megatron-sd"
	@if [ -z "$$(find setup.py kernels/csrc -newer megatron_sd/_C.so 2>&1)" ]; then export MEGATRON_SD_NATIVE=keep; fi; \
	  MEGATRON_SD_CUDA=0 $(VLLM_PIP) --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info
