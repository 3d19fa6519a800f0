# Everything happens in .venv, which is made on first use. The package is installed editable: changes of Python code need no
# new installation, and changes of csrc/ are compiled when the next target runs.
#
#   make demo    install, then train, explain, draw and screen in demo/ (the main jobs, in a minute or two)
#   make test    install with what the tests need, then run the whole suite; ARGS="-k ratio" goes to pytest
#   make quick   the same without the tests that take more than some seconds: half of the time
#   make figure  the README's figure
#   make table   the README's table of measurements; takes long, wants an idle machine
#   make lint    ruff, lint and format
#   make types   mypy
#   make wheel   a wheel in dist/, as pip install . builds it
#
# PYTHON=...       the interpreter to use: 3.11 or newer, with venv and C headers
# TORCH_INDEX=...  where to take torch from; https://download.pytorch.org/whl/cpu spares a machine without a GPU gigabytes

usable := import os, sys, sysconfig, ensurepip, venv; \
	sys.exit(sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11, \
	$(shell $(p) -c '$(usable)' 2>/dev/null && echo $(p))))
TORCH_INDEX ?=
ARGS ?=

python := .venv/bin/python
pip := $(python) -m pip --quiet --disable-pip-version-check
sources := pyproject.toml CMakeLists.txt lrpfast/_version.py $(wildcard csrc/*)

# The versions of constraints.txt, for what is installed and for what builds it.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: demo test quick figure table lint types wheel clean

demo: .venv/installed
	$(python) -m lrpfast.demo -o demo

figure: .venv/installed
	$(python) -m lrpfast.demo -o demo --figure docs/maps.png

table: .venv/installed .venv/tests
	$(python) -m benchmarks.cpu --sections models --markdown

test: .venv/installed .venv/tests
	$(python) -m pytest -n auto --benchmark-disable $(ARGS)

quick:
	$(MAKE) test ARGS='-m "not slow and not exhaustive" $(ARGS)'

lint: .venv/linters
	$(python) -m ruff check .
	$(python) -m ruff format --check .

types: .venv/installed .venv/linters
	$(python) -m mypy

wheel: .venv/created
	$(pip) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf .venv demo dist

.venv/created:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv and C headers was found (on Debian and Ubuntu:" \
		"apt install python3-venv python3-dev g++). Install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

# torch first and alone: its requirements differ between its builds, and no later step may exchange it.
.venv/torch: constraints.txt | .venv/created
	$(pip) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

.venv/installed: $(sources) | .venv/torch
	$(pip) install --editable ".[demo]"
	touch $@

# torchvision asks for the torch build that it was made beside; any build of that version serves its models. Of virelay the tests
# take the loader of projects, which needs neither its server nor the old pillow that it asks for.
.venv/tests: pyproject.toml constraints.txt | .venv/installed
	$(pip) install --no-deps torchvision virelay
	$(pip) install "lrpfast[test]"
	touch $@

.venv/linters: pyproject.toml constraints.txt | .venv/created
	$(pip) install ruff mypy
	touch $@
