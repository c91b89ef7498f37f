# Each target sets itself up: a bare Debian or Ubuntu with python3 (>= 3.11), python3-venv and make is enough.
PYTHON ?= python3
DATA ?=
VENV := .venv
BIN := $(VENV)/bin
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help demo test test-long lint clean
help:
	@echo "make demo        three hospitals train one classifier on this machine (under 5 minutes)"
	@echo "make demo DATA=d the same on a real image set: an npz file or a folder with images and index.csv"
	@echo "make test        the tests (under 15 minutes); make test-long: the long ones"
	@echo "make lint        ruff and mypy"
	@echo "make bench-rounds  seconds and memory of a round, beside stock Flower (and NVFLARE when installed)"
	@echo "make bench-secagg  a secure sum, beside Flower's SecAgg+ and a bare keystream"
	@echo "make bench-ledger  entries a second into the ledger, in memory and on the disk, and sizes of its proofs"
	@echo "make bench-dp    clipping each patient's gradient, beside Opacus and beside training without"
	@echo "make bench-privacy  the same epsilon: pooled, shared noise, noise of each hospital, a hospital alone"
	@echo "make bench-at_work  200 private steps in the running federation, an agent killed half way, and in one process"
	@echo "make bench-feeding images a second in training, and how much of a step waits for them"
	@echo "make bench-imaging files a second, indexed and decoded, beside pydicom and MONAI"
	@echo "make bench-learning  real sets: hospitals alone, together and pooled (hours; may be broken off and started again)"

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m deploy.demo $(if $(DATA),--data "$(DATA)")

test: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile

test-long: $(VENV)/.ready
	$(BIN)/python -m pytest -m long

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-%: $(VENV)/.ready
	$(BIN)/python -m tests.bench.$*

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Regenerates the gRPC code after a change of agent.proto.
.PHONY: proto
proto: $(VENV)/.ready
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. client/agent/agent.proto
