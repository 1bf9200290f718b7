# Two commands: `make demo` and `make test`. Both set everything up first, in .venv or in VENV=path.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
UV := 0.13.9
PIP_AUDIT := 2.10.1

.PHONY: setup export-setup examples-setup lock audit demo seeds test quick lint format bench bench-training bench-eval bench-data bench-soups bench-large bench-probe bench-analysis costs results data pretrain clean help gpu-check
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/'

# The stamp holds the requirements it was made from, so that an environment shared by clones is renewed when they differ.
# Of the text benchmark the images need nothing, so a registry that does not give it stops no one.
# LOCKED=1 installs what requirements.lock says, each file with the hash that it had when the lock was made.
# On a terminal pip shows what it downloads; a log has only what goes wrong.
QUIET := $(shell test -t 2 || echo --quiet)
REQUIREMENTS := $(if $(LOCKED),--require-hashes -r requirements.lock,-r requirements.txt)

setup:  ## the environment, from requirements.txt and requirements-text.txt; instant when it is there
	@cat requirements.txt requirements-text.txt | cmp -s - $(VENV)/.requirements || { \
	  $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	    || { echo "error: Python 3.10 to 3.13 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; } \
	  && $(PYTHON) configs/first_contact.py $(VENV) || exit 2; \
	  echo "setting up $(VENV), once; torch is large"; \
	  $(PYTHON) -m venv $(VENV) \
	  && $(RUN) -m pip install $(QUIET) --disable-pip-version-check $(REQUIREMENTS) \
	  && $(RUN) -m pip install $(QUIET) --disable-pip-version-check --no-deps -r requirements-text.txt \
	  && { $(RUN) -m tasks.sentiment.fetch || true; } \
	  && cat requirements.txt requirements-text.txt > $(VENV)/.requirements; }

export-setup: setup  ## what python -m soups.experiment.export to=onnx needs: requirements-export.txt, 120 MB
examples-setup: setup  ## what examples/ and tests of callbacks and adapters need beside: requirements-examples.txt, 70 MB
export-setup examples-setup: %-setup:
	@cmp -s requirements-$*.txt $(VENV)/.requirements-$* || { \
	  $(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-$*.txt \
	  && cp requirements-$*.txt $(VENV)/.requirements-$*; }

demo: setup  ## fine-tune a sweep, make soups, write Table 3 and Figure 1
	@$(RUN) reproduce.py experiment=demo

seeds: setup  ## the demo with three sweep seeds
	@$(RUN) reproduce.py experiment=demo_seeds

test: setup lint  ## lint, types and all tests
	@$(MAKE) --no-print-directory export-setup || echo "onnx cannot be installed here: tests that need it are skipped" >&2
	@$(MAKE) --no-print-directory examples-setup || echo "accelerate, optuna, lightning and peft cannot be installed here: tests that need them are skipped" >&2
	@$(RUN) -m pytest

quick: setup  ## all tests but the slow ones: pipelines, pools, killed processes, what takes seconds
	@$(RUN) -m pytest -m "not slow"

# The lock is made for all platforms and Pythons at once; index lines would tie it to one registry.
lock: setup  ## requirements.lock anew from requirements.txt, with hashes (needs a registry)
	@$(RUN) -m pip install --quiet --disable-pip-version-check uv==$(UV) \
	&& $(RUN) -m uv pip compile --quiet --universal --generate-hashes --no-header --no-emit-index-url --python-version 3.10 \
	  --no-annotate requirements.txt --output-file requirements.lock

audit: setup  ## known vulnerabilities of what requirements.lock installs (asks a public advisory database)
	@$(RUN) -m pip install --quiet --disable-pip-version-check pip-audit==$(PIP_AUDIT) \
	&& $(RUN) -m pip_audit --strict --require-hashes --disable-pip --requirement requirements.lock

gpu-check: setup  ## on a machine with GPUs: every shipped combination trains there; speed and memory of each network
	@$(RUN) -m tests.test_shipped_rows

lint: setup  ## ruff and mypy
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check --quiet . && $(RUN) -m mypy

format: setup  ## mend what ruff can
	@$(RUN) -m ruff check --fix . && $(RUN) -m ruff format .

bench: setup  ## all benchmarks, and a table of what they are measured against
	@$(RUN) -m benchmarks.all

bench-training: setup  ## time of a training step beside a bare loop's, and of an average along a run
	@$(RUN) -m benchmarks.training && $(RUN) -m benchmarks.along

bench-data: setup  ## images a second from JPEG files beside torchvision and timm, one core each
	@$(RUN) -m benchmarks.data

bench-eval: setup  ## several models on one split, each image decoded once
	@$(RUN) -m benchmarks.evaluation

bench-soups: setup  ## time and memory of averaging, learned soups and ensembles beside others; MERGEKIT=python of an environment with it
	@$(RUN) -m benchmarks.soups $(if $(MERGEKIT),--mergekit-python $(MERGEKIT)) && $(RUN) -m benchmarks.greedy && $(RUN) -m benchmarks.learned && $(RUN) -m benchmarks.ensembles

bench-large: setup  ## time and memory of soups of 7 B parameters beside mergekit: 55 GB of disk; BENCH_FOLDER=dir, MERGEKIT=python
	@$(RUN) -m benchmarks.large $(if $(BENCH_FOLDER),--folder $(BENCH_FOLDER)) $(if $(MERGEKIT),--mergekit-python $(MERGEKIT))

bench-probe: setup  ## fitting a linear probe beside scikit-learn
	@$(RUN) -m benchmarks.probe

bench-analysis: setup  ## time and memory of the loss's second derivative along a line beside Hessian-vector products
	@$(RUN) -m benchmarks.curvature

costs: setup  ## what the paper's experiments take, an estimate; and greedy on several workers, from the authors' decisions
	@HF_HUB_OFFLINE=1 $(RUN) -m slurm.plan all gpu=h100 out=slurm/costs.csv force=true
	@$(RUN) -m benchmarks.schedule

results: seeds  ## renew the committed numbers in results/measured
	@$(RUN) -m analysis experiment=demo_seeds paths.results=results/measured

data: setup  ## rebuild the embedded benchmark from its sources (needs npm)
	@$(RUN) -m pip install --quiet -r requirements-build.txt && $(RUN) -m embedded.build

pretrain: setup  ## rebuild the embedded model from its sources (needs npm)
	@$(RUN) -m pip install --quiet -r requirements-build.txt && $(RUN) -m embedded.pretrain

clean:  ## delete runs and caches, not the environment
	rm -rf runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
