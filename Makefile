# make serve    install into .venv, then start a local cluster (Ray, one prefill worker, one decode worker, the router)
# make test     install, then run the tests (12 minutes at most); make test-long adds full counts and soaks
# make check    format, lint, types, layers, sizes; .ci/run calls "make check test sim"
# make sim      300 simulated histories with faults, and whether they showed what they are to show
# make proto    write the gRPC stubs anew from proto/; make bench runs a load against a cluster of its own

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

# the first Python that is new enough
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# names of new packages in one line while pip works, silence when everything is there already
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PIP_NEWS := awk '/^ *(ERROR|error)/ {bad=1} bad {print; next} /^Collecting/ {printf "%s ", $$2; n++; fflush()} \
  /^Installing collected/ {printf "\ninstalling them"; fflush()} END {if (n) print ""}'

SERVE_ARGS ?=
TEST_ARGS ?=
TEST_LIMIT_S ?= 720
BENCH_ARGS ?=
SIM_ARGS ?= --seeds 300
PROTO_OUT ?= .
PROTOS := $(patsubst proto/%,cluster/rpc/pb/%,$(wildcard proto/*.proto))
TYPED := engine cluster neap.py

.PHONY: venv serve test test-long check sim proto bench

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "neap needs Python 3.11 or newer: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch (large, once)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)" 2>&1 | $(PIP_NEWS)
	@echo "installing neap and what it needs"
	@$(PIP) -e '.[dev]' 2>&1 | $(PIP_NEWS)
	@touch $@

serve: $(STAMP)
	@exec $(BIN)/neap serve $(SERVE_ARGS)

test: $(STAMP)
	timeout --signal=INT --kill-after=30 $(TEST_LIMIT_S) $(BIN)/python -m pytest $(TEST_ARGS)

test-long: $(STAMP)
	$(BIN)/python -m pytest -m "long or not long" $(TEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_repo.py

sim: $(STAMP)
	$(BIN)/neap sim $(SIM_ARGS)

proto: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -Icluster/rpc/pb=proto --python_out=$(PROTO_OUT) --pyi_out=$(PROTO_OUT) \
	  --grpc_python_out=$(PROTO_OUT) $(PROTOS)

bench: $(STAMP)
	$(BIN)/neap bench serve $(BENCH_ARGS)
