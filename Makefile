# `make demo` and `make test` do all set-up themselves; Python 3.11+, git and make are all they need.
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := .venv/Scripts
else
PYTHON ?= python3
BIN := .venv/bin
endif
META := settings.ini setup.py pyproject.toml constraints.txt tools/install.py

.PHONY: help demo test test-all figures readme docs clean

help:
	@echo "make demo     train a small text-to-image model on this machine, sample, score: runs/demo"
	@echo "make test     every check, page and test that takes minutes; needs nothing but Python"
	@echo "make test-all and what needs Chromium, JupyterLab or much time"
	@echo "make figures  every stored picture and figure that depends on the demo's weights, from runs/demo"
	@echo "make readme   README.md and CONTRIBUTING.md from nbs/index.ipynb and nbs/contributing.ipynb"
	@echo "make docs     the documentation site in _docs (needs Quarto)"
	@echo "make clean    remove what was built; the environment and runs stay"

.venv/core.stamp: $(META)
	$(PYTHON) tools/install.py

.venv/dev.stamp: $(META)
	$(PYTHON) tools/install.py dev

.venv/all.stamp: $(META)
	$(PYTHON) tools/install.py all

demo: .venv/core.stamp
	$(BIN)/t2i demo --run-dir runs/demo

test: .venv/dev.stamp
	$(BIN)/python tools/check.py

test-all: test .venv/all.stamp
	$(BIN)/python tools/check.py slow

figures: .venv/dev.stamp
	$(BIN)/t2i demo --run-dir runs/demo
	$(BIN)/python tools/figures.py --run-dir runs/demo
	$(BIN)/python tools/readme.py

readme: .venv/dev.stamp
	$(BIN)/python tools/readme.py

docs: .venv/dev.stamp
	$(BIN)/python tools/docs.py

clean:
	$(PYTHON) -c "import shutil; [shutil.rmtree(o, ignore_errors=True) for o in ('build', 'dist', '_proc', '_docs', '.pytest_cache', 't2i_nb.egg-info')]"
