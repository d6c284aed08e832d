# The commands of this project; `make` alone lists them.
PYTHON ?= python3
VENV = .venv/bin
# How many tests run at once; each process has its own PostgreSQL, Redis and S3 server.
PROCESSES ?= 2
# Without bytecode files each of the hundreds of processes that tests start would compile all its modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help environment run test lint format typecheck contracts lock hooks demo-model example-images benchmark chaos

help:  ## list these commands
	@sed -nE 's/^([a-z-]+):.*## /\1|/p' Makefile | awk -F'|' '{ printf "make %-15s %s\n", $$1, $$2 }'

environment:  ## create .venv with everything needed to run and test
	@$(PYTHON) bin/environment.py test

run:  ## run the API, a worker and a database with the demo model, until Ctrl-C
	@$(PYTHON) bin/environment.py run
	@$(VENV)/python bin/run.py

test: environment lint typecheck contracts  ## run everything that CI checks; TESTS="-k name" selects tests, PROCESSES=1 runs them one by one
	@$(VENV)/python -m tests.services.browser
	@$(VENV)/python -m tests.services.pgbouncer
	@$(VENV)/python -m tests.services.clock
	@$(VENV)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder $(TESTS)

lint: environment  ## check style with ruff
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .

format: environment  ## format the code with ruff
	@$(VENV)/ruff check --fix .
	@$(VENV)/ruff format .

typecheck: environment  ## check types with pyright in strict mode
	@$(VENV)/pyright

contracts: environment  ## check the import contracts with import-linter
	@$(VENV)/lint-imports --no-logo

lock: environment  ## resolve pyproject.toml into config/requirements.lock
	@$(VENV)/python bin/lock.py

hooks:  ## have git check the message of every commit
	@hook="$$(git rev-parse --git-path hooks)/commit-msg" && mkdir -p "$$(dirname "$$hook")" \
	  && printf '#!/bin/sh\nexec $(PYTHON) bin/check_commit_message.py "$$1"\n' > "$$hook" && chmod +x "$$hook"

demo-model: environment  ## train the demo checkpoint
	@$(VENV)/python -m zcore.demo

example-images: environment  ## generate the images of the documentation with the commands that it shows
	@$(VENV)/python bin/example_images.py

benchmark: environment  ## measure; record results in tests/benchmarks/LOG.md
	@$(VENV)/python -m pytest -m benchmarks -s $(TESTS)

chaos: environment  ## run the service under random faults and judge it; MINUTES=5 SEED=1 FAULTS=all; see docs/chaos.md
	@$(VENV)/python -m tests.chaos --minutes $(or $(MINUTES),5) --seed $(or $(SEED),1) --faults $(or $(FAULTS),all) $(MORE)
