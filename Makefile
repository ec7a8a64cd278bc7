# `make help` explains every target.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
VLLM_VENV ?= bench/cache/vllm
# One thread per process: two threads on two busy cores were seen 40 times slower.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-vllm fuzz quality compat zoo bench docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $(STAMP)

setup: $(STAMP) ## create .venv and install hf_effi with the tested versions

demo: $(STAMP) ## the main job: EffiGRPOTrainer against TRL's GRPOTrainer on the same work (CPU, offline, < 12 min)
	$(BIN)/hf-effi demo --output-dir demo-output

test: $(STAMP) ## the whole CPU test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

test-vllm: ## the vLLM tests on a real vLLM for CPUs, in a virtual environment of its own (3.7 GB, about 15 minutes)
	PYTHON=$(PYTHON) tests/engines/install_vllm.sh $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m tests.engines.run_vllm

fuzz: $(STAMP) ## files of strangers (records, states, cards, YAML, side files, weights), changed at random: some minutes
	HF_EFFI_FUZZ=30 $(BIN)/python -m pytest -q tests/unit/test_fuzz_files.py tests/unit/test_fuzz_weights.py

quality: $(STAMP) ## lint, format and type check
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

compat: $(STAMP) ## oldest allowed, pinned and newest release of transformers, trl, accelerate, peft, datasets
	$(BIN)/python -m bench.compatibility
	$(BIN)/python -m bench.render

zoo: $(STAMP) ## every model class against every feature, then the table of what works with which models
	$(BIN)/python -m bench.zoo
	$(BIN)/python -m bench.render

bench: $(STAMP) ## run the benchmarks whose result file is missing, then render the tables
	$(BIN)/python -m bench.run_missing
	$(BIN)/python -m bench.render

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP) ## build the documentation site into site/
	$(BIN)/python -m mkdocs build --strict --quiet

clean: ## remove what the targets above made
	rm -rf $(VENV) site demo-output build dist *.egg-info
