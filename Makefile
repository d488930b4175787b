# Two commands are enough: `make demo` and `make test`. Each makes its own environment in .venv first.

PYTHON ?= python3
BIN := .venv/bin

.DELETE_ON_ERROR:
.PHONY: demo serve test check format clean help

help: ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/installed ## start everything, send sample conversations, show their scores, serve until Ctrl-C
	@$(BIN)/gateway demo $(if $(DEMO_EXIT),--leave)

serve: .venv/installed ## start everything, with no sample traffic
	@$(BIN)/gateway serve

test: .venv/installed-dev ## the whole test suite, on two cores; ARGS="-n 0 tests/unit" for a part of it on one
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check: .venv/installed-dev ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and all data of .gateway
	rm -rf .venv .gateway

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "The venv module is missing; on Debian: apt install python3-venv"; exit 1; }
	@echo "Installing into .venv: some 180 packages, a minute or two the first time."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

# Dependency groups need pip 25.1.
.venv/installed-dev: .venv/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group dev
	@touch $@
