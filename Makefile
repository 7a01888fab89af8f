# `make demo` and `make test` set up whatever they need in .venv; nothing has to be installed first
# but Python 3.11 or newer, make, git and a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(shell date +%Y%m%d-%H%M%S)

.PHONY: help install demo dashboards test chaos check format wheel parity docs verified hashes

help:
	@echo "make demo    train a small DETA on drawn shapes, on a Ray cluster on this machine"
	@echo "make dashboards   MLflow's pages, leaderboard, Prometheus and Grafana, on this machine only"
	@echo "make test    run the tests"
	@echo "make chaos   kill, freeze, fill, cut off and corrupt; a table of what a run survives"
	@echo "make check   format, lint, types, tests"
	@echo "make parity  differences to the published implementations, as a table"
	@echo "make docs    recipes beside the published configurations, into docs/recipes"
	@echo "make install what jobs need to run; make wheel: a wheel in dist/"
	@echo "make verified   all that jobs need, each package by its hash; make hashes: list them anew"

# What is installed, by group. A changed version or dependency installs again.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

install: $(VENV)/.installed-all

# NAME=my-run names the run; ARGS="schedule.epochs=2 …" changes its configuration.
NAME ?= demo-$(RUN_STAMP)
demo: $(VENV)/.installed-all
	$(BIN)/python jobs/deta_r50.py --variant demo --name $(NAME) storage=runs $(ARGS)

dashboards: $(VENV)/.installed-all
	$(BIN)/python jobs/dashboards.py

# Files are kept whole. What starts clusters comes after the rest, two at a time: it mostly waits.
SIDE_BY_SIDE = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 15

test: $(VENV)/.installed-dev
	$(SIDE_BY_SIDE) -m "not cluster"
	$(SIDE_BY_SIDE) -m cluster

# Faults for real, all of them: about 40 minutes. One: python -m tests.chaos A1
chaos: $(VENV)/.installed-dev
	$(BIN)/python -m tests.chaos --core --table

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(SIDE_BY_SIDE) -m "not cluster"
	$(SIDE_BY_SIDE) -m cluster

# The packages by their content: pip refuses one that differs in a byte. hashes.txt says for which
# system; `make hashes` writes it anew, for this one, after a change of versions.
verified:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement hashes.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(VENV)/.installed-all

hashes: $(VENV)/.installed-all
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --report $(VENV)/report.json \
	    --constraint constraints.txt "setuptools>=77" --editable ".[all]"
	$(BIN)/python jobs/materials.py --hashes $(VENV)/report.json --output hashes.txt

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-dev
	$(BIN)/python jobs/recipe_pages.py

parity: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/parity.py

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
