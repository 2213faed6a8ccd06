# The commands of the project. `make demo` and `make test` need Python 3.11+ and nothing else.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.foldline-stamp
DEV_STAMP := $(VENV)/.foldline-dev-stamp
IMAGE := $(VENV)/protos.binpb
PEER := .venv-bench/.foldline-stamp

# Kept out of the recipes' reach: settings of somebody else's environment would find their way into ours.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PYTHONDONTWRITEBYTECODE
# Modules are kept compiled, in the environment: a process that compiles all that it imports takes twice as long to start.
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/bytecode

.PHONY: help demo dev test test-faults test-containers lint format proto migration docs baseline bench peer wheels lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(STAMP)  ## play the scenarios on a system of its own; under a minute the first time
	@$(BIN)/foldline demo

dev: $(STAMP)  ## keep the system up until Ctrl-C
	@exec $(BIN)/foldline dev $(ARGS)

test: $(DEV_STAMP)  ## all tests, on real engines, two at a time
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-faults: $(DEV_STAMP)  ## the long tests of faults: a thousand faults at random places, for one; half an hour
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m long $(ARGS)

test-containers: $(DEV_STAMP)  ## the image, compose.yaml and the Kubernetes manifests, run with podman; a quarter of an hour
	@$(BIN)/python -m pytest -m containers tests/containers $(ARGS)

lint: $(DEV_STAMP)  ## style, types, imports, contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy shared upcasters write_service read_service saga_service cli deploy examples tests protos/generate.py docs/generate.py
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/python protos/generate.py --check
	$(BIN)/python docs/generate.py --check
	@$(BIN)/python protos/generate.py --image $(IMAGE)
	$(BIN)/buf lint $(IMAGE)
	$(BIN)/buf breaking $(IMAGE) --against protos/baseline.binpb
	$(BIN)/python -m tests.support.checks.migrations
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec deploy/compose.yaml
	@for overlay in single production; do \
	  $(BIN)/kubectl kustomize deploy/kubernetes/overlays/$$overlay > $(VENV)/$$overlay.yaml && \
	  $(BIN)/kubernetes-validate --strict --quiet $(VENV)/$$overlay.yaml > $(VENV)/$$overlay.found || { cat $(VENV)/$$overlay.found; exit 1; }; \
	  ! grep -v "Couldn't find schema for kind Cluster with" $(VENV)/$$overlay.found || exit 1; done
	$(BIN)/check-jsonschema --quiet --schemafile tests/support/checks/cluster.schema.yaml deploy/kubernetes/overlays/production/databases.yaml
	$(BIN)/check-jsonschema --quiet --schemafile tests/support/checks/nats-values.schema.yaml deploy/kubernetes/overlays/production/nats-values.yaml

format: $(DEV_STAMP)  ## make the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(DEV_STAMP)  ## generate the code of every .proto
	$(BIN)/python protos/generate.py

migration: $(DEV_STAMP)  ## write the migration of the query tables that no migration makes yet
	@$(BIN)/python -m read_service.migrations.draft

docs: $(DEV_STAMP)  ## generate the reference pages that follow from the code
	$(BIN)/python docs/generate.py

baseline: $(DEV_STAMP)  ## take the contracts as they are for what buf breaking compares with
	$(BIN)/python protos/generate.py --image protos/baseline.binpb

# The peer's environment is made unless the rows that are named, by how they begin, all do without it.
ROWS_ALONE := aggregate% lone% unary% send% pipeline% stream% catch% whole% gathering% fairness% overload% heal% \
  get% list% freshness% rebuild% watch% --list
PEER_IF_NEEDED = $(if $(filter transfers%,$(ARGS)),$(PEER),$(if $(filter $(ROWS_ALONE),$(ARGS)),,$(PEER)))

bench: $(DEV_STAMP)  ## measure against the bare ceilings, DBOS and Restate; writes out/bench.json
	@$(if $(PEER_IF_NEEDED),$(MAKE) peer,:)
	@$(BIN)/python -m tests.bench $(ARGS)

peer: $(PEER)  ## the environment of DBOS and Restate, which the bench measures against

# What Foldline is measured against stays out of its own environment.
$(PEER): bench.lock tests/bench/package-lock.json
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip install --disable-pip-version-check --quiet --require-hashes --no-deps \
	  --only-binary :all: -r bench.lock
	@cp tests/bench/package.json tests/bench/package-lock.json .venv-bench/
	@if command -v npm >/dev/null; then cd .venv-bench && npm ci --ignore-scripts --no-audit --no-fund --silent; \
	  else echo "npm is not there: the rows against Restate will fail" >&2; fi
	@touch $@

UV_COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --only-binary :all:

wheels: $(STAMP)  ## download what the images install, for a build without a network
	@mkdir -p out/wheels
	@for lock in requirements.lock deploy/mail.lock; do \
	  $(BIN)/python -m pip download --disable-pip-version-check --quiet --require-hashes --no-deps --only-binary :all: \
	  -r $$lock -d out/wheels; done

lock:  ## resolve the dependencies anew; needs uv
	$(UV_COMPILE) pyproject.toml -o requirements.lock
	$(UV_COMPILE) pyproject.toml --extra embedded --extra build -o local.lock
	$(UV_COMPILE) pyproject.toml --extra embedded --extra build --extra dev -o dev.lock
	$(UV_COMPILE) deploy/mail.in -o deploy/mail.lock
	$(UV_COMPILE) tests/bench/peer.in -o bench.lock

clean:  ## remove what was made, the data of `make dev` too
	rm -rf $(VENV) .venv-bench .foldline out dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, from the locks: what runs first, then what develops. A stamp is made last, so an interrupted installation
# is begun again. Not compiled: most of it is never imported by a demo, and what is imported is compiled then.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --require-hashes --no-deps --only-binary :all: --no-compile
COUNT = awk '/^Collecting/ {n++; printf "\r  %d packages found", n; fflush()} \
             /^Installing collected/ {printf "\r  %d packages, installing ...", n; fflush()} END {print "\r  " n+0 " packages installed.      "}'

$(STAMP): local.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Foldline needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making the environment in $(VENV), from local.lock: about half a minute, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "Could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(INSTALL) --progress-bar off -r local.lock | $(COUNT)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(DEV_STAMP): dev.lock $(STAMP)
	@echo "Adding what tests and checks need, from dev.lock: about half a minute, once."
	@$(INSTALL) --progress-bar off -r dev.lock | $(COUNT)
	@touch $@
