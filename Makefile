# The house's commands. `make` alone lists them. Everything runs from .venv, which `make install` builds once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
export TOKENIZERS_PARALLELISM := false
export PYTHONUTF8 := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test docs browser lab clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s  %s\n", $$1, $$2}' Makefile

install: $(READY)  ## build .venv with the exact versions of constraints.txt (a second call does nothing)

# A changed pin, range or entry point installs again; nothing else does.
$(READY): constraints.txt settings.ini setup.py tools/install.sh
	@PYTHON="$(PYTHON)" sh tools/install.sh

demo: $(READY)  ## run the main job on the simulated market: a table of three stages and runs/demo/report.html
	@$(BIN)/mine-refine run market --out runs/demo --preset quick --resume

test: $(READY)  ## every check: the gates, then the tests, which build the site too
	@$(BIN)/python tools/gates.py
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --durations=15

docs: $(READY)  ## README.md from nbs/index.ipynb, and the site in _docs/
	@$(BIN)/python tools/readme.py
	@$(BIN)/python tools/build_site.py

browser:  ## Chromium for the browser tests
	@sh tools/browser.sh

lab: $(READY)  ## JupyterLab on the tutorials
	@$(BIN)/jupyter lab --ServerApp.root_dir=nbs --LabApp.default_url=/lab/tree/tutorials $(if $(filter 0,$(shell id -u)),--allow-root)

clean:  ## remove what was built; .venv and runs/ stay
	@rm -rf _docs _proc build dist .pytest_cache .hypothesis
	@find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
