# make repro [ARGS=--quick]: all claims, all figures and the report, into out/
# make test:                 the tests
# make lint:                 formatter, linter, type checker, import contract
# make docs:                 the pages of docs/ as a site, into out/site; a broken link fails
PYTHON ?= python3
BIN := .venv/bin

.PHONY: repro test lint docs
repro: .venv/installed
	$(BIN)/python paper_repro.py --out out $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/installed
	$(BIN)/mkdocs build --strict

# torch first and by its pin: an unpinned torch is a build with gigabytes of CUDA libraries.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@
