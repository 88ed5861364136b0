# Everything runs in .venv, made by `python3 -m venv`; choose another interpreter with PYTHON=python3.12.
PYTHON ?= python3
VENV ?= .venv
VIDEOS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test test-gpu docs clean

help:
	@echo "make demo [VIDEOS=\"a.mp4 b.mp4\"]  the default model -> bundle -> recognition, in demo/"
	@echo "make test                         every check: style, types, layers, wheel, docs, tests"
	@echo "make test-gpu                     what only a GPU can show; fails where there is none"
	@echo "make docs                         the documentation as a web site, in site/"
	@echo "make install                      only the environment, .venv"
	@echo "make clean                        remove what the others made"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@echo "Installing into $(VENV) (PyTorch is among it: a few minutes the first time)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq --no-warn-script-location -e ".[dev]"
	@touch $@

demo: install
	@$(VENV)/bin/python scripts/demo.py $(VIDEOS)

test: install
	@VENV=$(VENV) scripts/check

test-gpu: install
	@FAIL_WITHOUT_GPU=1 $(VENV)/bin/python -m pytest tests/gpu

docs: install
	@$(VENV)/bin/python -m mkdocs build --quiet --strict
	@echo "site/index.html"

clean:
	rm -rf $(VENV) .venv-edge build dist site demo .pytest_cache .mypy_cache .ruff_cache \
	    .import_linter_cache .hypothesis .coverage *.egg-info
	find actionclip_deploy scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
