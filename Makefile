# `make demo` and `make test` install what they need into .venv. Before that, a machine needs only
# Python 3.11 or newer, make, git and a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(shell date +%Y%m%d-%H%M%S)

.PHONY: help install demo dashboards test chaos mutants check format wheel parity docs site verified hashes materials

help:
	@echo "make install     install what jobs need to run"
	@echo "make demo        train a small DETA on drawn shapes, on a Ray cluster on this machine"
	@echo "make dashboards  serve MLflow's pages, leaderboard, Prometheus and Grafana on loopback"
	@echo "make test        run the tests"
	@echo "make chaos       inject faults into real runs and print a table of what a run survives"
	@echo "make mutants     change the core rooms in small ways and check that the tests notice"
	@echo "make check       check format, lint and types, then run the tests"
	@echo "make format      format the code and fix what ruff can fix"
	@echo "make parity      print a table of differences to the published implementations"
	@echo "make docs        compare recipes with the published configurations, in docs/recipes"
	@echo "make site        build the documentation site in site/"
	@echo "make wheel       build a wheel in dist/"
	@echo "make verified    install what jobs need, each package checked by its hash"
	@echo "make hashes      write hashes.txt again, after a change of versions"
	@echo "make materials   write sbom.json, the installed packages as CycloneDX"

# One stamp file for each installed extra. A changed version or dependency installs again.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@echo "installing into $(VENV): PyTorch, Ray, MLflow and more; several minutes, up to 7 GB"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@

install: $(VENV)/.installed-all

# NAME=my-run names the run; ARGS="schedule.epochs=2 …" changes its configuration.
NAME ?= demo-$(RUN_STAMP)
demo: $(VENV)/.installed-all
	$(BIN)/python jobs/deta_r50.py --variant demo --name $(NAME) $(ARGS)

dashboards: $(VENV)/.installed-all
	$(BIN)/python jobs/dashboards.py

# A test file runs in one process. Tests that start clusters run last, two at a time: they mostly
# wait.
SIDE_BY_SIDE = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 15

test: $(VENV)/.installed-dev
	$(SIDE_BY_SIDE) -m "not cluster"
	$(SIDE_BY_SIDE) -m cluster

# Injects all faults for real, in about 40 minutes. For one fault: python -m tests.chaos A1
chaos: $(VENV)/.installed-dev
	$(BIN)/python -m tests.chaos --core --table

# About half an hour on two cores. It goes on where it was stopped.
mutants: $(VENV)/.installed-mutation
	OMP_NUM_THREADS=1 $(BIN)/python -c "from mutmut.__main__ import cli; cli()" run --max-children 2
	$(BIN)/python -m tests.mutation

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(SIDE_BY_SIDE) -m "not cluster"
	$(SIDE_BY_SIDE) -m cluster

# Packages are checked by content: pip refuses one that differs in a byte.
verified:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement hashes.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(VENV)/.installed-all

hashes: $(VENV)/.installed-release
	$(BIN)/uv pip compile --quiet --universal --extra all --constraint constraints.txt \
	    --generate-hashes --no-annotate --no-header --python $(BIN)/python \
	    --output-file hashes.txt pyproject.toml

materials: $(VENV)/.installed-release
	$(BIN)/cyclonedx-py environment --output-file sbom.json $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-dev
	$(BIN)/python jobs/recipe_pages.py

# The website of docs/ in site/, with the Python API; any warning, such as a broken link, is an error.
# The parser of docstrings reads folders with an __init__.py only, so it gets a copy that has them.
# No --quiet: it hides the warnings from --strict, too.
site: $(VENV)/.installed-docs
	rm -rf build/site
	mkdir -p build/site
	cp -RL deta build/site/
	for room in dashboards jobs model ops platform; do touch build/site/deta/$$room/__init__.py; done
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html"

parity: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/parity.py

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
