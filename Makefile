# Two commands do everything on a fresh machine: `make chat` and `make test`. Both keep their environment in .venv.
# `make test ARGS="tests/cli -x"` hands options to pytest. TORCH_INDEX=… names an index with PyTorch's CPU builds, which
# on Linux spares the tests' environment gigabytes of CUDA libraries.
PYTHON ?= python3
ARGS ?=
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find backends/cpu/native -type f 2>/dev/null)
LAYOUT := $(VENV)/layout-$(shell find ondevice backends models tools -name '*.py' | LC_ALL=C sort | cksum | cut -d' ' -f1)
SOURCES := pyproject.toml CMakeLists.txt $(NATIVE) $(LAYOUT)
MLX := $(if $(filter Darwin,$(shell uname -s)),mlx,mlx-cpu)
# With the build's own tools in the environment, as for tests, a rebuild compiles only what changed.
TOOLS := scikit-build-core nanobind cmake ninja
HAVE_TOOLS = $(shell $(BIN)/python -c "import scikit_build_core, nanobind" 2>/dev/null && echo --no-build-isolation)
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: chat test test-slow lint format bench clean

chat: $(VENV)/installed
	@$(BIN)/ondevice chat

# Two workers, and no thread pools of libraries inside them: the suite is many small things.
test: $(VENV)/testing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(VENV)/testing
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/testing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/testing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed
	$(BIN)/ondevice bench smollm2-135m

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No environment: this needs Python 3.10 or newer with its venv \
	module (Debian, Ubuntu: apt install python3-venv), or PYTHON=/path/to/python." >&2; exit 1; }

# An editable install knows its modules by name: it is made again when one comes, goes or moves.
$(LAYOUT): | $(VENV)/bin/python
	@rm -f $(VENV)/layout-*
	@touch $@

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	@echo "Installing ondevice into $(VENV) (a minute or two, once) …"
	$(PIP) install $(HAVE_TOOLS) -e .
	@touch $@

# PyTorch first and pinned, and from an index of its own if that is asked for: everything else takes the one that is here.
$(VENV)/testing: $(VENV)/bin/python $(SOURCES) tests/constraints.txt
	@echo "Installing ondevice and what its tests need into $(VENV) (some minutes, once) …"
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c tests/constraints.txt torch
	$(PIP) install -c tests/constraints.txt $(TOOLS)
	$(PIP) install -c tests/constraints.txt --no-build-isolation -e ".[dev,oracles,$(MLX)]"
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build
