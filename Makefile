# Everything runs in .venv, which `setup` makes from nothing but Python (3.11 or newer).
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$p && break; done)
BIN := .venv/bin
# Installed first; any release that pyproject.toml allows will do: make setup TORCH=torch
TORCH ?= torch==2.13.0

.PHONY: setup demo test test-browser test-nodes drill lab reference twice figures clean

setup: .venv/done

.venv/done: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and not on the PATH; name it: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3" > /dev/null
	@if git rev-parse --git-dir > /dev/null 2>&1; then \
	  git config filter.nbstripout.clean "'$(CURDIR)/$(BIN)/nbstripout'"; \
	  git config diff.jupyternotebook.command "'$(CURDIR)/$(BIN)/git-nbdiffdriver' diff"; \
	  git config merge.jupyternotebook.driver "'$(CURDIR)/$(BIN)/git-nbmergedriver' merge %O %A %B %L %P"; \
	fi
	@touch $@

demo: setup
	$(BIN)/python -m flowopd_lib.runs demo --jobs 2
	@echo "Open papermill_runs/demo/report.html, or the executed notebooks beside it (make lab)."

test: setup
	$(BIN)/python -m pytest

# Notebook 09 in JupyterLab in headless Chromium (Debian's, installed if it is not there; that needs root). Screenshots: build/browser.
test-browser: setup
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null || { apt-get update && apt-get install -y chromium chromium-driver; }
	$(BIN)/python -m pytest -n 0 tests/test_browser.py -s

# Two nodes on one machine, in two network namespaces, by the launcher for Slurm. Needs root and iproute2.
test-nodes: setup
	$(BIN)/python tests/nodes.py

# Kills, full disks, two starters, lost ranks, bad inputs: an hour, more than half of it the notebooks. Filling a disk needs root.
drill: setup
	$(BIN)/python tests/drill.py

# The pictures of the README and docs/.
figures: setup test-browser
	$(BIN)/python docs/figures.py
	cp build/browser/gallery.png docs/gallery.png

# A run of the profile $(1), from this commit, made small in papermill_runs/$(2), and its page docs/$(3).md. It goes on where it was cut off. Its trainings are
# kept (papermill_runs/trainings, to be committed), and found again on a processor of another kind: all compute in one precision.
define shown
	FLOWOPD_PRECISION=float32 $(BIN)/python -m flowopd_lib.runs $(1) --resume; done=$$?; \
	$(BIN)/python -m flowopd_lib.runs.keep papermill_runs/$(1) && exit $$done
	$(BIN)/python -m flowopd_lib.runs.reference papermill_runs/$(1) papermill_runs/$(2) $(4)
	$(BIN)/python -m flowopd_lib.runs.results papermill_runs/$(2) docs/$(3).md
endef

# The reference run: an evening or several.
reference: setup
	$(call shown,lab,reference,results)

# The student against GRPO-Mix with twice the compute, from kept trainings: an hour.
twice: setup
	$(call shown,twice,reference_twice,twice,--no-gallery)

lab: setup
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb

clean:
	rm -rf .venv papermill_runs/demo papermill_runs/smoke
