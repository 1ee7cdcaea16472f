# make demo | test | checks | bench | chaos | clean.  PYTHON=python3.12 picks the interpreter, PIP_ARGS adds options to pip.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
BIN := $(VENV)/bin
# Stamps live in the environment: deleting it is all it takes to install again.
INSTALLED := $(VENV)/.installed
TEST_INSTALLED := $(VENV)/.installed-test

.PHONY: help demo test checks bench chaos clean
help:
	@echo "make demo    train a small text-to-image model, sample it and write a gallery page"
	@echo "make test    style, types, import contracts and tests"
	@echo "make checks  the first three of these"
	@echo "make bench   side-by-side measurements against named peers"
	@echo "make chaos   kill trainings, fill disks and pull cables: the long form of what make test does (with root: a cluster)"
	@echo "make clean   remove caches and build products (runs/ and $(VENV)/ stay)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else \
	"ldm needs Python 3.10 or newer; this is %d.%d. Try: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	echo "No virtual environment could be made; on Debian: apt install python3-venv" >&2; exit 1; }

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -e .
	@touch $@

$(TEST_INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -e '.[test,dev]'
	@touch $(INSTALLED) $@

demo: $(INSTALLED)
	$(BIN)/ldm demo

checks: $(TEST_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

# One thread a process: tests that start several ranks would otherwise fight over the cores. What starts no processes of
# its own runs on two workers first.
ALONE := tests/unit/ tests/parity/
test: export OMP_NUM_THREADS ?= 1
test: checks
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(PYTEST_ARGS) $(ALONE)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS) $(filter-out $(ALONE) tests/__pycache__/,$(wildcard tests/*/))

bench: $(TEST_INSTALLED)
	$(BIN)/python -m bench

# What is left out of `make test` because it takes minutes. The kills run first; runs/chaos.json has their table.
chaos: export OMP_NUM_THREADS ?= 1
chaos: $(TEST_INSTALLED)
	$(BIN)/python -m tests.chaos --kills $(or $(KILLS),50) --out runs/chaos.json
	$(BIN)/python -m pytest tests/chaos tests/slurm $(PYTEST_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
