# Two commands do everything: `make train` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: train test test-real lint wheel clean

train: $(STAMP)  ## the main job: SFT, reward model, PPO and report on real human ratings
	$(BIN)/lit-rlhf pipeline experiment=human_ratings

test: $(STAMP)  ## all tests, in as many processes as there are cores; nothing is downloaded but the packages
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n logical --maxprocesses=8 --dist worksteal

test-real: $(STAMP)  ## tests on the real data and models, on a local Ray, and of bitsandbytes
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray,bnb]'
	$(BIN)/python -m pytest -q -m real

lint: $(STAMP)
	$(BIN)/ruff check .

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist
