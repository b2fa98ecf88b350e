# Targets for a fresh clone: each makes what it needs. PYTHON picks the interpreter, 3.11 or later.
PYTHON ?= python3
OUT ?= gpu-report
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# torch goes first and alone, so that whichever build the index offers is the one that stays.
TORCH := $(shell grep '^torch==' constraints.txt)

# A small Continuous Thought Machine on mazes from 9 x 9 to 19 x 19, minutes on 2 cores.
MAZES := --model ctm --maze_size 9 11 13 15 17 19 --size_curriculum 0.7 --maze_route_length 100 \
	--training_mazes 20000 --test_mazes 500 --iterations 10 --d_model 128 --d_input 64 --heads 4 \
	--n_synch_out 64 --n_synch_action 64 --synapse_depth 4 --memory_length 8 --memory_hidden_dims 8 \
	--batch_size 64 --lr 2e-3 --warmup_steps 200 --training_iterations 3400 --evaluate_every 425

# The newest JAX needs Python 3.12 or later.
PYTHON312 ?= python3.12
LATEST := .venv-jax-latest

.PHONY: help demo mazes hypermazes test test-jax-latest bench peers gpu docs clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

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

mazes: $(VENV)/demo.installed  ## Routes through mazes, 9x9 to 19x19, by a Continuous Thought Machine: minutes on 2 cores
	$(BIN)/python -m ml_networks.tasks.mazes.train $(MAZES) --out runs/mazes
	$(BIN)/python -m ml_networks.tasks.mazes.evaluate runs/mazes/last.safetensors

hypermazes: $(VENV)/demo.installed  ## The same with synapses that adapt to the state
	$(BIN)/python -m ml_networks.tasks.mazes.train $(MAZES) --out runs/hypermazes \
		--use_hyper --hyper_layers bottleneck --hyper_rank 8
	$(BIN)/python -m ml_networks.tasks.mazes.evaluate runs/hypermazes/last.safetensors

test: $(VENV)/all.installed  ## Everything that runs in CI; the last line counts the tests
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/test

$(LATEST)/all.installed: pyproject.toml constraints-jax-latest.txt
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	    echo "the newest JAX needs Python 3.12 or later, and $(PYTHON312) is none:" \
	        "give one with make test-jax-latest PYTHON312=/path/to/python"; exit 1; }
	@echo "installing the newest JAX and the test tools into $(LATEST)"
	$(PYTHON312) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install -qq --disable-pip-version-check \
	    -c constraints-jax-latest.txt -e ".[jax]" \
	    pytest pytest-timeout pytest-xdist hypothesis mlxtend matplotlib omegaconf
	@touch $@

# There it has no torch, whose side of each test comes from $(VENV) on file.
test-jax-latest: $(VENV)/all.installed $(LATEST)/all.installed  ## The JAX tests on the newest JAX
	rm -rf $(LATEST)/torch-side
	ML_NETWORKS_TORCH_SIDE=$(CURDIR)/$(LATEST)/torch-side \
	    $(BIN)/python -m pytest -n 2 -q tests/jax
	ML_NETWORKS_TORCH_SIDE=$(CURDIR)/$(LATEST)/torch-side \
	    $(LATEST)/bin/python -m pytest -n 2 -q -rs tests/jax tests/kernels tests/test_documents.py

bench: $(VENV)/all.installed  ## Every op and model against what one would pick instead
	$(BIN)/python -m pytest benchmarks

peers: $(VENV)/all.installed  ## An environment with the published 0.2.6, for the benchmarks
	PYTHON=$(PYTHON) benchmarks/make_peers.sh .venv-peers

gpu:  ## Conformance, tuning and benchmarks on this machine's GPU, into OUT; installs nothing
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

docs: $(VENV)/all.installed  ## The documentation, into site/
	$(BIN)/mkdocs build --strict

clean:  ## Remove environments and build products
	rm -rf $(VENV) .venv-peers $(LATEST) build dist site
