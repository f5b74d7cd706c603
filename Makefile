# The two commands: make run, make test. Both need Python 3.11+, make and a network to the package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# dg compares the active environment with the one in the project
export VIRTUAL_ENV := $(abspath $(VENV))
INSTALLED := $(VENV)/.installed
# test files side by side, one more than there are cores, as some only wait; four at most. Those that watch Dagster's daemon
# in a browser go alone: beside others, one of its looks can fall between two partitions of a run
SIDE_BY_SIDE := --numprocesses $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() + 1))') --dist loadfile --no-loadscope-reorder

.PHONY: help install run plan ui test test-long test-fast check format clean

help:
	@echo "make run        install, then run what is out of date and print the leaderboard"
	@echo "make test       install, then run all tests (make test-fast leaves the slow ones out)"
	@echo "make test-long  the few tests that take minutes each"
	@echo "make plan       say what would run, and why"
	@echo "make ui         serve the Dagster UI and MLflow on this machine"
	@echo "make check      lint, format, types, layers, Dagster definitions"
	@echo "make format     format the code"
	@echo "make clean      remove the work folder (everything that was produced)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on --no-compile \
	    --constraint constraints.txt --editable '.[dev]'
	# byte code on all cores (pip takes one); files for other versions of Python do not compile
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >$(VENV)/compileall.log || true
	touch $@

run: install
	$(BIN)/clipcov run

plan: install
	$(BIN)/clipcov plan

ui: install
	$(BIN)/clipcov ui

# the same examples in every run; pytest by hand goes on looking for new ones
test: install
	$(BIN)/python -m pytest -m ui
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --hypothesis-profile=ci -m "not ui and not long"

test-long: install
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --hypothesis-profile=ci -m long

test-fast: install
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not long"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/dagster definitions validate --log-level warning
	$(BIN)/dg check defs

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf work
