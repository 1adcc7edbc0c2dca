PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := .demo/SmolLM2-135M-Instruct

.PHONY: help demo test quality gpu-check

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed-%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo ## Choose among five generated datasets with a real language model (about 5 minutes on 2 cores)
	@$(BIN)/python recipes/demo/data.py .demo/data
	@$(BIN)/python recipes/demo/model.py $(MODEL)
	@$(BIN)/m2m select --config recipes/demo.yaml

test: $(VENV)/.installed-test ## Run the tests
	@$(BIN)/python -m pytest

quality: $(VENV)/.installed-test ## Lint, check formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

gpu-check: $(VENV)/.installed-demo ## On a CUDA machine: exactness, speed, several candidates in one pass, 4-bit (random weights, no downloads)
	@$(BIN)/python recipes/gpu_check.py
