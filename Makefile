# The few commands of this project; `make` alone lists them.
PYTHON ?= python3
VENV = .venv/bin

.PHONY: help
help:  ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: environment
environment:  ## make .venv with everything for running and testing
	@$(PYTHON) bin/environment.py test
