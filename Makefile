# The verbs a newcomer needs: demo, test, check, bench. Everything else serves them.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
# make bench NAME=walk runs one; without NAME all of them.
NAME ?=
# make demo LINK=10ms,500mbit puts the registry that far away; without LINK it is on loopback.
LINK ?=

.PHONY: demo test test-full soak check bench setup deps test-deps stubs lock clean

demo: deps setup
	$(BIN)/python -m harness.demo $(if $(LINK),--link $(LINK)) $(DEMO_ARGS)

test: test-deps setup
	scripts/run-tests $(ARGS)

test-full: test-deps setup
	$(BIN)/pytest $(ARGS)

# An hour of everything at once; SOAK_SECONDS=300 is five minutes.
soak: test-deps setup
	$(BIN)/python -m harness.soak

check: setup
	$(BIN)/ruff check src tests harness bench
	$(BIN)/ruff format --check src tests harness bench
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: test-deps setup
	$(BIN)/python -m bench $(NAME)

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml scripts/setup-venv
	scripts/setup-venv
	touch $@

# Debian packages, only those whose programs are missing.
deps:
	scripts/install-deps demo

test-deps:
	scripts/install-deps test

stubs: setup
	$(BIN)/python scripts/protos

lock:
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --group dev pyproject.toml -o requirements.lock

# The environment, caches and the demo's image; the sources stay.
clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
