# `make demo` and `make test` need python3 (3.10 or newer), pip and git, and nothing else.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
export UV_PYTHON_DOWNLOADS := never
# The checks start hundreds of processes: without bytecode each would compile all modules again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo test lint bench dev simulate simulate-bugs services-test daemon-test \
	browser-test docs docs-images project-test export-test cluster-setup cluster-test matrix-test \
	test-all lock release clean

help:  ## Say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: .venv/.ready  ## Install the locked packages into .venv

# uv comes through pip into a folder of its own, so that no venv module and no installer is needed.
.uv/bin/uv:
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --target .uv uv==0.13.9

.venv/.ready: requirements.lock pyproject.toml .uv/bin/uv
	@.uv/bin/uv venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" .venv
	@.uv/bin/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	@.uv/bin/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## Make the sample's images with the emulator: no key, no cost
	@$(BIN)/krea-dagster demo

test: setup  ## Run the test suite
	@$(BIN)/pytest -n auto --dist worksteal

lint: setup  ## Check style, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@! grep -rn 'from __future__ import annotations' krea_dagster/plugin definitions.py \
		|| { echo 'Dagster cannot read annotations that are text'; exit 1; }

bench: setup  ## Measure against code that users write today (an hour; BENCH=quick: a few minutes)
	@$(BIN)/python -m benchmarks $(if $(filter quick,$(BENCH)),--quick)

dev: setup  ## Open Dagster's UI on what was made, at http://127.0.0.1:3000
	@DAGSTER_HOME="$${DAGSTER_HOME:-$(CURDIR)/data/krea/dagster}"; mkdir -p "$$DAGSTER_HOME"; \
	DAGSTER_HOME="$$DAGSTER_HOME" $(BIN)/dagster dev -f definitions.py -h 127.0.0.1 -p $${PORT:-3000}

simulate: setup  ## Play whole runs on virtual time, a scenario a seed (SEEDS=10000, or SEED=7 alone)
	@$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),10000))

simulate-bugs: setup  ## Put old bugs back, one at a time, and see the simulation find them
	@$(BIN)/python -m tests.simulation.mutations

services-test: setup  ## Run the journal's tests against a real PostgreSQL
	@$(BIN)/python tests/services/run.py

daemon-test: setup  ## Drive a whole Dagster: automation, backfills, cancelling (7 minutes)
	@$(BIN)/pytest $(or $(ONLY),tests/daemon) -m daemon -n 4

browser-test: setup  ## Look at Dagster's UI in a real browser (needs Chromium)
	@$(BIN)/pytest tests/browser -m browser -n 3 --dist loadfile

docs: setup  ## Build the documentation's site into build/docs
	@$(BIN)/python -m sphinx -b html -q -W --keep-going -j 2 docs build/docs
	@echo "file://$(CURDIR)/build/docs/index.html"

docs-images: setup  ## Make the screenshots in docs/images (needs Chromium)
	@$(BIN)/python -m tests.browser.make_images docs/images

project-test: setup  ## Install the wheel into a fresh dg project, as its page says
	@$(BIN)/python tests/project/run.py

export-test: setup  ## Read exports and manifests by other libraries, in environments of their own
	@$(BIN)/python tests/export_env/run.py
	@$(BIN)/python tests/export_env/onward.py

# Azurite, the emulator of Azure, is a program for Node.js, which is among the packages.
cluster-setup: setup
	@.uv/bin/uv pip install --quiet --python $(BIN)/python --require-hashes \
		--requirements requirements-cluster.lock
	@test -e .venv/azurite/package.json || PATH="$(abspath $(BIN)):$$PATH" \
		npm install --silent --no-audit --no-fund --prefix .venv/azurite azurite@3.37.0

# In the files' order the longest, of one test, begins first; reordered by their tests it would be last.
cluster-test: cluster-setup  ## Share work between hosts, on real stores, PostgreSQL and Celery (root)
	@$(BIN)/pytest $(or $(ONLY),tests/cluster) -m cluster -n 3 --dist loadfile --no-loadscope-reorder

matrix-test: setup  ## Test the wheel on each Python that is here, with the newest and the oldest packages
	@$(BIN)/python tests/matrix/run.py $(VERSIONS)

test-all: test services-test daemon-test project-test export-test matrix-test browser-test cluster-test  ## Run every test (an hour on two cores)

release: setup  ## Write a version, build the wheel and the sdist, and install each (VERSION=0.2.0)
	@$(BIN)/python -m tools.release $(VERSION)

LOCK = .uv/bin/uv pip compile --quiet pyproject.toml --group dev --universal --python-version 3.10 \
	--generate-hashes --no-header

# What few need is large, and is in a file of its own: `make demo` does not install it.
lock: setup  ## Resolve the newest packages into requirements.lock and requirements-cluster.lock
	@$(LOCK) --upgrade --extra polars --extra postgres --extra ui --output-file requirements.lock
	@$(LOCK) --upgrade --all-extras --group cluster --constraints requirements.lock \
		--output-file requirements-cluster.lock

clean:  ## Remove what was made and installed
	@rm -rf data/krea .venv .uv
