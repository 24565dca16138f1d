# Two commands set everything up: `make demo` and `make test`. Each makes .venv the first time.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint build clean

demo: .venv/installed
	$(BIN)/headstart demo

test: .venv/installed  # two processes; the tests of one file share what they build
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/installed  # builds the wheel and installs it into an empty environment
	$(BIN)/python -m pytest -q -m slow -n 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

build: .venv/installed
	$(BIN)/python -m build

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu,export,trt-rtx,dev]'
	touch $@

clean:
	rm -rf .venv .demo build dist *.egg-info
