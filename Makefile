# Every target sets up what it needs: a virtual environment of its own with pinned dependencies.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help venv demo test test-all test-torch goldens types lint fault-table coverage-table soak bench train clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

venv: $(READY) ## Set up the virtual environment

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: venv ## Sample pictures uncached and with TeaCache, side by side; writes out/demo
	$(BIN)/python -m examples.demo

test: venv ## Run the tests
	$(BIN)/python -m pytest -n 2

test-all: venv ## Run the slow tests too (about twice as long)
	$(BIN)/python -m pytest -n 2 -m "slow or not slow"

test-torch: ## Run the tests with another torch, in an environment of its own: make test-torch TORCH=2.15.0
	$(PYTHON) -m venv .venv-$(TORCH)
	grep -v -e '^torch==' -e '^setuptools==' constraints.txt > .venv-$(TORCH)/constraints.txt
	.venv-$(TORCH)/bin/python -m pip install --quiet -c .venv-$(TORCH)/constraints.txt torch==$(TORCH)
	.venv-$(TORCH)/bin/python -m pip install --quiet -c .venv-$(TORCH)/constraints.txt -e '.[test]'
	.venv-$(TORCH)/bin/python -m pytest -n 2

goldens: venv ## Rewrite the golden texts of the passes; read the diff before you commit it
	$(BIN)/python -m pytest tests/passes/test_goldens.py tests/models --update-goldens

types: venv ## Check types strictly; mypy cannot read the ordinary editable install, so it is put back afterwards
	$(BIN)/python -m pip install --quiet --no-deps -e . --config-settings editable_mode=strict
	$(BIN)/mypy; status=$$?; $(BIN)/python -m pip install --quiet --no-deps -e . && exit $$status

lint: venv ## Check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

fault-table: venv ## Write docs/faults.md anew from the tests behind it
	$(BIN)/python -m tests.faults.table > docs/faults.md

coverage-table: venv ## Write docs/coverage.md anew from what becomes of each model of the zoo (about ten minutes)
	$(BIN)/python -m tests.zoo.table > docs/coverage.md

soak: venv ## Interleave many requests for a while, each compared with the eager reference run alone
	$(BIN)/python -m tests.soak --steps 20000

bench: venv ## Measure compile time and the cost of each kind of step
	$(BIN)/python -m benchmarks.compile_time
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.call_overhead
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.export_time
	$(BIN)/python -m benchmarks.export_time --runtime onnx

train: venv ## Train the demo's model anew (about an hour on 2 cores); resumes after an interruption
	$(BIN)/python -m examples.train_tiny_flux --out out/train

clean: ## Remove the virtual environment and all that was written
	rm -rf $(VENV) .venv-* out build *.egg-info
