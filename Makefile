PYTHON ?= python3
VENV ?= .venv
DEVICE ?= cpu
BIN := $(VENV)/bin
MODEL := .demo/SmolLM2-135M-Instruct

.PHONY: help demo test quality crash families fuzz gpu-check

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed-%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo ## Choose among five generated datasets with a real language model (about 2 minutes on 2 fast cores)
	@$(BIN)/python recipes/demo/data.py .demo/data
	@$(BIN)/python recipes/demo/model.py $(MODEL)
	@$(BIN)/m2m select --config recipes/demo.yaml

test: $(VENV)/.installed-test ## Run the tests; DEVICE=cuda: with the models on the GPU
	@M2M_TEST_DEVICE=$(DEVICE) $(BIN)/python -m pytest

quality: $(VENV)/.installed-test ## Lint, check formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

crash: $(VENV)/.installed-test ## Kill runs 60 times and cut every file of a finished one short (about 6 minutes)
	@$(BIN)/python tests/crash.py --kills 60 --files all

families: $(VENV)/.installed-test ## One pico model of every family: scores against plain models; writes docs/models.md (about 10 minutes)
	@$(BIN)/python tests/families.py

fuzz: $(VENV)/.installed-test ## Thousands of made-up configurations, rows, journals and adapter folders
	@M2M_FUZZ=full $(BIN)/python -m pytest tests/test_fuzz.py

gpu-check: $(VENV)/.installed-demo ## On a CUDA machine: exactness, speed, 4-bit, every feature that touches a device (random weights, no downloads)
	@$(BIN)/python recipes/gpu_check.py
