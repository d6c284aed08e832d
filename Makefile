# The few commands of this project; `make` alone lists them.
PYTHON ?= python3
VENV = .venv/bin
PACKAGES = server worker zcore

.PHONY: help environment run test lint format typecheck contracts lock demo-model pictures benchmark

help:  ## list these commands
	@sed -nE 's/^([a-z-]+):.*## /\1|/p' Makefile | awk -F'|' '{ printf "make %-12s %s\n", $$1, $$2 }'

environment:  ## make .venv with everything for running and testing
	@$(PYTHON) bin/environment.py test

run:  ## run API, worker and database here, with the demo model, until Ctrl-C
	@$(PYTHON) bin/environment.py run
	@$(VENV)/python bin/run.py

test: environment lint typecheck contracts  ## everything that CI checks; TESTS="-k name" chooses tests
	@$(VENV)/python -m tests.services.browser
	@$(VENV)/python -m pytest $(TESTS)

lint: environment  ## style, by ruff
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .

format: environment  ## bring the code into ruff's form
	@$(VENV)/ruff check --fix .
	@$(VENV)/ruff format .

typecheck: environment  ## types, by pyright in strict mode
	@$(VENV)/pyright

contracts: environment  ## who may import whom, by import-linter
	@$(VENV)/lint-imports --no-logo

lock: environment  ## resolve pyproject.toml into config/requirements.lock anew
	@$(VENV)/python bin/lock.py

demo-model: environment  ## train the demo checkpoint anew
	@$(VENV)/python -m zcore.demo

pictures: environment  ## paint the documentation's pictures anew, by the commands that it shows
	@$(VENV)/python bin/pictures.py

benchmark: environment  ## measure; results are noted in tests/benchmarks/LOG.md
	@$(VENV)/python -m pytest -m benchmarks -s $(TESTS)
