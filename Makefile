# make demo   read English from the model in the box
# make test   prove everything
# make notebooks   open the notebooks in Jupyter
# Each makes .venv and installs what it needs, from nothing.

PYTHON ?= python3
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint bench notebooks docs clean

demo: .venv/demo
	$(BIN)/opt-np generate "It was a dark and stormy night, and" --do-sample --temperature 0.8 --top-p 0.95 --seed 1 --max-new-tokens 120

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
	PYTHONPATH=tests $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -p emulated_gpu -m "gpu and not large"

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: .venv/notebooks
	$(BIN)/jupyter lab notebooks

docs: .venv/test
	$(BIN)/python notebooks/make.py
	$(BIN)/python docs/make_api.py

bench: .venv/bench
	$(BIN)/opt-np bench cpu

# One stamp per set of extras; a change of setup.cfg installs again. Only what is imported is compiled to bytecode, when it is.
.venv/demo .venv/test .venv/bench .venv/notebooks: .venv/%: setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "opt-np needs Python 3.11 or later; name one with make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-compile --editable ".[$(subst demo,fast,$*)]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
