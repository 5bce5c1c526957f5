# The verbs a newcomer needs: demo, test, check, bench. Everything else serves them.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
NAME ?=

.PHONY: demo test check bench test-full setup stubs lock clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	scripts/setup-venv
	touch $@

check: setup
	$(BIN)/ruff check src tests harness bench
	$(BIN)/ruff format --check src tests harness bench
	$(BIN)/mypy
	$(BIN)/lint-imports

lock:
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --group dev pyproject.toml -o requirements.lock
