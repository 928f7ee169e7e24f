# `make demo` and `make test` set up their own environment in .venv.
#   PYTHON=python3.12 make test     another interpreter
#   make demo ARGS='--steps 1000'   any option of the demo

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# A file of tests is one process's: its fixtures are made once.
PARALLEL ?= -n 2 --dist loadfile
BIN := $(VENV)/bin

# The accelerator's extra, where there is one to use.
ifneq ($(shell command -v nvidia-smi 2>/dev/null),)
ACCELERATOR := ,cuda
else ifneq ($(wildcard /dev/accel0 /dev/vfio/0),)
ACCELERATOR := ,tpu
endif

.PHONY: demo test test-slow lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.train
	$(BIN)/python -m train demo $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow'
	$(BIN)/python -m pytest --doctest-modules gradpower_optax

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL) --dist worksteal -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.train: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train$(ACCELERATOR)]'
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,test]'
	touch $@
