# `make help` lists what is supported. All targets run as root on Debian 12: the lab makes network namespaces.
.DEFAULT_GOAL := help
SHELL := /bin/bash
CACHE := $(or $(VMTAP_CACHE),$(CURDIR)/.cache)
BIN := $(CACHE)/venv/bin
# Compiled modules are kept: the tests start Python some thousand times, a part of them under emulation.
unexport PYTHONDONTWRITEBYTECODE
T ?=
A ?=

.PHONY: help setup demo bench soak test test-hw cluster test-cluster kind test-kind fuzz sbom lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## get what the demo and the tests need (they do it themselves)
	@lab/setup test

demo: ## virtual machines talk over macvtap and tap in every mode; A=--json for programs
	@lab/setup demo
	@$(BIN)/python -m lab.demo $(A)

bench: ## what it costs, beside the reference plugins: writes docs/benchmark.md; A=--quick for under a minute
	@lab/setup bench
	@$(BIN)/python -m lab.bench $(A)

soak: ## attachments come and go beside hostile neighbours and random kills; A="--seconds 600 --seed 1"
	@lab/setup demo
	@$(BIN)/python -m lab.soak $(A)

test: ## all tests, linters and types; T="tests/unit -k mac" for some
	@lab/setup test
	@$(BIN)/python -m pytest -n auto $(T)

test-hw: ## those that need an SR-IOV NIC, in a machine that emulates one; T="-k vlan" for some
	@lab/setup test
	@$(BIN)/python -m pytest tests/hw $(T)

cluster: ## a real Kubernetes of one node, and a shell on it with kubectl
	@lab/setup cluster
	@$(BIN)/python -m lab.kubernetes.shell

test-cluster: ## the tests that want that Kubernetes; the first time it is built, in ten minutes
	@lab/setup cluster
	@$(BIN)/python -m pytest -n 2 tests/cluster tests/deploy/manifests $(T)

kind: ## a real kind cluster of three nodes, and a shell with docker, kind and kubectl; A=deploy/kind/up to run that
	@lab/setup kind
	@$(BIN)/python -m lab.kind $(A)

test-kind: ## the tests that want a kind cluster; the first time, what it needs is built, in fifteen minutes
	@lab/setup kind
	@$(BIN)/python -m pytest tests/kind $(T)

fuzz: ## coverage-guided fuzzing, for a minute; A="--seconds 600" or A="netconf --seconds 60"; A=--help
	@lab/setup fuzz
	@$(BIN)/python -m lab.fuzz $(A)

sbom: ## the SBOMs of both images, in CycloneDX JSON: writes .cache/sbom
	@lab/setup cluster
	@$(BIN)/python -m lab.sbom --lab "$(CACHE)/sbom"

lint: ## format what can be formatted, then say what is wrong
	@lab/setup test
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix
	@$(BIN)/mypy

clean: ## remove the cache folder: environment, guest, built clients
	rm -rf "$(CACHE)"
