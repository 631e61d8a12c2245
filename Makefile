# Everything runs in .venv, which `setup` makes from nothing but Python 3.11 or 3.12.
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
BIN := .venv/bin
# Where nothing else is asked for, torch is the CPU build of 2.13.0; override with TORCH="torch" for the newest CUDA build.
TORCH ?= torch==2.13.0

.PHONY: setup demo test lab clean

setup: .venv/done

.venv/done: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"Python 3.11 or 3.12 is needed, not {v[0]}.{v[1]}: call make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3" > /dev/null
	@if git rev-parse --git-dir > /dev/null 2>&1; then $(BIN)/nbdime config-git --enable && $(BIN)/nbstripout --install --keep-metadata-keys cell.metadata.tags; fi
	@touch $@

demo: setup
	$(BIN)/python -m flowopd_lib.run demo
	@echo "Open papermill_runs/demo/00_quickstart.ipynb (make lab), or read papermill_runs/demo/results.json."

test: setup
	$(BIN)/python -m pytest

lab: setup
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf .venv papermill_runs/demo papermill_runs/smoke
