# The checks of this project, in the present environment (.venv unless PYTHON says otherwise).
PYTHON ?= .venv/bin/python
RUN = CI_PYTHON=$(PYTHON) bash .ci/run

.PHONY: check test lint types floors docs examples quickstart compat format

check: ## everything CI runs, without making a new environment
	$(RUN) lint types floors docs quickstart compat test

test:
	$(RUN) test

lint:
	$(RUN) lint

types:
	$(RUN) types

floors:
	$(RUN) floors

docs:
	$(RUN) docs

examples:
	$(RUN) examples

quickstart:
	$(RUN) quickstart

compat:
	$(RUN) compat

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
