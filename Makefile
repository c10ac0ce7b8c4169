# Two commands do everything on a fresh machine: `make chat` and `make test`. Both keep their environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find backends/cpu/native -type f 2>/dev/null)
SOURCES := pyproject.toml CMakeLists.txt $(NATIVE)
MLX := $(if $(filter Darwin,$(shell uname -s)),mlx,mlx-cpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: chat test test-slow lint format bench clean

chat: $(VENV)/installed
	@$(BIN)/ondevice chat

# Two workers, and no thread pools of libraries inside them: the suite is many small things.
test: $(VENV)/testing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(VENV)/testing
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/testing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/testing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed
	$(BIN)/ondevice bench smollm2-135m

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	@echo "Installing ondevice into $(VENV) (a minute or two, once) …"
	$(PIP) install -e .
	@touch $@

# PyTorch first and pinned: a bare requirement would bring gigabytes of CUDA libraries on Linux.
$(VENV)/testing: $(VENV)/bin/python $(SOURCES) tests/constraints.txt
	@echo "Installing ondevice and what its tests need into $(VENV) (some minutes, once) …"
	$(PIP) install -c tests/constraints.txt torch
	$(PIP) install -c tests/constraints.txt -e ".[dev,oracles,$(MLX)]"
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build
