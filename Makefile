# One line each into a tool; `make demo` and `make test` do everything on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint bench bench-size clean

demo: .venv/demo          ## train, quantise, convert and validate a small CNN on handwritten digits
	$(BIN)/ecqx-onnx demo --force

test: .venv/test          ## every test that takes seconds
	$(BIN)/python -m pytest -n 2

test-all: .venv/test      ## also the slow ones: minutes, gigabytes, other onnxruntime versions
	$(BIN)/python -m pytest -m "slow or not slow"

lint: .venv/lint
	$(BIN)/ruff check . && $(BIN)/mypy

bench: .venv/test         ## speed as ratios in one process
	$(BIN)/python benchmarks/assignment.py
	$(BIN)/python benchmarks/training_step.py

bench-size: .venv/test    ## bytes: entropy, packed, NNCodec, xz, zip side by side
	$(BIN)/python benchmarks/packed_size.py

.venv/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv demo
