# Every target installs what it needs first, from the lock, and does nothing twice.
# EXPERIMENT= names a recipe in experiments/, ARGS= passes Hydra overrides through.
.DEFAULT_GOAL := help
.PHONY: help setup data train sweep audit report predict draw play ui dashboard reproduce compare bench check test clean
SHELL := /bin/bash
# So that the commands that digitlab prints are those of make.
export DIGITLAB_CALLER := make

EXPERIMENT ?= default
ARGS ?=
PORT ?= 5000
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p))))
# TORCH=cpu installs torch's smaller builds for the CPU alone, from PyTorch's own index; it is
# remembered until .venv is removed. Other values are those of `uv pip install --torch-backend`.
TORCH ?= $(shell cat .venv/torch-backend 2>/dev/null || echo default)

BIN := .venv/bin
UV = $(BIN)/uv pip
# The name changes with the lock, and with the place: what is installed names its own in many
# files. It is made last, so that half an installation has none.
STAMP := .venv/installed-$(shell { cat requirements.lock pyproject.toml; pwd -P; } | cksum | tr ' ' '-')-$(TORCH)
# In the lock, the entries that TORCH replaces.
TORCH_ENTRIES := ^(torch|torchvision|triton|nvidia-.*|cuda-.*)==

help: ## what each target does (this list)
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

setup: $(STAMP) ## install everything into .venv, checked against the hashes of requirements.lock

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed (found: $(PYTHON)): install it, or give PYTHON=/path/to/it"; exit 2; }
	@rm -f .venv/installed-*
	@echo "installing into .venv (once; some minutes on a slow line)"
	@grep -qsF "$$(pwd -P)/$(BIN)/python" $(BIN)/pip || "$(PYTHON)" -m venv --clear .venv
	@awk '/^uv==/ {on=1} on {print} on && !/\\$$/ {exit}' requirements.lock > .venv/uv.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
	@if [ "$(TORCH)" = default ]; then cp requirements.lock .venv/lock.txt; else \
		awk '/^[a-z]/ {skip = $$0 ~ /$(TORCH_ENTRIES)/} !skip' requirements.lock > .venv/lock.txt; fi
	@$(UV) sync --quiet --python $(BIN)/python --compile-bytecode --require-hashes .venv/lock.txt
	@if [ "$(TORCH)" != default ]; then $(UV) install --quiet --python $(BIN)/python \
		--torch-backend "$(TORCH)" $$(grep -oE '^(torch|torchvision)==[0-9.]+' requirements.lock); fi
	@$(UV) install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c "from digitlab.records.mlflow import save_tables; save_tables()"
	@echo "$(TORCH)" > .venv/torch-backend
	@echo "installed; \`source $(BIN)/activate\` lets this shell find the command digitlab"
	@touch $@

data: $(STAMP) ## fetch MNIST and verify it
	@$(BIN)/digitlab data $(ARGS)

train: $(STAMP) ## train one configuration
	@$(BIN)/digitlab train experiments=$(EXPERIMENT) $(ARGS)

sweep: $(STAMP) ## run the study of a recipe, or continue it
	@$(BIN)/digitlab sweep experiments=$(EXPERIMENT) $(ARGS)

audit: $(STAMP) ## check that trials and runs agree (ARGS=--repair repairs)
	@$(BIN)/digitlab audit $(ARGS)

report: $(STAMP) ## a study on one HTML page, lab/reports/<study>.html (ARGS= a study, --out FILE)
	@$(BIN)/digitlab report $(ARGS)

predict: export PICTURE := $(value IMAGE)
predict: $(STAMP) ## which digit an image shows, or the images of a folder (IMAGE="photo (1).jpg")
	@test -n "$$PICTURE" || { echo "IMAGE= is missing: an image file, or a folder of them"; exit 2; }
	@$(BIN)/digitlab predict "$$PICTURE" $(ARGS)

draw: PORT = 8000
draw: $(STAMP) ## draw a digit on a page, and see what the network reads (PORT=)
	@$(BIN)/digitlab draw --port $(PORT) $(ARGS)

play: PORT = 8000
play: $(STAMP) ## change a network's layers on a page, train it and watch it learn (PORT=)
	@$(BIN)/digitlab play --port $(PORT) $(ARGS)

ui: $(STAMP) ## open MLflow's pages on 127.0.0.1 (PORT=)
	@$(BIN)/digitlab ui --port $(PORT) $(ARGS)

dashboard: PORT = 8080
dashboard: $(STAMP) ## open Optuna's pages on 127.0.0.1 (PORT=)
	@$(BIN)/digitlab dashboard --port $(PORT) $(ARGS)

reproduce: $(STAMP) ## train a run again, with a verdict (RUN= an id, a name, study/7 or champion)
	@test -n "$(RUN)" || { echo "RUN= is missing: an id, a name, study/7, or champion"; exit 2; }
	@$(BIN)/digitlab reproduce "$(RUN)" $(ARGS)

compare: $(STAMP) ## what differs between runs (RUNS="one another")
	@test -n "$(RUNS)" || { echo 'RUNS= is missing: two runs or more, such as RUNS="champion study/7"'; exit 2; }
	@$(BIN)/digitlab compare $(RUNS) $(ARGS)

bench: $(STAMP) ## time runs, workers and bookkeeping in turns (an hour or so; leave the machine alone)
	@$(BIN)/digitlab bench $(ARGS)

check: $(STAMP) ## format, lint, types, layers, dependencies, printed figures
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache | grep -A40 "^Analyzed"
	@$(BIN)/deptry src
	@$(BIN)/python experiments/figures.py

test: $(STAMP) ## the tests (no network needed)
	@$(BIN)/python -m pytest $(ARGS)

clean: ## remove .venv and caches; the lab stays
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
