# Everything runs in a virtual environment of its own, `.venv` (for three targets `.venv-gpu`,
# `.venv-docs` and `.venv-dist`), made by the first target that needs it.
# Other interpreter: `make demo PYTHON=python3.12`. Options for a program: `make test ARGS="-k newton"`.

PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python -m
INSTALLED := $(VENV)/.installed
# With XLA's plug-in for CUDA, which disturbs JAX wherever there is no GPU.
GPU_VENV := .venv-gpu
DOCS_VENV := .venv-docs
DIST_VENV := .venv-dist
# What must work of an installed package.
INSTALLS := import jax.numpy as jnp, pararnn as prnn; \
  step = lambda h, x: jnp.tanh(0.5 * h + x); \
  solution = prnn.solve(step, jnp.ones((100, 2)), jnp.zeros(2), solver=prnn.Newton()); \
  assert solution.result == prnn.RESULTS.successful; \
  print("pararnn", prnn.__version__, "works from", prnn.__file__)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench docs dist gpu-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## train a character-level language model (options in ARGS)
	@$(RUN) examples.char_lm $(ARGS)

# The tests run on the CPU unless JAX_PLATFORMS says otherwise. What they compile is kept in $(VENV).
# Without ARGS, a second process runs those of several devices (alone: `ARGS=tests/sharding`).
PYTEST := JAX_PLATFORMS="$${JAX_PLATFORMS:-cpu}" $(RUN) pytest -n auto --dist worksteal

test: $(INSTALLED) ## run the tests (options of pytest in ARGS)
	@$(PYTEST) -m "not slow" $(ARGS)
	@$(if $(ARGS),,$(PYTEST) tests/sharding)

test-all: $(INSTALLED) ## run the slow tests too: the programs, and the pages' examples
	@$(PYTEST)
	@$(PYTEST) tests/sharding

lint: $(INSTALLED) ## check style, format and types
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) basedpyright --pythonpath $(VENV)/bin/python

format: $(INSTALLED) ## sort the imports, mend what Ruff can mend, format the code
	@$(RUN) ruff check --fix-only .
	@$(RUN) ruff format .

bench: $(INSTALLED) ## run the speed benchmark (another one, or options: in ARGS)
	@$(RUN) benchmarks $(or $(ARGS),speed)

# Without the network, once installed.
docs: $(DOCS_VENV)/.installed ## build the documentation in site/ (options of MkDocs in ARGS)
	@JAX_PLATFORMS="$${JAX_PLATFORMS:-cpu}" NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict $(ARGS)

dist: $(DIST_VENV)/.installed ## build wheel and sdist in dist/, and try each in a clean environment
	@rm -rf dist build/clean
	@$(DIST_VENV)/bin/python -m build --outdir dist .
	@$(DIST_VENV)/bin/python -m twine check --strict dist/*
	@for file in dist/*; do \
	  $(DIST_VENV)/bin/python -m venv --clear build/clean && \
	  build/clean/bin/python -m pip install --quiet --disable-pip-version-check "$$file" && \
	  (cd build && JAX_PLATFORMS=cpu clean/bin/python -c '$(INSTALLS)') || exit 1; \
	done
	@rm -rf build/clean

gpu-check: $(GPU_VENV)/.installed ## count what a GPU would run, without one (options in ARGS)
	@$(GPU_VENV)/bin/python -m tools.gpu_counts $(ARGS)

clean: ## remove the environments, caches and build products (not out/)
	rm -rf $(VENV) $(GPU_VENV) $(DOCS_VENV) $(DIST_VENV) .pytest_cache .ruff_cache build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last. Without it the environment is new or was left half-made by an
# interrupted call, so it is made afresh; with it, only pyproject.toml has changed since.
$(INSTALLED): EXTRA := dev
$(GPU_VENV)/.installed: EXTRA := gpu-check
$(DOCS_VENV)/.installed: EXTRA := docs
$(DIST_VENV)/.installed: EXTRA := dist
$(INSTALLED) $(GPU_VENV)/.installed $(DOCS_VENV)/.installed $(DIST_VENV)/.installed: pyproject.toml
	@if [ ! -f $@ ]; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    found=$$($(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null); \
	    echo "pararnn needs Python 3.11 or newer, but '$(PYTHON)' is $${found:-not a Python that runs}." >&2; \
	    echo "Name another one: make PYTHON=python3.12 ..." >&2; \
	    exit 1; \
	  }; \
	  $(PYTHON) -m venv --clear $(@D); \
	fi
	@echo "Installing pararnn and its tools in $(@D) (the first time takes about 1-2 minutes) ..."
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRA)]'
	@touch $@
