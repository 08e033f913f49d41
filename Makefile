.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
TESTERS ?= 2

.PHONY: help install demo test check lint types contracts soak fuzz bench clean

help:            ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install:         ## make .venv with the pinned set
	@rm -f .venv/installed; $(MAKE) --no-print-directory .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/pip || { $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; say where: make PYTHON=python3.11")' && $(PYTHON) -m venv .venv; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[worker,embedded,dev]' -c constraints.txt
	touch .venv/installed

demo: .venv/installed   ## the whole way: upload, label, select, train, download, classify
	$(BIN)/python examples/demo.py

test: .venv/installed   ## every test, on real PostgreSQLs and Redises, in $(TESTERS) processes with services of their own
	$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile

lint: .venv/installed   ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed   ## mypy
	$(BIN)/mypy

contracts: .venv/installed   ## import-linter
	$(BIN)/lint-imports

check: lint types contracts test   ## what CI runs

soak: .venv/installed   ## jobs under 50 kills, lost parts and a cut network, then the audit: about 10 minutes
	$(BIN)/python -m tests.faults.soak --kills 50 --seconds 840

fuzz: .venv/installed   ## every operation of the API with 100 requests each, good and bad
	FUZZ_EXAMPLES=100 $(BIN)/python -m pytest tests/app/test_fuzz.py tests/app/test_records_fuzz.py tests/app/test_life_cycle_machine.py --timeout 3600

bench: .venv/installed   ## the benchmarks that end within minutes: ratios of two things run in turn
	$(BIN)/python -m benchmarks.run

clean:           ## remove the environment and the caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
