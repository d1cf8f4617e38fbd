# Everything runs in virtual environments that the first call makes; a fresh clone needs only Python >= 3.11 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The older Triton in use. Its environment holds only what differs, and takes the rest (torch above all) from VENV.
OLD_TRITON := triton==3.6.0 numpy==2.3.5
OLD_VENV := .venv-triton-3.6
OLD_READY := $(OLD_VENV)/.ready

PYTEST := -m pytest -n 2 --dist worksteal --timeout 600

.DEFAULT_GOAL := help
.PHONY: help demo test test-triton-3.6 lint bench clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z][a-z0-9.-]*:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## Train a small U-Net on generated cells and a char-RNN on Python source, and show what they learned
	$(BIN)/backstride demo

test: $(READY) test-triton-3.6  ## Run all tests, with the pinned Triton and with the older one
	$(BIN)/python $(PYTEST)

# pytest exits with 5 if the markers select no test.
test-triton-3.6: $(OLD_READY)  ## Cross-compile, emulate and run the smoke tests with Triton 3.6.0
	$(OLD_VENV)/bin/python $(PYTEST) -m "compile or smoke" || [ $$? -eq 5 ]

lint: $(READY)  ## Check style (ruff) and types (pyright)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)  ## Run the benchmarks that this machine can run
	$(BIN)/python -m backstride.bench

clean:  ## Remove the virtual environments, builds and caches; keep runs/
	rm -rf $(VENV) $(OLD_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("backstride needs Python 3.11 or later; choose one with `make PYTHON=python3.11 ...`")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[dev]"
	touch $@

$(OLD_READY): $(READY) Makefile
	$(PYTHON) -m venv --clear $(OLD_VENV)
	$(OLD_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps $(OLD_TRITON)
	$(BIN)/python -c 'import sysconfig; path = sysconfig.get_path("purelib"); print(f"import site; site.addsitedir({path!r})")' \
		> "$$($(OLD_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	touch $@
