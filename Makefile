# make demo   installs into .venv and runs the main job on MNIST-5k, side by side
# make test   installs into .venv with PyTorch and the peers, lints, runs the whole suite
# Run again, neither reinstalls.

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: demo test lint clean

demo: .venv/runtime.stamp
	$(BIN)/python -m experiments.adversarial_training --preset=small --resume

test: .venv/dev.stamp lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=25

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/python.stamp:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed, got " + sys.version'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	touch $@

.venv/runtime.stamp: .venv/python.stamp setup.py requirements.txt
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/dev.stamp: .venv/python.stamp setup.py requirements.txt requirements-parity.txt
	$(BIN)/python -m pip install --quiet --editable '.[dev,parity]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-parity.txt
	$(BIN)/python -c 'import torch, foolbox, torchattacks, pyautoattack'
	touch .venv/runtime.stamp $@

clean:
	rm -rf .venv runs build dist *.egg-info
