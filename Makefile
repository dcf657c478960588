# Every target works on a fresh clone: what it needs is installed into .venv, and again only when
# pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal  # a process a core, of one thread each

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-processors gpu-check lint format docs dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo ## meta-train a small rule, compare it and the default with tuned Adam
	OMP_NUM_THREADS=1 $(BIN)/learned-optim demo  # its tensors are small: more threads bring little, and stall on a busy machine

test: $(VENV)/.installed-dev ## run the whole test suite
	$(PYTEST)

test-fast: $(VENV)/.installed-dev ## run the tests that take seconds
	$(PYTEST) -m "not slow"

NUMERICAL := tests/kernels/test_kernels.py tests/kernels/test_cpu_kernel.py tests/kernels/test_training_kernels.py \
	tests/optimizer/test_plain_step.py tests/optimizer/test_optimizer.py \
	tests/optimizer/test_optimizer_parameters.py tests/optimizer/test_contract.py \
	tests/optimizer/test_contract_autograd.py tests/optimizer/test_pytorch*.py tests/optimizer/test_trajectory_laws.py \
	tests/rules/test_rule*.py tests/meta_train/inner/test_vectorize.py
test-processors: $(VENV)/.installed-dev ## run the numerical tests as other processors, compilers and thread counts would
	ATEN_CPU_CAPABILITY=default CC="gcc -march=x86-64" $(PYTEST) -m "not slow" $(NUMERICAL)
	ATEN_CPU_CAPABILITY=avx2 CC="gcc -march=x86-64-v3" $(PYTEST) -m "not slow" $(NUMERICAL)
	CC="clang -march=x86-64" $(PYTEST) -m "not slow" $(NUMERICAL)
	CC=clang $(subst OMP_NUM_THREADS=1,OMP_NUM_THREADS=2,$(PYTEST)) -m "not slow" $(NUMERICAL)

gpu-check: $(VENV)/.installed-dev ## on a machine with a GPU: kernels, optimizer and step time, in eight minutes
	$(BIN)/python -m benchmarks.speed.gpu_check

lint: $(VENV)/.installed-dev ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## fix what ruff can fix, and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed-dev ## build the site of the documentation in build/docs; warnings are errors
	$(BIN)/python -m sphinx -q --fail-on-warning --keep-going -d build/doctrees docs build/docs

dist: $(VENV)/.installed-dev ## build wheel and sdist in dist/, and check what a package index would show of them
	rm -rf dist
	$(BIN)/python -m build --quiet --no-isolation
	$(BIN)/python -m twine check --strict dist/*

clean: ## remove caches and build products; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
