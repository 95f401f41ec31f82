# Set-up needs Python 3.11 or newer with venv, and nothing else. Override on the command line, for example
#   make install PYTHON=python3.12 PIP_FLAGS="--index-url ..."
PYTHON    ?= python3
VENV      ?= .venv
PIP_FLAGS ?=
BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip --disable-pip-version-check -qq install -c constraints.txt $(PIP_FLAGS)
# One thread is the fastest on small models, and makes timings repeatable.
THREADS   := OMP_NUM_THREADS=1
# Two workers, as many as small machines have cores; a file's tests share what is slow to start.
PYTEST    := $(THREADS) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

TESTS     := tests/workers tests/e2e tests/service tests/cluster tests/distributed tests/gpu tests/unit

DEMO      := --prompt "a red disc moves right" --seed 3 --compute 0.5 --scale 5 --overwrite

.DEFAULT_GOAL := help
.PHONY: help install demo serve-demo test test-slow check format clean

help:
	@echo "make demo        make a video of the demo model against a dense run, a report, and a heat map of single tokens, in out/"
	@echo "make serve-demo  serve the demo model at http://127.0.0.1:8000/, with a web page; jobs and videos in out/service"
	@echo "make test        run the test suite, without what is slow"
	@echo "make test-slow   run the slow tests: on Ray clusters, and a few long ones"
	@echo "make check       lint, formatting, types, import rules"
	@echo "make install     only set up $(VENV)"
	@echo "make format      format the code"
	@echo "make clean       remove $(VENV), out/ and caches"

# Two stamps: the demo waits only for what it needs. A change of the listed files installs anew.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "heterostep needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@echo "setting up $(VENV) (once; PyTorch is large, this can take some minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first: any later requirement is then satisfied by this build and pulls no other.
	@$(PIP) "torch==2.13.0"
	@$(PIP) -e .
	@touch $@

$(VENV)/.serve: $(VENV)/.runtime
	@$(PIP) -e ".[serve]"
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "setting up the test and lint tools ..."
	@$(PIP) -e ".[dev]"
	@touch $@

install: $(VENV)/.dev
	@echo "ready: $(BIN)/heterostep --help"

demo: $(VENV)/.runtime
	@mkdir -p out
	@$(THREADS) $(BIN)/heterostep generate $(DEMO) --output out/demo.mp4 --report out/demo.json --compare-dense
	@# The default policy computes all tokens equally often; this one has a map to show.
	@echo "the same with --policy tokens, which leaves out single tokens, and a map of how often each was computed:"
	@$(THREADS) $(BIN)/heterostep generate $(DEMO) --policy tokens --output out/demo-tokens.mp4 \
	    --heatmap out/demo-steps.mp4

# By tokens, so that the map has something to show.
serve-demo: $(VENV)/.serve
	@$(THREADS) $(BIN)/heterostep serve --no-ray --policy tokens --data-dir out/service

test: $(VENV)/.dev
	@# First what starts processes and waits for them, so that the many short tests fill the end.
	@$(PYTEST) -m "not slow" --no-loadscope-reorder $(TESTS)

test-slow: $(VENV)/.dev
	@$(PYTEST) -m slow --no-loadscope-reorder $(TESTS)

check: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@# The checkout may have any name; mypy must see it as heterostep.
	@mkdir -p .mypy_cache/src && ln -sfn "$(CURDIR)" .mypy_cache/src/heterostep
	@cd .mypy_cache/src && "$(abspath $(BIN))/mypy" --config-file heterostep/pyproject.toml --cache-dir .. \
	    $(addprefix heterostep/,__init__.py __main__.py errors.py settings.py version.py hsa parallel engine launch benchmarks/baselines benchmarks/quality benchmarks/results benchmarks/serving benchmarks/speed)
	@$(BIN)/lint-imports

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
