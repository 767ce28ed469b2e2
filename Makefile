# ublk-rs: everything a contributor types. `make` lists it.
#
#   RIG=qemu|host|auto   where kernel tests run (default: qemu, which is where both kernels are)
#   KERNELS=6.12,7.3     on which kernels
#   MACHINES=2           how many virtual machines test side by side
#   PYTEST_ARGS=...      handed to pytest
#   PREFIX=, DESTDIR=    where the C library is installed

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

export CARGO_BUILD_JOBS ?= 2
RIG ?= qemu
KERNELS ?=
MACHINES ?= 2
PYTEST_ARGS ?=

# The first interpreter that is new enough; a version manager's stub that runs nothing does not count.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV_PYTHON := .venv/bin/python
PYTEST := $(VENV_PYTHON) -m pytest -c python-tests/pyproject.toml --rootdir python-tests \
	--rig=$(RIG) $(if $(KERNELS),--kernels=$(KERNELS)) $(if $(filter qemu,$(RIG)),--numprocesses=$(MACHINES))

.PHONY: help setup build install demo lint host-test vm-test test test-full soak bench kernels clean

help: ## List what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

setup: ## Install what is missing (Debian packages, .venv with our package) and say what
	@test -n "$(PYTHON)" || { echo "setup: no Python 3.11 or newer in PATH" >&2; exit 1; }
	@PYTHONPATH=python-tests "$(PYTHON)" -m ublk_rig.provision

build: setup ## Build everything, optimised; the Python package ends in .venv
	cargo build --release --workspace --exclude ublk-py

install: ## Install the C library that `make -C ublk-capi` has built (PREFIX=/usr/local DESTDIR=)
	@$(MAKE) --no-print-directory -C ublk-capi install

demo: setup ## Bring up disks from Python, put filesystems on them, restart, verify
	@$(VENV_PYTHON) -m ublk_rig.demo

lint: setup ## Formatting, lints, documentation, types
	@$(VENV_PYTHON) -m ublk_rig.checks lint

host-test: setup ## Tests that need no ublk driver
	@$(VENV_PYTHON) -m ublk_rig.checks host

vm-test: setup ## Tests on real kernels
	@$(PYTEST) $(PYTEST_ARGS) python-tests/tests

test: ## Everything: lint, host tests, tests on real kernels
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory host-test
	@$(MAKE) --no-print-directory vm-test

test-full: ## Everything, every combination, and the soaks; makes the README's table
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory host-test
	@$(MAKE) --no-print-directory vm-test PYTEST_ARGS="--full $(PYTEST_ARGS)"
	@$(VENV_PYTHON) -m ublk_rig.support

soak: setup ## A thousand Python devices, ten minutes of exceptions under fio, long random runs
	@$(PYTEST) --full $(PYTEST_ARGS) -k "soak:: or model::" python-tests/tests/test_py_device.py

bench: setup ## Speed against the kernel's own ramdisk, loop and null_blk; Python's against nbdkit
	@$(VENV_PYTHON) -m ublk_rig.bench

kernels: setup ## Fetch the newest kernels to test on
	@$(VENV_PYTHON) -m ublk_vm.kernels fetch

clean: ## Remove what was built; the cache of kernels stays
	cargo clean
	rm -rf .venv artifacts python-tests/*.egg-info
	find python-tests -name __pycache__ -prune -exec rm -rf {} +
