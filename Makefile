PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
UV := $(VENV)/bin/uv
READY := $(VENV)/.ready
OLDEST_READY := $(OLDEST)/.ready
INSTALL := pip install -q --compile-bytecode
INSTALLED_FROM := pyproject.toml setup.py

# Some hundred processes import the same libraries: they read the bytecode that one has written.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup lint test test-oldest test-all demo peers serving bench constraints clean

setup: $(READY)

# -b pins what builds the package, -c what it is installed with.
$(READY): $(INSTALLED_FROM) constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q "$$(grep '^uv==' constraints.txt)"
	$(UV) $(INSTALL) -p $(VENV)/bin/python -c constraints.txt -b constraints.txt -e ".[dev,demo]"
	touch $@

$(OLDEST_READY): $(INSTALLED_FROM) constraints-oldest.txt | $(READY)
	$(UV) venv -q --allow-existing -p $(VENV)/bin/python $(OLDEST)
	$(UV) $(INSTALL) -p $(OLDEST)/bin/python -c constraints-oldest.txt -b constraints-oldest.txt -e ".[dev]"
	touch $@

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

PYTEST := bin/pytest -q -n 2 --dist worksteal
# Where a library's versions matter: where adapters are put, what they do there, and their files.
ON_OLDEST := tests/sites tests/injection/test_traps.py tests/injection/test_invariants.py \
	tests/adapters/test_storage.py tests/adapters/test_storage_across_libraries.py

test: $(READY)
	$(VENV)/$(PYTEST) --durations=15

test-oldest: $(OLDEST_READY)
	$(OLDEST)/$(PYTEST) --durations=5 --pairs mechanisms $(ON_OLDEST)

# Every method with every encoder and every check, on the newest and the oldest versions: before a
# release, and after changes of mmadapters/injectors or mmadapters/methods. On two cores the matrix
# takes 9 minutes on the newest versions and 7 on the oldest; the rest is what `make test` runs, and
# one training on real data.
test-all: $(READY) $(OLDEST_READY)
	$(VENV)/$(PYTEST) --durations=15 --pairs all
	$(OLDEST)/$(PYTEST) --durations=15 --pairs all tests/sites tests/injection tests/adapters

demo: $(READY)
	$(VENV)/bin/mmadapters demo

serving: $(READY)
	$(VENV)/bin/python benchmarks/serving/run.py

# BENCH names the report and what else `mmadapters bench` is told: make bench BENCH="H100 --compile"
BENCH ?= CPU --device cpu --repeats 5

bench: $(READY)
	$(VENV)/bin/python benchmarks/bench/run.py $(BENCH)

peers: $(READY)
	$(VENV)/bin/python benchmarks/peers/run.py

# The newest and the oldest versions that pyproject.toml allows, to be committed once the tests pass.
constraints: $(READY)
	$(UV) pip compile -q --upgrade --no-header --no-annotate -p $(VENV)/bin/python \
		--extra dev --extra demo -o constraints.txt pyproject.toml
	$(UV) pip compile -q --upgrade --no-header --no-annotate -p $(VENV)/bin/python \
		--extra dev --resolution lowest-direct -o constraints-oldest.txt pyproject.toml

clean:
	rm -rf $(VENV) $(OLDEST) benchmarks/peers/.venv-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
