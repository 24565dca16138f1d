# Two commands set everything up: `make demo` and `make test`. Each makes .venv the first time.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint build clean

demo: .venv/installed
	$(BIN)/headstart demo

test: .venv/installed
	$(BIN)/python -m pytest -q

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
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu,export,dev]'
	touch $@

clean:
	rm -rf .venv .demo build dist *.egg-info
