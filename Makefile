# `make` alone lists what there is. Works with GNU make 3.81 and later.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check

# Q and DOCS reach the command through the environment and word by word as they were typed:
# neither make nor the shell reads anything into their quotes and dollar signs.
export QUICKSTART_Q := $(value Q)
export QUICKSTART_DOCS := $(value DOCS)
unexport Q DOCS

.PHONY: help quickstart test clean
.NOTPARALLEL:

help:
	@echo 'make quickstart              index the docstrings of the standard library, ask three questions'
	@echo 'make quickstart Q="..."      ask a question of your own'
	@echo 'make quickstart DOCS=path    index a folder of Markdown and text files'
	@echo 'make test                    ruff, mypy, pytest'
	@echo 'make clean                   remove $(VENV) and all caches'
	@echo 'PYTHON=python3.12            chooses the Python (3.11 or later) that $(VENV) is made with, once'

quickstart: $(VENV)/.quickstart
	@$(VENV)/bin/kalm quickstart $${QUICKSTART_DOCS:+"--docs=$$QUICKSTART_DOCS"} $${QUICKSTART_Q:+"--question=$$QUICKSTART_Q"}

test: $(VENV)/.dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.quickstart $(VENV)/.dev: pyproject.toml $(VENV)/.made
	@echo 'Installing into $(VENV): a minute or two, the first time.'
	@$(PIP) install --editable '.[$(@F:.%=%)]'
	@touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo '$(PYTHON) is missing or older than 3.11. Name another Python: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo '$(PYTHON) lacks venv or pip. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@
