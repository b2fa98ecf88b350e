# Targets for a fresh clone: each makes what it needs. PYTHON picks the interpreter, 3.11 or later.
PYTHON ?= python3
OUT ?= gpu-report
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# torch goes first and alone, so that whichever build the index offers is the one that stays.
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: help demo test bench peers gpu docs clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing torch and the training tools into $(VENV) (a few minutes)"
	$(PIP) "$(TORCH)"
	$(PIP) -c constraints.txt -e ".[torch,train]"
	@touch $@

$(VENV)/all.installed: $(VENV)/demo.installed
	@echo "installing JAX and the test, benchmark and documentation tools into $(VENV)"
	$(PIP) -c constraints.txt -e ".[torch,jax,dev,docs]"
	@touch $@

demo: $(VENV)/demo.installed  ## Train a BSQ autoencoder on 5,000 images, under 3 minutes on 2 cores
	$(BIN)/python -m ml_networks.tasks.images.autoencoder train --out runs/demo
	$(BIN)/python -m ml_networks.tasks.images.autoencoder encode runs/demo/autoencoder.safetensors --index 7

test: $(VENV)/all.installed  ## Everything that runs in CI; the last line counts the tests
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/test

bench: $(VENV)/all.installed  ## Every op and model against what one would pick instead
	$(BIN)/python -m pytest benchmarks

peers: $(VENV)/all.installed  ## An environment with the published 0.2.6, for the benchmarks
	PYTHON=$(PYTHON) benchmarks/make_peers.sh .venv-peers

gpu:  ## Conformance, tuning and benchmarks on this machine's GPU, into OUT; installs nothing
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

docs: $(VENV)/all.installed  ## The documentation, into site/
	$(BIN)/mkdocs build --strict

clean:  ## Remove environments and build products
	rm -rf $(VENV) .venv-peers build dist site
