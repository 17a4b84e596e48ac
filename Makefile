# Everything goes through bootstrap.py, which needs nothing but a Python: these are its short names.
# ARGS reaches the demo: make demo ARGS="--help".
PYTHON ?= python3
ARGS ?=

.PHONY: help setup demo test lint format clean

help:
	@$(PYTHON) bootstrap.py --help

setup demo test lint format:
	@$(PYTHON) bootstrap.py $@ $(ARGS)

clean:
	rm -rf .venv .venv-oldest build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
