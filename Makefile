# Everything runs in .venv, which every target makes for itself. `make help` lists the targets.
PYTHON ?= python3
# A bare "torch" may pull gigabytes of CUDA libraries; with an NVIDIA card, set TORCH to the build that you want.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# One thread a process, and threads that sleep while they wait: two that spin beside another process cost 20-fold.
QUIET := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
PYTEST := $(QUIET) $(BIN)/python -m pytest

.PHONY: help demo check format test test-long test-faults test-gpu wheel bench bench-gpu generate clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' -c constraints.txt
	@touch $@

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

test-gpu: $(VENV)/.installed ## what needs a CUDA card
	$(PYTEST) -m "gpu"

wheel: $(VENV)/.installed ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

bench: $(VENV)/.installed ## docs/speed.md's figures for a CPU, anew (half an hour)
	$(QUIET) $(BIN)/python bench/startup.py
	$(QUIET) $(BIN)/python bench/speed.py --size demo small --batch 1 4 --json bench/results/speed.json
	$(QUIET) $(BIN)/python bench/speed.py --size demo --batch 4 --processes 1 2 --json bench/results/processes.json

bench-gpu: $(VENV)/.installed ## the same on a CUDA card
	$(BIN)/python bench/gpu.py --json bench/results/gpu.json

generate: $(VENV)/.installed ## schemas/ and docs/settings.md, from the settings' definition
	$(BIN)/python -m everydream.config.generate

clean: ## remove the environment and caches (never logs)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
