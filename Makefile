# The virtual environment's tools go first on PATH: DeepSpeed looks there for ninja.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VLLM_NO_USAGE_STATS := 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-families test-gpu lint unit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## create .venv with the pinned CPU stack (quick when nothing changed)
	@requirements/install.sh

quickstart: setup ## make the tiny world, train both stages on the CPU, write a report
	.venv/bin/python recipes/tiny/make_data.py --out data/tiny
	.venv/bin/opd launch recipes/tiny/1_warmstart.yaml
	.venv/bin/opd launch recipes/tiny/2_xopd.yaml run.dir=runs/quickstart/xopd
	.venv/bin/opd report runs/quickstart/warmstart runs/quickstart/xopd --out runs/quickstart

# In the order of the folders, not by number of tests: else long files with few tests come last, and one worker idles.
test: lint ## lint, then every test
	.venv/bin/pytest tests -n 2 --dist loadfile --no-loadscope-reorder

test-families: setup ## every speech LLM family against real vLLM and ZeRO-3, on small random checkpoints (20 minutes)
	.venv/bin/opd families --check

test-gpu: ## the tests that need a GPU, with the installed environment (docs/cluster.md); skipped, with reasons, without one
	python3 -m pytest tests/gpu -s

lint: setup ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy opd

unit: setup ## the quick tests: two minutes
	.venv/bin/pytest tests/unit -m "not processes" -n 2 --dist loadfile --no-loadscope-reorder

clean: ## remove .venv, caches and build leftovers; keeps data/ and runs/
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './data/*' -not -path './runs/*' -prune -exec rm -rf {} +
