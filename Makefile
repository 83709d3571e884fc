# make demo | test | test-floors | faults | setup | lint | bench | docs | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.offprincipal-ready

.PHONY: demo test test-floors faults setup lint bench docs clean

demo: setup
	$(BIN)/offprincipal study --out demo

# One thread a process: two processes of one thread beat one of two.
test: setup
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n auto

# The tests of faults, at forty times their usual number: mutated inputs, kills, folders that two hosts share.
faults: setup
	OFFPRINCIPAL_TIMES=$${OFFPRINCIPAL_TIMES:-40} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -rA --no-header \
	  tests/test_kills.py tests/test_checkpoint_fuzz.py tests/test_state_fuzz.py tests/test_tokenizer_guard.py

# The page's scripts share one scope, so they are linted as one.
WEB := src/offprincipal/reports/web
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/oxfmt --check $(WEB)/*.js
	@mkdir -p build && cat $(WEB)/core.js $(filter-out %/core.js %/start.js,$(wildcard $(WEB)/*.js)) $(WEB)/start.js > build/page.js
	$(BIN)/oxlint build/page.js

bench: setup
	$(BIN)/python benchmarks/compare.py

# With the oldest versions that pyproject.toml allows; torch is the one of `setup`, since its oldest has no build for a CPU on the index.
FLOORS := build/floors
test-floors: setup
	$(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet uv
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > $(FLOORS)/torch.txt
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(FLOORS)/bin/uv pip install --quiet --python $(FLOORS)/bin/python \
	  --resolution lowest-direct --override $(FLOORS)/torch.txt --editable '.[train,ray,gguf,dev]'
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(FLOORS)/bin/python -m pytest -n auto

# Warnings are errors: a link that leads nowhere, a page in no menu.
docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/zensical build --strict

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("offprincipal needs Python 3.11 or later; this is " + sys.version.split()[0] + ". Set PYTHON=python3.12, say.") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,ray,gguf,dev]'
	@touch $@

clean:
	rm -rf $(VENV) demo
