# One command for each chore. The environment is this project's own, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip 26.3 refuses Orion 0.2.7 (a direct URL in one of its extras).
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Compiled once, and not by each of the hundreds of processes that the tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup setup-dev demo test lint bench clean

# What using it needs, and what working on it needs too.
setup: $(VENV)/.done
setup-dev: $(VENV)/.done-dev

$(VENV)/.done: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else \
	  "ppo_hpo needs Python 3.11, but %s is %d.%d: say make PYTHON=python3.11" % ((sys.executable,) + v))'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt pip setuptools wheel
	@echo "Installing what the tests ran with; torch is the large one, this takes a minute or more."
	$(PIP) install --quiet --constraint constraints.txt --editable '.[classic-control]'
	@touch $@

$(VENV)/.done-dev: $(VENV)/.done
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test,lint]'
	@touch $@

demo: setup
	$(BIN)/python experiments/hunt.py pendulum

# Three processes on two cores, because many tests wait for others' heartbeats.
test: setup-dev
	$(BIN)/python -m pytest -n 3 --dist loadfile

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The peers' environments are made by the scripts themselves, in benchmarks/.peers.
bench: setup-dev
	$(PIP) install --quiet --constraint constraints.txt --editable '.[box2d,mujoco,envpool,atari]'
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/warm.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/learning.py
	$(BIN)/python benchmarks/where.py
	$(BIN)/python benchmarks/vectorization.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/sweep.py
	@cd benchmarks/results && cat learning.md overhead.md sweep.md speed.md

clean:
	rm -rf $(VENV) benchmarks/.peers build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
