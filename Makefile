# `make run` and `make test` are the two commands of the README; each does all the set-up it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The tests of libvirt want its Python module, which can be built only where libvirt-dev is.
EXTRAS := test$(shell pkg-config --exists libvirt 2>/dev/null && echo ,libvirt)

.PHONY: run demo test deep bench lint clean
.DEFAULT_GOAL := run

run: $(VENV)/.installed
	@$(BIN)/undervisor test

demo: $(VENV)/.installed
	@$(BIN)/undervisor demo

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not deep"

deep: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

bench: $(VENV)/.installed
	@$(BIN)/undervisor bench

lint: $(VENV)/.installed-test
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "undervisor needs Python 3.11 or later; $(PYTHON) is older. Try: make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "no virtual environment could be made. On Debian: apt install python3-venv"; exit 2; }

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
