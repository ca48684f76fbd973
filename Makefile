# The commands of this project. They need make and Python 3.11 or newer, nothing else; see `make help`.
# PYTHON chooses the interpreter (make demo PYTHON=python3.12); pip's own settings and variables are left as they are.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt
# the first generation of the openai client, beside the newest one: the server must suit both
OPENAI_1 := $(CURDIR)/$(VENV)/openai-1
PYTEST := OMP_NUM_THREADS=1 OPENAI_1=$(OPENAI_1) $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check bench docs clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

demo: $(VENV)/.runtime ## tune the small base that ships with tailor by four techniques, and compare them
	$(BIN)/tailor demo

test: $(VENV)/.dev ## the tests (minutes, on a CPU, no network)
	$(PYTEST) -n 2 -m "not slow"

test-all: $(VENV)/.dev ## the tests and the full grid of contracts
	$(PYTEST) -n 2

check: $(VENV)/.dev ## style, types, the import rule, documents in step with the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src
	$(PYTEST) tests/test_layers.py tests/test_style.py
	$(BIN)/python docs/build.py --check

bench: $(VENV)/.dev ## every program in benchmarks/, side by side with peers
	@set -e; for program in $$(grep -l "__main__" benchmarks/*.py); do \
		[ -e "$$program" ] || { echo "there are no programs in benchmarks/"; break; }; \
		echo "== $$program"; $(BIN)/python "$$program"; \
	done

docs: $(VENV)/.dev ## write the generated parts of the documents anew
	$(BIN)/python docs/build.py

clean: ## remove the virtual environment and all caches (never .tailor, which holds your artifacts)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests docs examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, so that a build of it that is at hand (for a CPU, say) serves everything that follows.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "tailor needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) hatchling editables
	$(INSTALL) --no-build-isolation --editable '.[eval]'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m pip install --no-deps --target $(OPENAI_1) --upgrade \
		openai==1.109.1 httpx==0.28.1 httpcore==1.0.9 distro==1.9.0
	@touch $@
