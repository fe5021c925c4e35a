# Everything a clone can do. Needs Python 3.10 to 3.13, git and make; the rest comes by itself into .venv and the
# user's cache folder. PYTHON=/path/to/python chooses another Python; ARGS="-k name" goes to pytest.

VENV := $(or $(EDGELAM_VENV),.venv)
# Not slow, and nothing that needs root, a board, a browser or a container: what `make test` promises anywhere.
FAST := not (lab or install or board or browser or slow)
# What edgelam remembers between runs stays in the clone.
export EDGELAM_STATE ?= $(CURDIR)/.edgelam/state
# Hundreds of processes are started here, four at a time: what they import is compiled once, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test check bench bundle clean

help:
	@echo "make demo               four virtual boards answer a prompt together: no root, no boards, no broker needed"
	@echo "make test               set up and run the tests (ARGS=... goes to pytest)"
	@echo "make check              lint, format, types, import contracts"
	@echo "make bench AREA=x       run one benchmark: $(basename $(notdir $(filter-out %/__init__.py %/report.py %_peers.py,$(wildcard benchmarks/*.py))))"
	@echo "make bundle             an offline bundle for a board in dist/ (BUNDLE='--python 3.11 --machine aarch64')"
	@echo "make clean              remove what was made in this clone (the user's cache stays)"

demo:
	@tools/setup.sh demo
	@$(VENV)/bin/edgelam demo $(ARGS)

test:
	@tools/setup.sh dev
	@for model in smollm2 minilm; do $(VENV)/bin/edgelam model fetch $$model --yes || \
		echo "make: no model weights; the tests that need them say so and are skipped" >&2; done
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT INT TERM && \
		TMPDIR="$$scratch" $(VENV)/bin/python -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder -m "$(FAST)" $(ARGS)

check:
	@tools/setup.sh dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench:
	@test -f "benchmarks/$(AREA).py" || { echo "make: no benchmark '$(AREA)'; try: make help" >&2; exit 2; }
	@tools/setup.sh dev
	@$(VENV)/bin/python -m benchmarks.$(AREA) $(ARGS)

bundle:
	@tools/setup.sh demo
	@$(VENV)/bin/python tools/bundle.py $(BUNDLE)

clean:
	rm -rf .venv .venv-* .edgelam build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
