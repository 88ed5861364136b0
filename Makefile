# Everything runs in .venv, made by `python3 -m venv`; choose another interpreter with PYTHON=python3.12.
# TORCH=cpu installs PyTorch without CUDA, from PyTorch's own index (requirements-cpu.txt).
PYTHON ?= python3
VENV ?= .venv
VIDEOS ?=
TORCH ?= pypi

PIP = $(VENV)/bin/python -m pip install --no-warn-script-location $(if $(filter cpu,$(TORCH)),-r requirements-cpu.txt)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test test-gpu docs clean

help:
	@echo "make demo [VIDEOS=\"a.mp4 b.mp4\"]  the default model -> bundle -> recognition, in demo/"
	@echo "make test                         every check: style, types, layers, wheel, docs, tests"
	@echo "make test-gpu                     what only a GPU can show; fails where there is none"
	@echo "make docs                         the documentation as a web site, in site/"
	@echo "make install                      only the environment of the checks, .venv"
	@echo "make clean                        remove what the others made"
	@echo
	@echo "The first of them installs into .venv, and says how much. TORCH=cpu leaves CUDA out."

# Sizes are of Linux on x86-64 with Python 3.11 (docs/start.md has them too).
ifeq ($(TORCH),cpu)
demo_size = 0.4 GB to download and 1.4 GB on disk
all_size = 0.6 GB to download and 2.2 GB on disk
else
demo_size = 3.2 GB to download and 6.2 GB on disk, nearly all of it PyTorch and CUDA (without a GPU: make demo TORCH=cpu, 0.4 GB)
all_size = 3.4 GB to download and 7.0 GB on disk, nearly all of it PyTorch and CUDA (without a GPU: make test TORCH=cpu, 0.6 GB)
endif

define announce
	@echo "Installing into $(VENV), once: $(1)."
	@echo "pip shows what it downloads; then it unpacks for a minute or so without a word."
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
endef

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(call announce,$(all_size))
	@$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/installed-demo

$(VENV)/installed-demo: pyproject.toml
	$(call announce,$(demo_size))
	@$(PIP) -e ".[export,benchmark]"
	@touch $@

demo: $(VENV)/installed-demo
	@$(VENV)/bin/python scripts/demo.py $(VIDEOS)

test: install
	@VENV=$(VENV) scripts/check

test-gpu: install
	@FAIL_WITHOUT_GPU=1 $(VENV)/bin/python -m pytest tests/gpu

docs: install
	@$(VENV)/bin/python -m mkdocs build --quiet --strict
	@echo "site/index.html"

clean:
	rm -rf $(VENV) .venv-edge .venv-edge-lowest .venv-triton build dist site demo .pytest_cache .mypy_cache .ruff_cache \
	    .import_linter_cache .hypothesis .coverage *.egg-info
	find actionclip_deploy scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
