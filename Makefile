# make demo    set up .venv and run the main job on drawn shapes: shards, training, evaluation, captions
# make setup   .venv with all that is needed; the others do this first
# make test    set up .venv and run the whole test suite
# make test-long   the same and what takes minutes more: all ranks × stages, a Slurm job's time limit, compilation
# make test-oldest   the suite on the oldest releases that pyproject.toml admits, in .venv-oldest
# make check   lint, formatting, types, and the rule of which module may import which
# make bench   measure it beside its peers; BENCH='--flickr8k DIR --coco DIR' names the photos that most of it needs
# make fix     apply what the linter and the formatter can mend
# make clean   remove what demo made; the .venv stays

# The python that .venv is made from.
PYTHON3 ?= python3
export PYTHON := .venv/bin/python
# Nothing is fetched from a model hub: what demo and the tests need, they make.
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test test-long test-oldest check bench fix clean

setup: .venv/installed

.venv/installed: pyproject.toml launch/preflight.py
	$(PYTHON3) launch/preflight.py
	$(PYTHON3) -m venv .venv
	@echo 'Installing into .venv: PyTorch brings CUDA, 6 GB in all, so this takes minutes.'
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: setup
	launch/demo.sh

# Two tests at a time: most of what they do is to wait for processes of their own.
test: setup
	$(PYTHON) -m pytest --numprocesses 2 --dist worksteal

test-long: setup
	PVTCAP_LONG=1 $(PYTHON) -m pytest

# Old releases are warned of by newer ones beside them, which is nothing that we could mend.
test-oldest: export PYTHON := .venv-oldest/bin/python
test-oldest:
	$(PYTHON3) -m venv .venv-oldest
	$(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	$(PYTHON) -m uv pip install --quiet --python $(PYTHON) --resolution lowest-direct --editable '.[dev]'
	$(PYTHON) -m pytest --numprocesses 2 --dist worksteal -W default

check: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/test_layers.py

bench: setup
	$(PYTHON) benchmarks/run.py $(BENCH)

fix: setup
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf data/shapes-train data/shapes-val runs/shapes
