# Everything runs in .venv, which every target makes for itself. `make help` lists the targets.
PYTHON ?= python3
# On Linux PyPI's torch is a CUDA build, with gigabytes of NVIDIA's libraries. Another one comes from another index:
# make install TORCH_INDEX=https://download.pytorch.org/whl/cpu (or …/cu130: what your driver can; pytorch.org)
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
# With a card and no network: make test-gpu GPU_PYTHON=python3, an interpreter that has the packages; no .venv is made.
GPU_PYTHON ?= $(BIN)/python
GPU_READY := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.installed)
# One thread a process, and threads that sleep while they wait: two that spin beside another process cost 20-fold.
QUIET := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
PYTEST := $(QUIET) $(BIN)/python -m pytest

.PHONY: help install demo check format test test-long test-faults test-gpu wheel bench bench-gpu generate clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" \
		$(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' -c constraints.txt
	@touch $@

install: $(VENV)/.installed ## .venv with everything in it

demo: $(VENV)/.installed ## train the embedded model on the embedded subject, and say where the results are
	$(BIN)/accelerate launch -q scripts/train.py --config examples/demo/train.json

check: $(VENV)/.installed ## format, lint, types, import arrows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) tests/test_architecture.py

format: $(VENV)/.installed ## write what `make check` wants
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(VENV)/.installed ## the tests (a few minutes on 2 cores)
	$(PYTEST) -n 2 --dist loadfile -m "not long and not gpu"

test-long: $(VENV)/.installed ## many kills, other environments, the documentation's commands
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[wandb]' -c constraints.txt
	$(PYTEST) -m "long"

test-faults: $(VENV)/.installed ## all injected faults, in their long form
	$(PYTEST) tests/faults

test-gpu: $(GPU_READY) ## what needs a CUDA card
	$(QUIET) $(GPU_PYTHON) -m pytest -m "gpu" -o filterwarnings=default tests/gpu tests/optim \
		tests/training/test_optimizer_state.py tests/training/test_checkpoint_snapshot.py

wheel: $(VENV)/.installed ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

RESULTS := bench/results
bench: $(VENV)/.installed ## docs/speed.md's tables for a CPU, anew (an hour and a half, on a quiet machine)
	$(QUIET) $(BIN)/python bench/startup.py --json $(RESULTS)/startup.json
	$(QUIET) $(BIN)/python bench/speed.py --json $(RESULTS)/speed_demo.json
	$(QUIET) $(BIN)/python bench/speed.py --size small --batch 1 --rounds 3 --steps 25 --json $(RESULTS)/speed_small.json
	$(QUIET) $(BIN)/python bench/speed.py --batch 4 --processes 1 2 --rounds 3 --json $(RESULTS)/processes.json
	$(QUIET) $(BIN)/python bench/each.py --steps 40 --json $(RESULTS)/each.json
	$(QUIET) $(BIN)/python bench/checkpoint.py --size demo small --rounds 9 --json $(RESULTS)/checkpoint.json
	$(QUIET) $(BIN)/python bench/memory.py --json $(RESULTS)/memory.json

bench-gpu: $(GPU_READY) ## the same on a CUDA card
	$(GPU_PYTHON) bench/gpu.py --json bench/results/gpu.json

generate: $(VENV)/.installed ## schemas/ and docs/settings.md, from the settings' definition
	$(BIN)/python -m everydream.config.generate

clean: ## remove the environment and caches (never logs)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
