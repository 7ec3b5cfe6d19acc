# `make` alone lists what there is. Works with GNU make 3.81 and later.

PYTHON ?= python3
VENV := .venv
PIP = $(@D)/bin/python -m pip --quiet --disable-pip-version-check
# uv takes an eighth of pip's time. It does not read pip's settings: where it cannot find something,
# pip looks for it. Copies, because nltk, below LlamaIndex, refuses to read files with hard links.
UV = $(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --link-mode copy
INSTALL = $(PIP) install uv && $(UV) $(WANTED) || \
	{ echo 'uv failed. Trying pip, which takes a minute or two.' >&2; $(PIP) install --no-compile $(WANTED); }

# vLLM on a CPU is large and wants its own versions of much: an environment of its own.
VLLM_VENV := .venv-vllm
VLLM_PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo $(PYTHON))
VLLM_PINS := tests/vllm/requirements.txt
CPU_TORCH = $(shell grep '^torch==' $(VLLM_PINS))

# Q and DOCS reach the command through the environment and word by word as they were typed:
# neither make nor the shell reads anything into their quotes and dollar signs.
export QUICKSTART_Q := $(value Q)
export QUICKSTART_DOCS := $(value DOCS)
unexport Q DOCS

# Every client that ours is compared with, pinned: an environment of their own.
BENCH_VENV := .venv-bench
BENCH_PINS := benchmarks/client/requirements.txt

.PHONY: help quickstart test test-fast test-matrix coverage mutation simulate soak security test-vllm docs docs-test notebooks image-lock bench-client bench-real-weights clean
.NOTPARALLEL:

help:
	@echo 'make quickstart              index the docstrings of the standard library, ask three questions'
	@echo 'make quickstart Q="..."      ask a question of your own'
	@echo 'make quickstart DOCS=path    index a folder of Markdown and text files'
	@echo 'make test                    ruff, mypy, import-linter, pytest'
	@echo 'make test-fast               pytest, less what starts a process or a container: a minute'
	@echo 'make test-matrix             the same with the lowest and the newest versions, on Python 3.11 to 3.14: 20 minutes'
	@echo 'make coverage                lines and branches that `make test` runs, and those that it does not'
	@echo 'make mutation                whether the tests notice faults put into validation, batching, dispatch ...'
	@echo 'make simulate                client and service in virtual time, under the faults of 10,000 seeds: a minute'
	@echo 'SEED=7 make simulate         one of them, exactly as it ran before'
	@echo 'make soak                    real clients, a proxy that injects faults, kalm serve killed and restarted: 10 minutes'
	@echo 'SECONDS=60 make soak         a minute'
	@echo 'make security                bandit; pip-audit, if its database of vulnerabilities can be reached'
	@echo 'make test-vllm               pytest tests/vllm: the vLLM engine, with real vLLM on the CPU (Linux)'
	@echo 'make docs                    the documentation site, in build/site; a warning is an error'
	@echo 'make docs-test               and open each of its pages in headless Chromium'
	@echo 'make notebooks               run the notebooks of examples/ again, in place'
	@echo 'make image-lock              resolve the packages of the image with vLLM again, after a change of pins'
	@echo 'make bench-client            our client beside its peers, 20 minutes (Linux)'
	@echo 'make bench-real-weights      what int8 and fp8 do to rankings, with a small real Gemma 3 from PyPI'
	@echo 'make clean                   remove $(VENV), $(VLLM_VENV), $(BENCH_VENV) and all caches'
	@echo 'PYTHON=python3.12            chooses the Python (3.11 or later) that $(VENV) is made with, once'
	@echo 'VLLM_PYTHON=python3.12       and $(VLLM_VENV); python3.11 if it is there'

quickstart: $(VENV)/.quickstart
	@$(VENV)/bin/kalm quickstart $${QUICKSTART_DOCS:+"--corpus=$$QUICKSTART_DOCS"} $${QUICKSTART_Q:+"--question=$$QUICKSTART_Q"}

test: $(VENV)/.dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	@# Two at a time, file by file: much of it waits for processes. tests/conftest.py puts long files first.
	$(VENV)/bin/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# In order: the longest first. A test that is marked slow is left out; one that starts a process fails.
FAST := tests/unit $(patsubst %,tests/contract/test_%.py,bad_input bulk bulk_jobs client cli cost \
	error_codes http_faults http_odd http_requests http_server langchain secrets serve)
test-fast: $(VENV)/.dev
	$(VENV)/bin/pytest --fast $(FAST) --numprocesses 2 --dist loadfile

test-matrix: $(VENV)/.dev
	$(VENV)/bin/python tests/tools/version_matrix.py $(FAST)

coverage: $(VENV)/.dev
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(TESTS); \
		status=$$?; $(VENV)/bin/coverage combine --quiet; $(VENV)/bin/coverage report; exit $$status

mutation: $(VENV)/.dev
	$(VENV)/bin/python tests/tools/mutation.py

simulate: $(VENV)/.dev
	SEEDS=10000 $(VENV)/bin/pytest tests/simulation -s

