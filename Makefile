# `make` lists the targets. Every target first updates .venv to pyproject.toml and constraints.txt.
# A new machine needs only Python, make and a C++ compiler. Without the compiler, the optimizers are
# slower.

# The interpreter of a new .venv, 3.10 or later. An existing .venv keeps its own without PYTHON=.
PYTHON ?= python3
# Options of the commands: PRESET=quick, WORKERS=4, LOGGER=wandb, START=own, SEEDS=0,1. Robustness
# and suite also take TASKS=mlp, METHODS=Auto,Adam and LRS=1e-3,10. ARGS= goes to pytest unchanged.
PRESET ?=
WORKERS ?=
LOGGER ?=
START ?=
SEEDS ?=
TASKS ?=
METHODS ?=
LRS ?=
ARGS ?=
# FAST=1: the main tests, which quickly show that the library works here.
FAST ?=
FAST_TESTS := -m 'not slow and not compiler' tests/test_algorithm.py tests/test_notation.py tests/test_identity.py
# TORCH=oldest uses .venv-oldest with the oldest torch that pyproject.toml allows.
TORCH ?=

VENV := .venv$(if $(TORCH),-$(TORCH))
PY := $(VENV)/bin/python
# Written last. Without it, the setup was interrupted, or .venv was made by hand.
STAMP := $(VENV)/.setup-done
CONSTRAINTS := constraints$(if $(TORCH),-$(TORCH)).txt
VERSION_OF = $(shell '$(1)' -c 'import sys; print(sys.version)' 2>/dev/null)
RUN_OPTIONS = $(if $(WORKERS),workers=$(WORKERS)) $(if $(LOGGER),logger=$(LOGGER))
# A command rejects options that it does not know.
TABLE_OPTIONS = $(if $(PRESET),preset=$(PRESET)) $(RUN_OPTIONS) $(if $(START),start=$(START)) \
	$(if $(SEEDS),seeds=$(SEEDS))

# Loggers other than csv have a command that uploads the results.
PUSH = $(if $(filter-out csv,$(LOGGER)),$(PY) -m experiments.records.push_$(LOGGER),:)

# Only a given PYTHON= can differ from the interpreter of an existing .venv.
ifneq ($(origin PYTHON),file)
ifneq ($(call VERSION_OF,$(PYTHON)),$(call VERSION_OF,$(PY)))
OTHER_PYTHON := other-python
endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup test lint format reproduce reproduce-table1 reproduce-figure2 reproduce-figure3 reproduce-char-rnn reproduce-robustness reproduce-suite reproduce-v1 check-figure3 figures gallery tables benchmark gpu-check report docs clean other-python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / {printf "  make %-21s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv and install everything, unless it is up to date

$(STAMP): pyproject.toml $(CONSTRAINTS) $(OTHER_PYTHON)
	@$(if $(OTHER_PYTHON),false,$(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null) || { \
		command -v '$(PYTHON)' >/dev/null || { \
			echo "PYTHON=$(PYTHON) is not a program; give one that runs Python 3.10 or later, as in: make setup PYTHON=python3.12" >&2; exit 1; }; \
		'$(PYTHON)' -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "PYTHON=$(PYTHON) is Python %d.%d; give one of 3.10 or later, as in: make setup PYTHON=python3.12" % v[:2])' && \
		'$(PYTHON)' -m venv --clear $(VENV); }
	@echo "Installing into $(VENV) with $$($(PY) --version); the first time this takes a few minutes, most of it for torch."
	@$(PY) -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) -e '.[experiments,dev,frameworks,peers,scaleout]'
	@touch $@

test: $(if $(FAST),setup,lint) ## lint, then run the tests (FAST=1: only the main tests; LONG=1: also tests of minutes; TORCH=oldest: with the oldest torch)
	@$(if $(LONG),LONG=1) $(PY) -m pytest -n $(or $(WORKERS),2) --dist worksteal $(if $(FAST),$(FAST_TESTS)) $(ARGS)

lint: setup ## check style (ruff) and types (mypy)
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet . || { echo "Some files are not formatted; fix them with: make format" >&2; exit 1; }
	@$(if $(TORCH),,$(PY) -m mypy)

format: setup ## format the code and fix what ruff can fix
	@$(PY) -m ruff check --quiet --fix . ; $(PY) -m ruff format .

reproduce: setup ## train and draw all tables and figures with a preset, such as PRESET=quick
	@$(PY) -m experiments.studies all $(TABLE_OPTIONS)

reproduce-table1: setup ## train all runs of the paper's Table 1 and draw it (PRESET=quick for a trial)
	@$(PY) -m experiments.studies table1 $(TABLE_OPTIONS)

reproduce-figure2: setup ## train ResNet-20 from all starts of Figure 2 and draw it (PRESET=cpu or paper)
	@$(PY) -m experiments.studies figure2 $(TABLE_OPTIONS)

reproduce-figure3: setup ## train towers from 21 initial step sizes and draw Figure 3 (PRESET=cpu, paper or quick)
	@$(PY) -m experiments.studies figure3 $(TABLE_OPTIONS)

reproduce-char-rnn: setup ## train the character RNN from all starts and draw it (PRESET=cpu or paper)
	@$(PY) -m experiments.studies char_rnn $(TABLE_OPTIONS)

reproduce-robustness: setup ## train from many initial lrs, beside learning-rate-free methods (PRESET=cpu or paper)
	@$(PY) -m experiments.studies robustness $(TABLE_OPTIONS) \
		$(if $(TASKS),tasks=$(TASKS)) $(if $(METHODS),methods=$(METHODS)) $(if $(LRS),lrs=$(LRS))

reproduce-suite: setup ## train many small tasks, Auto beside tuned optimizers (PRESET=cpu or paper)
	@$(PY) -m experiments.studies suite $(TABLE_OPTIONS) \
		$(if $(TASKS),tasks=$(TASKS)) $(if $(METHODS),methods=$(METHODS)) $(if $(LRS),lrs=$(LRS))

reproduce-v1: setup ## train all runs of the tables of the paper's first version and draw them
	@$(PY) -m experiments.studies tables_v1 $(TABLE_OPTIONS)

check-figure3: setup ## check the paper's claims on taller towers against our runs
	@$(PY) -m experiments.studies.figure3.report

figures: reproduce-figure3 gallery ## do the missing runs of the towers' figures, and draw them
	@$(PY) -m experiments.studies surface $(RUN_OPTIONS)

gallery: setup ## draw the gallery of paths in two dimensions, with its animation
	@$(PY) -m experiments.studies gallery && $(PUSH)

benchmark: setup ## time a step beside torch.optim and the published package, on one core (20 minutes)
	@$(PY) -m experiments.studies step_time && $(PUSH)

gpu-check: setup ## check on a GPU what needs a GPU, in ten minutes; writes results/gpu_check.md
	@$(PY) tests/gpu_check.py

tables: setup ## redraw every table and figure from the results in the repository, without training
	@$(PY) -m scripts.tables && $(PUSH)

report: setup ## put all tables, figures and runs on one page, results/report/index.html
	@$(PY) -m scripts.report && $(PUSH)

docs: setup ## build the documentation site, site/index.html; the first warning is an error
	@$(PY) -c 'import mkdocs, mkdocstrings, latex2mathml' 2>/dev/null || \
		$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt --editable '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict && echo "site/index.html"

clean: ## remove caches and builds; runs, data and .venv stay
	@rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -exec rm -rf {} +
