# Every target makes the virtual environment first when it is missing or older than pyproject.toml.
#
# On Linux, PyPI's torch brings several GB of CUDA libraries. On a machine without an NVIDIA GPU take the CPU build:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
# pip picks the highest version, and 2.13.0+cpu sorts above 2.13.0, so the CPU build wins wherever pip finds it.

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv demo test test-slow check bench assets clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	@echo "Installing visionlora and its tools into $(VENV) (the first time takes some minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

venv: $(STAMP)  ## the virtual environment alone

demo: $(STAMP)  ## learn a dog style on the embedded model and draw the grid
	@run="runs/demo-$$(date +%Y%m%d-%H%M%S)" && \
	$(BIN)/visionlora train-sd --images assets/dog --config emoji64_dog --output "$$run" && \
	echo "Look at $$run/grid.png"

test: $(STAMP)  ## the tests
	$(BIN)/python -m pytest

test-slow: $(STAMP)  ## the heavy tests
	$(BIN)/python -m pytest -m slow

check: $(STAMP)  ## lint, format, types and tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: $(STAMP)  ## the benchmarks
	$(BIN)/python benchmarks/prompt_fidelity.py
	$(BIN)/python benchmarks/style_transfer.py
	$(BIN)/python benchmarks/core.py
	$(BIN)/python benchmarks/auto_rank.py
	$(BIN)/python benchmarks/formats.py
	$(BIN)/python benchmarks/mixing.py
	$(BIN)/python benchmarks/classify.py
	$(BIN)/python benchmarks/train_sd.py
	$(BIN)/python benchmarks/one_picture.py
	$(BIN)/python benchmarks/write_tables.py

assets: $(STAMP)  ## rebuild the picture sets and the embedded model (needs npm; takes long)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[assets]'
	mkdir -p build
	$(BIN)/python -m visionlora.assets.build_pictures --output assets --all build/pictures.npz
	$(BIN)/python -m visionlora.assets.build_emoji64 vae --pictures build/pictures.npz --work build
	$(BIN)/python -m visionlora.assets.build_emoji64 unet --work build
	$(BIN)/python -m visionlora.assets.build_emoji64 refine --work build
	$(BIN)/python -m visionlora.assets.build_emoji_vit train --pictures build/pictures.npz --work build
	$(BIN)/python benchmarks/prompt_fidelity.py
	$(BIN)/python benchmarks/style_transfer.py --save
	$(BIN)/visionlora classify --images assets/styles --method linear-probe --steps 1 --baselines none --output build/style-classifier
	mkdir -p assets/adapters/style-classifier
	cp build/style-classifier/adapter.safetensors build/style-classifier/README.md assets/adapters/style-classifier/
	$(BIN)/python benchmarks/write_tables.py

clean:  ## what the tools leave behind; the virtual environment and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find assets benchmarks configs pipelines tests visionlora -name __pycache__ -type d -prune -exec rm -rf {} +
