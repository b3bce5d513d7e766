# make demo    install autosft into .venv and tune the embedded demo
# make test    install what the tests need and run them all
# make quick   the tests that take no Ray and less than 2 s each: two minutes
# make thorough  the rest of the long tables, of which make test runs a sample (a quarter of an hour)
# make faults  kill every part of 20 studies, 220 times, and of ten services, 200 times; 3,000 interleavings of faults;
#              Slurm (two hours)
# make fuzz    damage every kind of file that autosft reads, at random (two minutes)
# make real    tune SmolLM2-135M-Instruct, which comes from the package index, and measure it (under an hour)
# make lint    ruff, mypy, and the layer check, the last two against an installed copy

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Built as their pyproject.toml or setuptools says, never by the installed one: old pip warns of that otherwise.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 -c constraints.txt
# Two workers on any machine: some tests measure, and training takes a core each.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

# What make test runs, beside its division by Ray.
USUAL := not thorough and not faults and not fuzz

# Libraries of optimizers, for the tests of them: in a folder of their own, since transformers imports what it
# finds, and importing bitsandbytes and torchao takes every process one to three seconds.
OPTIMIZERS := bitsandbytes torchao schedulefree torch-optimi galore-torch

.PHONY: demo test quick thorough faults fuzz real lint clean

demo: .venv/installed
	$(BIN)/autosft tune --hardware auto

test: .venv/installed-for-tests
	$(PYTEST) -n 2 --dist loadscope -m "not ray and $(USUAL)"
	$(PYTEST) -m "ray and $(USUAL)"

quick: .venv/installed-for-tests
	$(PYTEST) -n 2 --dist loadscope -m "not ray and not slow and $(USUAL)"

thorough: .venv/installed-for-tests
	$(PYTEST) -n 2 --dist loadscope -m "thorough and not ray"
	$(PYTEST) -m "thorough and ray"

faults: .venv/installed-for-tests
	$(PYTEST) -m faults -s

fuzz: .venv/installed-for-tests
	$(PYTEST) -m fuzz

real: .venv/installed-for-tests
	$(BIN)/python benchmarks/real_model.py --out build/real

lint: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml autosft profiles scheduler service studies workers
	bash tests/audit.sh
	rm -rf build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --target build/installed .
	cd build/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	  --cache-dir ../../.mypy_cache --package autosft
	cd build/installed && ../../$(BIN)/lint-imports --no-cache --config ../../pyproject.toml

clean:
	rm -rf .venv build

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no python3 found; autosft needs Python 3.11 or newer."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is too old; autosft needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "error: no virtual environment could be made; on Debian: apt install python3-venv"; exit 2; }

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e .
	touch $@

.venv/installed-for-tests: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev,serve,postgres,eval,gguf]' setuptools
	rm -rf .venv/optimizers
	$(INSTALL) --no-deps --target .venv/optimizers $(OPTIMIZERS)
	$(BIN)/python -P -m autosft.workers.tools.gguf_converter || echo "without it, its tests are skipped"
	touch $@ .venv/installed
