# make run, make test, ...: each alone creates the environment, installs, and does its job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help run test fuzz lint bench reproduce gpu compiled clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 10

# DeepSpeed would otherwise try to compile its operators while it is installed.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --editable '.[dev,joblib]'
	@touch $@

run: $(READY)  ## FineMoE on the scale Mixtral with 25 % of the experts' memory
	$(BIN)/python run.py system=finemoe model=mixtral memory_budget=25% workload=quick testbed=emulated

test: $(READY)  ## the tests
	$(BIN)/python -m pytest

fuzz: $(READY)  ## the fuzz tests at a hundred times their size (FUZZ=100, SEED=n)
	FUZZ=$${FUZZ:-100} $(BIN)/python -m pytest tests/fuzz -s --hypothesis-seed=$${SEED:-$$(date +%s)}

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## overheads of the engine, as ratios measured in one run
	$(BIN)/python -m experiments.bench

reproduce: $(READY)  ## every figure and claim of the paper's evaluation, simulated
	$(MAKE) compiled || echo "not compiled: replays are interpreted"
	$(BIN)/python -m experiments.reproduce all

gpu: $(READY)  ## everything that only a machine with CUDA can tell
	$(BIN)/python -m experiments.bench.gpu

# Unchanged sources, one C file; without it they are interpreted. Where Python's C compiler is
# missing, as in slim containers, pip brings one.
compiled: $(READY)  ## compile the engine with mypyc: the same replays about twice as fast
	rm -rf build finemoe/offload/*.so *__mypyc*.so
	cc=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_config_var('CC').split()[0])"); \
	command -v $${CC:-$$cc} > /dev/null || { $(BIN)/python -m pip install --quiet ziglang; \
	export CC="$(abspath $(BIN))/python -m ziglang cc"; }; \
	$(BIN)/mypyc $(addprefix finemoe/offload/,cache.py transfer.py residency.py virtual_links.py replay.py)

clean:  ## remove the environment, the compiled engine and what runs left
	rm -rf $(VENV) outputs multirun build *.egg-info finemoe/offload/*.so *__mypyc*.so
