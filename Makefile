# Everything sets itself up: `make demo` or `make test` on a fresh machine needs Python and make only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_VENV := .venv-bench

.PHONY: help setup demo test test-slow lint bench docs clean

help:
	@echo "make demo   explain a digit classifier with 5 % wrong training labels; the report is demo/report.html"
	@echo "make test   run the tests; make test-slow the long ones: kills, process groups, whole studies"
	@echo "make lint   ruff and mypy"
	@echo "make bench  compare with peers on MNIST; writes docs/benchmarks.md"
	@echo "make docs   build the documentation into site/"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: setup
	$(BIN)/refluence demo --out demo

PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: setup
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

# The peers live in an environment of their own; one that cannot be installed is a line of the report, not an error.
BENCH_PIP := $(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check
BENCH_STAMP := $(BENCH_VENV)/.installed

bench: $(BENCH_STAMP)
	$(BENCH_VENV)/bin/python -m benchmarks.run $(BENCH_ARGS)

$(BENCH_STAMP): pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_PIP) --constraint constraints.txt --editable .
	$(BENCH_PIP) --no-deps --requirement benchmarks/requirements.txt || \
		grep '==' benchmarks/requirements.txt | xargs -n 1 $(BENCH_PIP) --no-deps || true
	@touch $(BENCH_STAMP)

docs: setup
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(BENCH_VENV) demo site build dist
