# `make run` starts everything and speaks; `make test` checks everything. Both do all the set-up on a fresh machine.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
DEV_VENV := .venv-dev
BENCH_VENV := .venv-bench
BIN := $(DEV_VENV)/bin
PROTO := protos/chorus/v1/tts.proto
STUBS := tts_pb2.py tts_pb2.pyi tts_pb2_grpc.py tts_pb2_grpc.pyi
PROTOC = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I. --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTO)

.PHONY: help run test check format proto bench clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(VENV)/.installed $(if $(filter chattts,$(ENGINE)),$(VENV)/.chattts) ## Start everything on this machine and speak a sentence. ENGINE=espeak|tone|chattts, CARDS=1.
	@$(VENV)/bin/chorus up --hello --cards $(or $(CARDS),1) $(if $(ENGINE),--engine $(ENGINE))

# In the order of their names: left alone, pytest-xdist keeps files with few tests for the end, which take longest.
test: $(DEV_VENV)/.installed ## Run all tests.
	@PYTHONHASHSEED=0 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(ARGS)

check: $(DEV_VENV)/.installed ## Lint, types, contract, Dockerfiles, stale stubs.
	@$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/baseline.binpb
	$(BIN)/hadolint deploy/*.Dockerfile
	fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT
	$(call PROTOC,$$fresh)
	for stub in $(STUBS); do
		diff -q "$$fresh/protos/chorus/v1/$$stub" "protos/chorus/v1/$$stub" >/dev/null || { echo "$$stub is stale: run make proto"; exit 1; }
	done
	echo "all clean"

format: $(DEV_VENV)/.installed ## Format the code.
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

proto: $(DEV_VENV)/.installed ## Generate the stubs from the contract.
	@$(call PROTOC,.)

baseline: $(DEV_VENV)/.installed ## Move the contract's baseline. Wants an entry in CHANGELOG.md.
	@$(BIN)/buf build -o protos/baseline.binpb

bench: $(BENCH_VENV)/.installed ## Run the benchmarks, quickly.
	@$(BENCH_VENV)/bin/python -m bench.path --quick
	$(BENCH_VENV)/bin/python -m bench.text --quick
	$(BENCH_VENV)/bin/python -m bench.audio --quick
	$(BENCH_VENV)/bin/python -m bench.limiter --quick
	$(BENCH_VENV)/bin/python -m bench.cache --quick
	$(BENCH_VENV)/bin/python -m bench.scheduler --quick
	$(BENCH_VENV)/bin/python -m bench.simulate --quick
	$(BENCH_VENV)/bin/python -m bench.batcher --quick

clean: ## Remove what was installed and generated.
	@rm -rf $(VENV) $(DEV_VENV) $(BENCH_VENV) tests/clients/js/node_modules

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) …"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[service]'
	touch $@

$(VENV)/.chattts: $(VENV)/.installed
	@echo "installing ChatTTS and PyTorch into $(VENV) …"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[service,chattts]'
	touch $@

$(DEV_VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(DEV_VENV) …"
	$(PYTHON) -m venv $(DEV_VENV)
	$(DEV_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[service,chattts,dev]'
	touch $@

# What is measured against: other batchers are needed nowhere else.
$(BENCH_VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(BENCH_VENV) …"
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[service,dev,bench]'
	touch $@
