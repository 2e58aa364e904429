# Two commands for a stranger: `make run` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test test-sites lint docs clean

run: $(VENV)/.run
	@$(BIN)/fedllm run quickstart

test: $(VENV)/.test
	$(BIN)/pytest -n auto --dist loadfile

# Runs across sites alone: policies, logs, and real processes of NVIDIA FLARE on this machine.
test-sites: $(VENV)/.test
	$(BIN)/pytest -n auto --dist loadfile tests/sites tests/engine/nvflare tests/cli/test_deploy_commands.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/python -m docs.build
	$(BIN)/mkdocs build --strict

$(VENV)/.run: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing fedllm into $(VENV) (the first time takes a minute or two) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
