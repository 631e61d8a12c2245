# Everything runs in .venv, which `setup` makes from nothing but Python (3.11 or newer).
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$p && break; done)
BIN := .venv/bin
# The versions that the tests pass with; make setup CONSTRAINTS=/dev/null takes the newest that
# pyproject.toml allows.
CONSTRAINTS ?= constraints.txt

.PHONY: setup demo test check test-browser test-nodes fault-injection lab reference figures clean

setup: .venv/done

.venv/done: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and not on the PATH; name it: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e .
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3" > /dev/null
	@if git rev-parse --git-dir > /dev/null 2>&1; then \
	  git config filter.nbstripout.clean "'$(CURDIR)/$(BIN)/nbstripout'"; \
	  git config diff.jupyternotebook.command "'$(CURDIR)/$(BIN)/git-nbdiffdriver' diff"; \
	  git config merge.jupyternotebook.driver "'$(CURDIR)/$(BIN)/git-nbmergedriver' merge %O %A %B %L %P"; \
	fi
	@touch $@

# Every notebook, small: report.html, and the executed notebooks next to it (make lab).
demo: setup
	$(BIN)/python -m flowopd_lib run demo --jobs 2

test: setup
	$(BIN)/python -m pytest

# While working: lint, and a fast selection of the tests (method, configuration, one notebook).
check: setup
	$(BIN)/ruff check flowopd_lib tests docs notebooks
	$(BIN)/ruff format --check flowopd_lib tests docs notebooks
	$(BIN)/python -m pytest -m fast

# Notebook 09 in JupyterLab in headless Chromium (Debian's; installing it needs root). Screenshots: build/browser.
test-browser: setup
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null || { apt-get update && apt-get install -y chromium chromium-driver; }
	$(BIN)/python -m pytest -n 0 tests/test_browser.py -s

# Two nodes on one machine, in two network namespaces, by the launcher for Slurm. Needs root and iproute2.
test-nodes: setup
	$(BIN)/python tests/nodes.py

# Kills, full disks, two starters, lost ranks, bad inputs: an hour, most of it notebooks. Filling a disk needs root.
fault-injection: setup
	$(BIN)/python tests/fault_injection.py

lab: setup
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb

# The reference run: an evening or several; the same command resumes. Finished trainings go into
# papermill_runs/trainings even if it is interrupted. All is computed in one precision, so that they
# are found again on a processor of another kind.
reference: setup
	FLOWOPD_PRECISION=float32 $(BIN)/python -m flowopd_lib run lab --resume; done=$$?; \
	$(BIN)/python -m flowopd_lib cache papermill_runs/lab && exit $$done
	$(BIN)/python -m flowopd_lib publish papermill_runs/lab

# The images of the README and docs/.
figures: setup test-browser
	$(BIN)/python docs/figures.py
	cp build/browser/gallery.png docs/gallery.png

clean:
	rm -rf .venv papermill_runs/demo papermill_runs/smoke
