# make fit   trains the quickstart model      make test  runs the tests
# make lint  lint, format, types, imports     make prove runs the long proofs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: fit test prove lint format clean

fit: $(VENV)/.ready
	$(BIN)/python -m t6_lightning fit $(ARGS)

test: $(VENV)/.dev-ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 12 $(ARGS)

prove: $(VENV)/.dev-ready
	$(BIN)/python -m pytest -m prove -s $(ARGS)

lint: $(VENV)/.dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache --no-logo

format: $(VENV)/.dev-ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else \
	    "Python 3.11 or 3.12 is needed, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)

# torch is pinned in the same call as everything else: on its own pip would take the newest build.
$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing (some minutes, once)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing (some minutes, once)"
	$(INSTALL) -e '.[dev,postgres]'
	@touch $(VENV)/.ready $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
