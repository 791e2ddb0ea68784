# Everything that one types here. Targets run in the environment of PYTHON where this checkout is installed in it with
# its tools; elsewhere in VENV, which is made first. Another Python: make test PYTHON=python3.13

SHELL := bash
PYTHON ?= python3
VENV ?= .venv

# The programs of PYTHON's environment, or nothing. -P: the folder `fedtune` beside this file is no installation.
ACTIVE := $(shell $(PYTHON) -P -c "import os, sys, importlib.util as u; u.find_spec('pytest') \
	and os.path.samefile(u.find_spec('fedtune').origin, 'fedtune/__init__.py') and print(os.path.dirname(sys.executable))" 2>/dev/null)
BIN := $(or $(ACTIVE),$(abspath $(VENV))/bin)
READY := $(if $(ACTIVE),,$(VENV)/ready)
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz faults load lint bench bench-deploy stubs

help:
	@echo "make <target>, one of:"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST)

demo: $(READY)  ## fine-tune a small language model across eight clients on this machine, into runs/demo
	fedtune simulate demo --out runs/demo --overwrite

# A file of tests stays in one process: what it starts (Flower, browsers) is started once. Files go in their order, in which those
# that wait for processes stand between those that compute. Who names some tests wants those alone.
WORKERS ?= 2
FUZZ = OMP_NUM_THREADS=1 python -m tests.fuzz --seconds
test: $(READY)  ## all tests, and the fuzzer for 20 seconds; some of them: make test ARGS="-k gate"
	OMP_NUM_THREADS=1 pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)
	$(if $(filter -k -m tests/%,$(ARGS)),,$(FUZZ) 20)

SECONDS ?= 600
fuzz: $(READY)  ## bytes for the decoders, messages for every door; make fuzz SECONDS=3600, or COUNT=1000000 messages alone
	$(if $(COUNT),$(FUZZ:seconds=count) $(COUNT),$(FUZZ) $(SECONDS))

faults: $(READY)  ## kill, starve and damage runs, a few of each kind; an hour, into docs/reliability.md: make faults FULL=1
	OMP_NUM_THREADS=1 python -W ignore -m simulations.faults $(if $(FULL),--full --write docs/reliability.md) $(ARGS)

load: $(READY)  ## 10,000 simulated clients, then 50 nodes with all their processes: time and memory; about half an hour
	OMP_NUM_THREADS=1 python -W ignore -m simulations.load simulated $(ARGS)
	OMP_NUM_THREADS=1 python -W ignore -m simulations.load sockets

lint: $(READY)  ## format, lint, types, and the direction of the imports; changes nothing
	ruff format --check .
	ruff check .
	mypy
	lint-imports

bench: $(READY)  ## ratios of time and memory, measured side by side; about ten minutes
	python -m simulations.bench

bench-deploy: $(READY)  ## seconds a round over real sockets, beside a stock Flower app; about five minutes
	python -m simulations.bench_deploy

# grpcio-tools and what it generates must not be newer than the oldest grpcio and protobuf in pyproject.toml.
stubs:  ## write client/trainer_pb2*.py anew from client/trainer.proto
	tools=$$(mktemp -d) && trap 'rm -rf "$$tools"' EXIT && $(PYTHON) -m venv "$$tools" && \
	"$$tools/bin/pip" install --quiet "grpcio-tools==1.71.2" "setuptools<81" && \
	"$$tools/bin/python" -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. client/trainer.proto

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -e ".[dev,ray]"
	@touch $@
