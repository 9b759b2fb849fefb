# Every target sets up .venv by itself. On a machine without a CUDA GPU the versions of constraints-cpu.txt are taken;
# `make CONSTRAINTS=/dev/null ...` leaves all versions to pip.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi),/dev/null,constraints-cpu.txt)
READY := .venv/ready
# That share the tests, a file to each, so that none makes what the tests of a file have in common a second time.
PROCESSES ?= 2

.PHONY: quickstart quickstart-short test lint bench gpu-test stories260k clean

quickstart: $(READY)
	$(BIN)/hylo quickstart --out runs/quickstart

quickstart-short: $(READY)
	$(BIN)/python -m tests.run_quickstart_short --out runs/quickstart-short

test: $(READY)
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m bench gated_rms_norm
	$(BIN)/python -m bench gated_delta_rule
	$(BIN)/python -m bench causal_conv1d
	$(BIN)/python -m bench ssd
	$(BIN)/python -m bench mamba2
	$(BIN)/python -m bench mla_absorb
	$(BIN)/python -m bench rms_norm
	$(BIN)/python -m bench swiglu
	$(BIN)/python -m bench l2_norm
	$(BIN)/python -m bench skinny_linear
	$(BIN)/python -m bench sampling
	$(BIN)/python -m bench linear_kl
	$(BIN)/python -m bench mla_attention
	$(BIN)/python -m bench mla_prefill
	$(BIN)/python -m bench.cold gated_delta_rule
	$(BIN)/python -m bench.cold ssd
	$(BIN)/python -m bench.cold causal_conv1d

gpu-test: $(READY)
	PYTHON=$(abspath $(BIN)/python) tests/gpu.sh runs/gpu-test

# Needs the checkpoint and the stories in ../shared/data (docs/upcycling.md).
stories260k: $(READY)
	$(BIN)/python -m tests.run_stories260k --out runs/stories260k

clean:
	rm -rf .venv build runs

$(READY): pyproject.toml setup.py CMakeLists.txt constraints-cpu.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@
