# make test     lint, then all tests, on a CPU, with the real host
# make test-all these, and longer ones: 3,000 requests drawn at random against one server
# make lint     format and the linter's rules (pyproject.toml, [tool.ruff]); `ruff format .` formats
# make test-isa every wait, barrier, s_nop and LDS offset of some kernels taken out, one at a time: who finds it
# make demo     the trained tiny checkpoint, the real server, facts recalled from a long text
# make install  .venv with this package, SGLang and the test tools; done once, again when pyproject.toml changes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.dsv4-installed

.PHONY: install lint test test-all test-isa demo

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=")'
	@test -x $(BIN)/python || { echo "== making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "== installing SGLang and the test tools into $(VENV) (the first time: minutes, about 11 GB)"
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[host,dev]'
	@touch $@

# A process that interprets Triton kernels cannot compile them, and the reverse: two runs. Each shares its files between two
# processes, whole, because the tests of a file share a server or a model.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

test: lint
	$(PYTEST) $(ARGS)
	$(PYTEST) tests/kernels $(ARGS)

test-all: test
	$(BIN)/python -m pytest -m thorough $(ARGS)
	$(BIN)/python -m pytest tests/host/test_api.py -k every_request --hypothesis-profile thorough

test-isa: install
	$(BIN)/python -m pytest --numprocesses 2 -m "thorough or not thorough" tests/isa $(ARGS)
	$(BIN)/python -m pytest -m thorough tests/isa/flydsl_machine_code.py $(ARGS)
	$(BIN)/python tests/isa/mutants.py

demo: install
	$(BIN)/python examples/demo.py $(ARGS)
