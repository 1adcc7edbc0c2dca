PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := .demo/SmolLM2-135M-Instruct

.PHONY: help demo test quality

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.demo-installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.test-installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(VENV)/.demo-installed ## Choose among five generated datasets with a real language model (about 5 minutes on 2 cores)
	@$(BIN)/python recipes/demo/data.py .demo/data
	@$(BIN)/python recipes/demo/model.py $(MODEL)
	@$(BIN)/m2m select --config recipes/demo.yaml

test: $(VENV)/.test-installed ## Run the tests
	@$(BIN)/python -m pytest

quality: $(VENV)/.test-installed ## Lint, check formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
