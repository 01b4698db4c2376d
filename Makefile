# `make quickstart` and `make test` do all the set-up on a fresh machine: a virtual environment and the packages.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
EXTRAS ?= minilm,view,test
# DeepSpeed looks for ninja, and torch for the C++ compiler, on the PATH.
export PATH := $(BIN):$(PATH)

# Processes of `make test`; 0 runs the tests in one.
JOBS ?= 2

# Where `make gpu` keeps what it measured; a stage that is done there is not run again.
OUT ?= .gpu
# Where `make gate` keeps the other Triton that setup.py admits, and its records.
GATE ?= .gate
GATE_TRITON = triton-3.6.0
GATE_TEST = SCAMO_GATE_RECORDS=$(abspath $(GATE))/records.jsonl \
	$(BIN)/python -m pytest tests/kernels/test_compile.py -k compiles

.PHONY: help install quickstart test lint types gate bench bench-cpu gpu clean

help:
	@echo "make quickstart  corpus, tokenizer, ZeRO-3 training, generation and pictures in about ten minutes"
	@echo "make test        lint, types and every test"
	@echo "make gate        every kernel configuration compiled by both Triton versions: benchmarks/compile_gate.md"
	@echo "make bench       the benchmark suite"
	@echo "make bench-cpu   its CPU cases, about two minutes"
	@echo "make gpu         tests and benchmarks on this machine's GPU, in stages, into OUT=$(OUT)"
	@echo "make install     only the virtual environment in $(VENV)"

install: $(BIN)/.scamo-installed

$(BIN)/.scamo-installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

quickstart: install
	$(BIN)/scamo quickstart

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

$(GATE)/$(GATE_TRITON)/triton: | install
	$(BIN)/python -m pip install --quiet --no-deps --target $(GATE)/$(GATE_TRITON) $(subst -,==,$(GATE_TRITON))

gate: install $(GATE)/$(GATE_TRITON)/triton
	rm -f $(GATE)/records.jsonl
	$(GATE_TEST)
	SCAMO_GATE_TRITON=$(abspath $(GATE))/$(GATE_TRITON) $(GATE_TEST)
	$(BIN)/python benchmarks/report.py gate $(GATE)/records.jsonl --output benchmarks/compile_gate.md

bench: install
	$(BIN)/python -m pytest benchmarks --benchmark-only

bench-cpu: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest benchmarks/bench_generate.py --benchmark-only
	$(BIN)/python -m pytest benchmarks --benchmark-only -m "not gpu" --ignore benchmarks/bench_generate.py

gpu: install
	$(BIN)/python benchmarks/gpu.py --out $(OUT) --minutes 9

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
