# `make train` and `make test` do all the set-up themselves and are quick the second time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test test-slow lint serve clean

train: $(VENV)/.installed
	$(BIN)/cispo train

test: $(VENV)/.installed-test
	$(BIN)/ruff check src tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

serve: $(VENV)/.installed-server
	$(BIN)/cispo serve

lint: $(VENV)/.installed-test
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests

# torch comes first and by its exact version, so that what depends on it cannot choose another build.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("cispo needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing cispo into $(VENV) (once; a minute or two)"
	@$(PIP) $(shell grep '^torch==' constraints.txt)
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.installed-server: $(VENV)/.installed
	@$(PIP) --editable '.[server]'
	@touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info
