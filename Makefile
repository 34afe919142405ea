# The habits. `make demo` and `make test` work in a clean checkout; both go through `make setup`.
.PHONY: setup demo test lint docs bench leaderboard leaderboard-vq verify wheels generate clean
.DEFAULT_GOAL := test

PY := .venv/bin/python
PROJECTS := core/pyproject.toml $(wildcard plugins/*/*/pyproject.toml)
METHODS ?= $(shell $(PY) -c "import tersor; print(*sorted({m['name'] for m in tersor.available() if m['family'] != 'reference'}))")
export OMP_NUM_THREADS ?= 1

setup: .venv/.ready

.venv/.ready: tools/setup.sh tools/requirements.txt $(PROJECTS)
	@sh tools/setup.sh

demo: setup
	@$(PY) -m demo

test: setup
	$(PY) -m pytest -n 2 --dist loadgroup

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) tools/generate.py --check

generate: setup
	$(PY) tools/generate.py

docs: setup
	@.venv/bin/uv pip install --quiet --python $(PY) -r docs/requirements.txt
	$(PY) tools/generate.py
	$(PY) -m mkdocs build --strict --quiet --site-dir site

bench: setup
	@$(PY) -m bench $(ARGS)

# peers that are missing give a row that says so: .venv/bin/uv pip install -r bench/requirements.txt
leaderboard: setup
	@$(PY) -m bench.leaderboard $(ARGS)

# ARGS=--quick takes a few minutes
leaderboard-vq: setup
	@$(PY) -m bench.leaderboard_vq $(ARGS)

verify: setup
	@for m in $(METHODS); do echo "== $$m"; $(PY) -m tersor verify $$m --record docs/evidence || true; done

wheels: setup
	@rm -rf dist
	@for p in $(dir $(PROJECTS)); do .venv/bin/uv build --quiet --wheel --out-dir dist $$p || exit 1; done
	@ls dist | wc -l

clean:
	rm -rf .venv dist site demo-out
