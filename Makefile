# Two commands on a fresh machine: `make demo` and `make test`. Both make ./.venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# With an NVIDIA driver the newest versions that pyproject.toml allows; without one the tested set.
CONSTRAINTS := $(if $(wildcard /proc/driver/nvidia/version),,-c constraints.txt)
PYTEST := $(BIN)/python -m pytest --numprocesses logical --dist worksteal

.PHONY: demo test test-native lint clean

demo: $(STAMP)
	rm -rf demo-out demo-out.work
	$(BIN)/python -m cprune.run examples/tiny-moe demo-out --ratio 0.5 \
	    --calibration "$$(ls examples/texts/*.calib.jsonl | paste -sd,)" \
	    --evaluate "$$(ls examples/texts/*.val.jsonl | paste -sd,)"

# A worker for each logical core ("auto" would count physical ones), each with one thread; a worker that is done early
# takes half of what another has left.
test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/device
	if command -v c++ >/dev/null; then $(MAKE) test-native; else echo "no C++ compiler: test-native is left out"; fi

# The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without Python; those for AMX emulated.
test-native: $(STAMP)
	$(BIN)/pip install --quiet "cmake>=3.24" ninja
	$(BIN)/cmake -G Ninja -S . -B build/sanitize -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DCPRUNE_SANITIZE=ON -DCPRUNE_EMULATE_AMX=ON -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1
	$(BIN)/cmake --build build/sanitize --target native_test
	build/sanitize/native_test

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet $(CONSTRAINTS) -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) demo-out demo-out.work build *.egg-info cprune_kernels/_C.so
