# Two commands set everything up on a fresh Debian machine with Python 3.11: `make demo` and `make test`.
# Stamps under .cache/ and .venv/ remember what was installed; `make clean` forgets it.

PYTHON ?= python3.11
JOBS ?= 2
SEEDS ?= 2000
FUZZ_SECONDS ?= 600
FAULTS ?= 200

BIN := .venv/bin
# An editable install compiles nothing, and where PYTHONDONTWRITEBYTECODE is set no run keeps what it compiles: a third
# of a short copy would be the compiler.
COMPILE = $(BIN)/python -m compileall -q cli common coordinator worker server
STAMPS := .cache/stamps
SHELL := /bin/sh
# Debian keeps mke2fs and losetup where an ordinary user, and some machinery, does not look.
export PATH := $(PATH):/usr/sbin:/sbin
.DELETE_ON_ERROR:
.PHONY: help demo test test-long check bench fuzz simulate chaos format venv swift clean

help:
	@echo 'make demo       copy a real ext4 image between two NBD servers with several workers, and check the copy'
	@echo 'make test       every test but the long matrices (installs what it needs, system packages included)'
	@echo 'make test-long  the whole matrices'
	@echo 'make check      format, lint, strict types, import layers, fast tests'
	@echo 'make bench      measure beside nbdcopy and qemu-img, write docs/benchmarks.md (15 minutes; ARGS=--quick: 2)'
	@echo 'make fuzz       fuzz the NBD client, then the server, each for FUZZ_SECONDS ($(FUZZ_SECONDS))'
	@echo 'make simulate   simulate whole jobs for SEEDS seeds ($(SEEDS))'
	@echo 'make chaos      kill, stop and cut off real servers, workers and coordinators FAULTS times ($(FAULTS)); SEED=N: again'
	@echo 'make format     format and mend what the linter can mend'

demo: $(STAMPS)/packages-demo .venv/installed
	@$(COMPILE)
	@deploy/demo.sh

test: $(STAMPS)/packages-test .venv/installed-dev .cache/swift/installed
	$(BIN)/pytest -q -n $(JOBS) --dist worksteal -m 'not long' $(ARGS)

test-long: $(STAMPS)/packages-test .venv/installed-dev .cache/swift/installed
	$(BIN)/pytest -q -n $(JOBS) --dist worksteal -m long --timeout 1800 $(ARGS)

check: $(STAMPS)/packages-test .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=.types $(BIN)/lint-imports
	$(BIN)/pytest -q -n $(JOBS) -m 'not long' tests/unit

bench: $(STAMPS)/packages-bench .venv/installed
	@$(COMPILE)
	PYTHONPATH=tests $(BIN)/python -m benchmarks.main $(ARGS)

fuzz: .venv/installed-dev
	$(BIN)/python tests/fuzz/fuzz_client.py --seconds $(FUZZ_SECONDS)
	$(BIN)/python tests/fuzz/fuzz_server.py --seconds $(FUZZ_SECONDS)

simulate: .venv/installed-dev
	PYTHONPATH=tests $(BIN)/python -m simulation.run --seeds $(SEEDS) --jobs $(JOBS) $(ARGS)

chaos: $(STAMPS)/packages-test .venv/installed-dev
	@$(COMPILE)
	PYTHONPATH=tests $(BIN)/python -m chaos.run --faults $(FAULTS) $(if $(SEED),--seed $(SEED)) $(ARGS)

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

venv: .venv/installed-dev

swift: $(STAMPS)/packages-test .cache/swift/installed

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# -- set-up ------------------------------------------------------------------------------------------------------------

$(STAMPS)/packages-%: deploy/packages.sh
	@deploy/packages.sh $*
	@mkdir -p $(@D) && touch $@

.venv/pyvenv.cfg:
	@deploy/packages.sh venv
	@echo 'setting up .venv with $(PYTHON)'
	@$(PYTHON) -m venv .venv

# An object store for tests, with dependencies that are none of the project's.
.cache/swift/installed: deploy/swift-requirements.txt | .venv/pyvenv.cfg
	@echo 'installing OpenStack Swift into .cache/swift, for tests of object stores'
	@$(PYTHON) -m venv .cache/swift
	@.cache/swift/bin/pip install -qq --disable-pip-version-check -r deploy/swift-requirements.txt
	@touch $@

.venv/installed: pyproject.toml | .venv/pyvenv.cfg
	@echo 'installing nbdshard and its dependencies into .venv'
	@$(BIN)/pip install -qq --disable-pip-version-check -e .
	@$(COMPILE)
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/pyvenv.cfg
	@echo 'installing nbdshard, its dependencies and its development tools into .venv'
	@$(BIN)/pip install -qq --disable-pip-version-check -e '.[dev]'
	@$(COMPILE)
	@touch .venv/installed $@
