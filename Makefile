# `make demo` and `make test` need only make and Python 3.10 or newer; they keep everything in .venv.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed
CODE := timm_decor hub tests benchmarks examples docs/hooks.py timm_decor_door.py train.py validate.py

.DEFAULT_GOAL := help
.PHONY: demo test chaos test-lowest timm-tests zoo bench-cpu bench-gpu readme docs dist lint format clean help

demo: $(STAMP) ## train decor_resnet18 beside resnet18 on handwritten digits; print who won
	$(PY) train.py -c recipes/digits_resnet18.yaml --compare --output output/demo

test: lint ## lint, check types, run every test
	$(PY) -m pytest -q

test-lowest: ## run the tests on the oldest dependencies that pyproject.toml admits
	$(MAKE) VENV=.venv-lowest RESOLUTION=lowest-direct .venv-lowest/installed
	.venv-lowest/bin/python -m pytest -q

chaos: $(STAMP) ## kill train.py a hundred times at random moments; and start it twice at once; it must end with the same bits (6 minutes)
	PYTHONPATH=tests $(PY) tests/chaos.py --kills 100

timm-tests: $(STAMP) ## run timm's own model tests over the twins (20 minutes); writes docs/timm_contract.md
	$(PY) tests/timm_contract.py --workers 2 --page docs/timm_contract.md

zoo: $(STAMP) ## write docs/zoo.md, every twin with its memory
	$(PY) -m timm_decor.list --page docs/zoo.md

# The data are a folder with train*.parquet and test*.parquet (columns image and label), as the Hub has CIFAR-10.
DATA ?= ../shared/data/cifar10
STUDY := benchmarks/results/time_to_accuracy
bench-cpu: $(STAMP) ## time to accuracy on two CPU cores (40 minutes), beside the committed table; DATA=FOLDER
	rm -f output/bench_cpu.json
	$(PY) benchmarks/time_to_accuracy.py report --preset cpu --data-dir $(DATA) --json output/bench_cpu.json \
	  --tune-json $(STUDY)/cpu_cifar10_tune.json --compare $(STUDY)/cpu_cifar10.json $(BENCH)

# On a machine with a GPU; each FOLDER with train*.parquet and test*.parquet.
CIFAR10 ?= ../shared/data/cifar10
IMAGENETTE ?= ../shared/data/imagenette128
bench-gpu: $(STAMP) ## all GPU tables, as far as 25 minutes go; the same command goes on: CIFAR10=FOLDER IMAGENETTE=FOLDER
	$(PY) benchmarks/gpu.py --cifar10 $(CIFAR10) --imagenette $(IMAGENETTE) $(BENCH)

readme: $(STAMP) ## fill in the benchmark tables of README and docs and draw their pictures, from benchmarks/results
	$(PY) benchmarks/readme_tables.py

docs: $(STAMP) ## build the site into build/site, its links checked; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "build/site/index.html"

dist: $(STAMP) ## build wheel and sdist, check them in a fresh environment, with the tutorial (four minutes); they lie in dist/
	$(PY) tests/check_dist.py

lint: $(STAMP) ## ruff and mypy, changing nothing
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m mypy

format: $(STAMP) ## let ruff rewrite the code in the house style
	$(PY) -m ruff check --fix $(CODE)
	$(PY) -m ruff format $(CODE)

clean: ## remove the virtual environments, caches and build outputs; output/ stays
	rm -rf .venv .venv-lowest build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

# Redone when pyproject.toml changes. uv installs torch and the rest in seconds where pip takes minutes.
RESOLUTION ?= highest
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "timm_decor needs Python 3.10 or newer; '$(PYTHON)' is not: try make PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into $(VENV); the first time torch is downloaded, which is large"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check uv
	@$(VENV)/bin/uv pip install --quiet --python $(PY) --resolution $(RESOLUTION) -e '.[test]'
	@touch $@
