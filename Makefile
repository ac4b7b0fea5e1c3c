# Each target sets up all it needs in .venv; a second call reuses it.

PYTHON ?= $(firstword $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p; done))
VENV := .venv
READY := $(VENV)/.ready
# The quickstart's run folder and further options, for example: make quickstart OUT=runs/mine ARGS="--set seed=1"
OUT ?=
ARGS ?=
# Processes that run the tests. A file's tests stay together, since they share what one of them trained; files are taken in
# their order, in which the long ones of the kernels come first.
JOBS ?= 2

.PHONY: help quickstart test test-all test-readers docs lint types package format install clean

help:
	@echo "make quickstart   set up, then train, distil and evaluate on the embedded data"
	@echo "make test         set up, then lint and run the tests"
	@echo "make test-all     the same with the full grids, the peers and the long runs"
	@echo "make test-readers set up, then read NIR exports back in SpikingJelly, snnTorch and norse"
	@echo "make docs         set up, then build the site into docs/_build/html; its pages are executed"
	@echo "make types        set up, then check the types of the public names with mypy"
	@echo "make package      set up, then build sdist and wheel, and try each in an environment of its own"
	@echo "make format       sort imports and format the code"
	@echo "make clean        remove the environment"

quickstart: $(READY)
	$(VENV)/bin/lasnn distill quickstart $(if $(OUT),--out $(OUT)) $(ARGS)
	$(VENV)/bin/lasnn evaluate $(OUT) --timesteps 1,2,4,8

test: $(READY) lint
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-all: $(READY) lint
	$(VENV)/bin/python -m pip install --quiet -e '.[dev,bench]'
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m ''

# norse comes without a wheel, and is for this alone.
test-readers: $(READY)
	$(VENV)/bin/python -m pip install --quiet -e '.[dev,bench]' norse==1.1.0
	$(VENV)/bin/python -m pytest -m '' -rA tests/test_nir_readers.py

# A warning is an error, as is a link that leads nowhere or a cell that fails. Pages are built anew, in two processes.
docs: $(READY)
	$(VENV)/bin/python -m pip install --quiet -e '.[docs]'
	$(VENV)/bin/python -m sphinx --fresh-env --write-all --jobs 2 --fail-on-warning --quiet docs docs/_build/html

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# As the package is laid out once installed, kernels/ being lasnn.kernels; mypy's cache there makes a second call quick.
TYPES := build/types
types: $(READY)
	@rm -rf $(TYPES)/lasnn && mkdir -p $(TYPES) && cp -r lasnn $(TYPES)/lasnn && cp -r kernels recipes $(TYPES)/lasnn/
	@cp tests/typed_use.py $(TYPES)/
	cd $(TYPES) && $(CURDIR)/$(VENV)/bin/mypy --config-file $(CURDIR)/pyproject.toml

package: $(READY)
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist
	$(VENV)/bin/python -m pytest -m '' -rA tests/test_wheel.py

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

install: $(READY)

# The stamp is written last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "lasnn needs Python >= 3.11; none was found. Install one, or: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV)
