# SPDX-License-Identifier: Apache-2.0
# Everything starts here: `make` lists the targets. Each installs what it needs, once, and is silent about it later.

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory --no-builtin-rules
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The distribution's own interpreter: BCC's Python module is built for no other.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
OBJECTS := $(CURDIR)/ebpfproxy/objects
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install --constraint constraints.txt
# Written by pip and the compiler only once both are through.
RUN_READY := $(VENV)/.run-ready
TEST_READY := $(VENV)/.test-ready
DEV_READY := $(VENV)/.dev-ready
FFI_READY := $(VENV)/.ffi-ready

export PYTHONDONTWRITEBYTECODE :=

##@ Use

build: $(RUN_READY) $(FFI_READY) objects ## a ready .venv/bin/ebpfproxy, with BPF objects and both loaders
	@$(BIN)/python -m compileall -q ebpfproxy

demo: build apt-demo ## Services on real traffic: namespaces, HTTP servers, the agent, a table of who answered
	@PYTHONPATH=tests $(BIN)/python scripts/demo.py $(ARGS)

completion: build ## install shell completion for bash and zsh system-wide
	@install -d /usr/share/bash-completion/completions /usr/share/zsh/site-functions
	@$(BIN)/ebpfproxy completion bash >/usr/share/bash-completion/completions/ebpfproxy
	@$(BIN)/ebpfproxy completion zsh >/usr/share/zsh/site-functions/_ebpfproxy

##@ Work on it

test: build apt-test $(TEST_READY) ## every test, as root: unit, scenarios, packets, namespaces (ARGS= for pytest)
	@scripts/test $(ARGS)

test-vm: build apt-demo apt-test apt-vm $(TEST_READY) ## the product under Linux 5.10, 6.1, 6.8 and 6.12, in virtual machines (an hour and a half)
	@$(BIN)/python -m pytest -q --numprocesses 2 tests/vm $(ARGS)

test-kube: build apt-demo apt-test apt-kube $(TEST_READY) ## the agent against a real Kubernetes API server, built once (ten minutes)
	@$(BIN)/python -m pytest -q tests/kube $(ARGS)

vagrant-test: build apt-vagrant $(TEST_READY) ## two nodes and a client in virtual machines, by Vagrant (a quarter of an hour on a quiet machine)
	@vagrant/test $(ARGS)

test-unit: build $(TEST_READY) ## the tests that need no root
	@$(BIN)/python -m pytest -q -m "not root and not netns" tests/unit tests/scenarios $(ARGS)

lint: build apt-lint $(DEV_READY) ## ruff, mypy, clang-format, import-linter, shellcheck
	@scripts/lint

format: build $(DEV_READY) ## rewrite Python and C in the project's format
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $$(git ls-files 'bpf/*.[ch]' 'ebpfproxy/libbpf/*.[ch]')

bench: build $(TEST_READY) ## the figures of the BPF dataplane on this machine
	@$(BIN)/python -m benchmarks $(ARGS)

wheel: build $(TEST_READY) ## dist/*.whl, with the C sources, the compiled objects and the extension
	@$(BIN)/python -m build --no-isolation --skip-dependency-check

clean: ## remove everything that make made
	@rm -rf $(VENV) $(OBJECTS) build dist *.egg-info ebpfproxy/libbpf/_ffi.*
	@find ebpfproxy -name __pycache__ -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

help: ## this list
	@awk -F ':.*## ' '/^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- what the targets above need ----------------------------------------------------------------------

# Debian packages: asks dpkg every time (10 ms), installs only what is missing.
apt-build apt-demo apt-kube apt-lint apt-test apt-vagrant apt-vm: apt-%:
	@scripts/deps $*

$(BIN)/python: | apt-build
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(RUN_READY): pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "installing Python packages"
	@$(PIP) setuptools cffi pcpp
	@$(PIP) --no-build-isolation --editable .
	@scripts/link-bcc $(BIN)/python
	@touch $@ $(FFI_READY)

$(TEST_READY): $(RUN_READY)
	@echo "installing what the tests need"
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

$(DEV_READY): $(TEST_READY)
	@echo "installing what lint needs"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

# The binding to libbpf: compiled once more when the contract changes.
$(FFI_READY): bpf/lib/abi.h ebpfproxy/libbpf/_build.py ebpfproxy/libbpf/glue.c ebpfproxy/__init__.py $(RUN_READY)
	@$(BIN)/python setup.py --quiet build_ext --inplace --force
	@touch $@

# bpf/Makefile knows what is out of date.
objects: | $(RUN_READY) apt-build
	@$(MAKE) -s -C bpf OUT=$(OBJECTS) PYTHON=$(CURDIR)/$(BIN)/python

.PHONY: build demo completion test test-kube test-vm vagrant-test test-unit lint format bench wheel clean help objects apt-build apt-demo apt-test apt-lint apt-kube apt-vagrant apt-vm