SECONDS ?= 600
soak: $(VENV)/.dev
	PYTHONPATH=tests $(VENV)/bin/python tests/soak/soak.py $(SECONDS)

# The tools are not in $(VENV): they would bring their own versions of what they look at.
security: $(VENV)/.dev
	$(VENV)/bin/uv tool run --from 'bandit>=1.8' bandit --quiet --recursive --configfile pyproject.toml kalm_integrations modal_backend
	@mkdir -p build
	@$(VENV)/bin/uv pip freeze --quiet --python $(VENV)/bin/python --exclude-editable > build/installed.txt
	@if $(VENV)/bin/python -c 'import json, urllib.request as r; json.load(r.urlopen("https://pypi.org/pypi/aiohttp/3.12.0/json", timeout=10))["vulnerabilities"][0]' 2>/dev/null; \
	then $(VENV)/bin/uv tool run --from 'pip-audit>=2.9' pip-audit --strict --disable-pip --no-deps --requirement build/installed.txt; \
	else echo "PyPI's database of vulnerabilities cannot be reached: the installed packages were not audited."; fi

test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/pytest tests/vllm --numprocesses 2 --dist loadfile

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

# Debian's chromium, or the one in CHROMIUM=path; else Playwright downloads its own.
docs-test: $(VENV)/.dev $(VENV)/.docs-test docs
	@test -n "$$CHROMIUM" || command -v chromium >/dev/null || $(VENV)/bin/playwright install chromium
	$(VENV)/bin/pytest tests/browser

notebooks: $(VENV)/.dev
	$(VENV)/bin/python tests/notebooks.py

image-lock: $(VENV)/.dev
	$(VENV)/bin/python tests/packaging/lock_image.py > build-image-lock
	mv build-image-lock modal_backend/image_requirements.txt

bench-client: $(BENCH_VENV)/.ready
	$(BENCH_VENV)/bin/python benchmarks/client/run.py
	$(BENCH_VENV)/bin/python benchmarks/client/streaming.py
	$(BENCH_VENV)/bin/python benchmarks/client/http_endpoint.py
	$(BENCH_VENV)/bin/python benchmarks/client/rpc.py

# The model's use is subject to the Gemma Terms of Use, ai.google.dev/gemma/terms.
bench-real-weights: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps gguf==0.19.0
	$(VLLM_VENV)/bin/python benchmarks/real_weights/run.py --out build/real_weights --stage-seconds 36000

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(BENCH_VENV) .coverage* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.quickstart $(VENV)/.dev $(VENV)/.docs $(VENV)/.docs-test: WANTED = --editable '.[$(@F:.%=%)]'
$(VENV)/.quickstart $(VENV)/.dev $(VENV)/.docs $(VENV)/.docs-test: pyproject.toml $(VENV)/.made
	@echo 'Installing into $(VENV), the first time.'
	@$(INSTALL)
	@touch $@

$(BENCH_VENV)/.ready: WANTED = --editable '.[langchain,llama-index,modal,server]' --requirement $(BENCH_PINS)
$(BENCH_VENV)/.ready: $(BENCH_PINS) pyproject.toml $(BENCH_VENV)/.made
	@echo 'Installing the peers into $(BENCH_VENV), the first time.'
	@$(INSTALL)
	@touch $@

# Without their dependencies: of torch's companions only CUDA builds may be found, and those break
# the import of vLLM.
$(VLLM_VENV)/.ready: WANTED = --no-deps --requirement $(VLLM_PINS) --editable .
$(VLLM_VENV)/.ready: $(VLLM_PINS) pyproject.toml $(VLLM_VENV)/.made
	@echo 'Installing vLLM for the CPU into $(VLLM_VENV), 2 GB, the first time.'
	@$(PIP) install --no-deps --no-compile '$(CPU_TORCH)' || \
		$(PIP) install --no-deps --no-compile --timeout 20 --retries 1 \
			--index-url https://download.pytorch.org/whl/cpu '$(CPU_TORCH)' || \
		{ echo 'The CPU build of torch, $(CPU_TORCH), cannot be had for '"$$($(@D)/bin/python -V)"': neither' >&2; \
		  echo 'from where pip is told to look nor from download.pytorch.org. Put its wheel into a folder and' >&2; \
		  echo 'name that: PIP_FIND_LINKS=folder make test-vllm. Or name another Python: VLLM_PYTHON=python3.12' >&2; \
		  echo 'after make clean. Nothing of vLLM was tested.' >&2; exit 1; }
	@$(INSTALL)
	@touch $@

$(VENV)/.made $(BENCH_VENV)/.made: WITH = $(PYTHON)
$(VLLM_VENV)/.made: WITH = $(VLLM_PYTHON)
$(VLLM_VENV)/.made: CHOOSE := VLLM_PYTHON
$(VENV)/.made $(VLLM_VENV)/.made $(BENCH_VENV)/.made:
	@$(WITH) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo '$(WITH) is missing or older than 3.11. Name another Python, for instance: make $(or $(CHOOSE),PYTHON)=python3.12 ...' >&2; exit 1; }
	@$(WITH) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo '$(WITH) lacks venv or pip. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@$(WITH) -m venv $(@D)
	@touch $@
