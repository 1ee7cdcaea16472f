# make demo | test | checks | newest | site | bench | gpu | chaos | clean.  PYTHON=python3.12 picks the interpreter, PIP_ARGS adds options to pip.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
# The versions that were tested; `make demo CONSTRAINTS=` takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# What tests need beside the package: `dev`, or `ci` with the clients and peers whose tests are otherwise skipped.
EXTRA ?= dev
BIN := $(VENV)/bin
# Stamps live in the environment: deleting it is all it takes to install again.
INSTALLED := $(VENV)/.installed
TEST_INSTALLED := $(VENV)/.installed-$(EXTRA)
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q $(addprefix -c ,$(CONSTRAINTS)) $(PIP_ARGS)

.PHONY: help demo test checks newest constraints site bench gpu chaos clean
help:
	@echo "make demo    train a small text-to-image model, sample it and write a gallery page"
	@echo "make test    style, types, import contracts and tests"
	@echo "make checks  the first three of these"
	@echo "make newest  the same tests with the newest versions that pyproject.toml allows, in an environment of their own"
	@echo "make site    the documentation as pages that need no network: site/index.html"
	@echo "make bench   side-by-side measurements against named peers"
	@echo "make gpu     tests and measurements on this machine's GPU, in ten minutes; installs nothing"
	@echo "make chaos   kill trainings, fill disks and pull cables: the long form of what make test does (with root: a cluster)"
	@echo "make clean   remove caches and build products (runs/ and $(VENV)/ stay)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else \
	"ldm needs Python 3.10 or newer; this is %d.%d. Try: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	echo "No virtual environment could be made; on Debian: apt install python3-venv" >&2; exit 1; }

$(INSTALLED): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing ldm into $(VENV)/ (PyTorch and what it needs, about 6 GB on Linux): once, 2 to 5 minutes and no output." >&2
	@$(INSTALL) -e .
	@touch $@

$(TEST_INSTALLED): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing ldm and what its tests need into $(VENV)/ (about 6 GB on Linux): once, 2 to 5 minutes and no output." >&2
	@$(INSTALL) -e '.[$(EXTRA)]'
	@touch $(INSTALLED) $@

demo: $(INSTALLED)
	@echo "The demo trains, draws, measures and edits on the embedded pictures: about 10 minutes on two cores." >&2
	$(BIN)/ldm demo

checks: $(TEST_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

# One thread a process: tests that start several ranks would otherwise fight over the cores.
test: export OMP_NUM_THREADS ?= 1
test: $(TEST_INSTALLED)
	@echo "Style, contracts, types, then the tests in two parts and a sum of both: about 25 minutes on two cores." >&2
	@$(MAKE) --no-print-directory checks
	$(BIN)/python -m tests $(PYTEST_ARGS)

newest: export OMP_NUM_THREADS ?= 1
newest:
	@rm -f .venv-newest/.installed*
	@$(MAKE) --no-print-directory VENV=.venv-newest CONSTRAINTS= PIP_ARGS="--upgrade --upgrade-strategy eager" .venv-newest/.installed-$(EXTRA)
	.venv-newest/bin/python -m tests $(PYTEST_ARGS)

# Resolves the newest that pyproject.toml allows for every Python it names, within the file CAP if one is given; the result is
# committed after the tests have passed with it.
constraints:
	@$(PYTHON) -m venv .venv-uv && .venv-uv/bin/python -m pip install --disable-pip-version-check -q uv
	.venv-uv/bin/uv pip compile -q --universal --python-version 3.10 --all-extras --no-header --no-annotate \
	  $(addprefix -c ,$(CAP)) pyproject.toml -o .venv-uv/resolved.txt
	@{ head -1 constraints.txt && cat .venv-uv/resolved.txt; } > .venv-uv/constraints.txt
	@mv .venv-uv/constraints.txt constraints.txt

# In the environment of the package, which the references are made from. Not -q: then warnings would not count.
site: export NO_MKDOCS_2_WARNING = 1
site: $(INSTALLED)
	@$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || $(INSTALL) -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict
	@echo "site/index.html is the first page; it needs no server." >&2

bench: $(TEST_INSTALLED)
	$(BIN)/python -m bench

# Runs in $(VENV)/ where there is one; VENV= PYTHON=python3 takes the packages of the machine. Installs nothing.
gpu:
	$(or $(if $(VENV),$(wildcard $(VENV)/bin/python)),$(PYTHON)) -m bench.gpu $(GPU_ARGS)

# What is left out of `make test` because it takes minutes. The kills run first; runs/chaos.json has their table.
chaos: export OMP_NUM_THREADS ?= 1
chaos: $(TEST_INSTALLED)
	$(BIN)/python -m tests.chaos --kills $(or $(KILLS),50) --out runs/chaos.json
	$(BIN)/python -m pytest tests/chaos tests/slurm $(PYTEST_ARGS)

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
