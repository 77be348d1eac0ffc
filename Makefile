# make install | demo | test | lint | test-slow | test-gpu | test-browser | soak | tables | bench | bench-gpu | clean
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: install demo test lint test-slow test-gpu test-browser soak tables bench bench-gpu clean

install: $(STAMP)

# The stamp is written last, so an interrupted installation is done again.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo 'error: the pinned versions need Python 3.11 to 3.13; choose one with make PYTHON=python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lite,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m densekit.demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two at a time, a file of tests in one process; a thread each.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

# Real photographs: DENSEKIT_SAMPLES names the folder that holds them (see CONTRIBUTING.md).
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# Installs Debian's Chromium where it is missing.
test-browser: $(STAMP)
	sh tests/browser.sh

# About 15 minutes: a run that is killed again and again until it completes, against one that is not.
soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py

# The README's table of recipes, from configs/*/metafile.yml, and those of docs/scaling.md, counted.
tables: $(STAMP)
	$(BIN)/python -m densekit.report.recipes_table
	$(BIN)/python -m densekit.report.scaling_tables

# Speed and memory beside the peers, into benchmarks/results; docs/speed.md has what is measured.
bench: $(STAMP)
	CUDA_VISIBLE_DEVICES= $(BIN)/python tools/benchmark.py --device cpu

# Each tier has a budget of 8 minutes; a case that has begun is finished, and what is missing the next run of the same
# command measures. Behind them the parts of a block, 5 minutes, measured anew each time.
TIERS ?= 1 2 3 4 5 6 7
bench-gpu: $(STAMP)
	for tier in $(TIERS); do $(BIN)/python tools/benchmark.py --device cuda --tier $$tier --budget 480 || exit 1; done
	$(BIN)/python benchmarks/gpu_block.py --budget 300 --out benchmarks/results

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache
