# Two commands: `make demo` trains a model that answers, `make test` runs the tests. Both create .venv first,
# from the pinned lock; a second run installs nothing.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO := output/demo

.PHONY: demo test check format site notebooks catalogue lock clean

.venv/ready: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv/ready-to-test: .venv/ready requirements-test.lock
	$(PIP) install --quiet -r requirements-test.lock
	touch $@

.venv/ready-for-site: .venv/ready requirements-site.lock
	$(PIP) install --quiet -r requirements-site.lock
	touch $@

demo: .venv/ready
	@echo "== 1/5 vocabulary ==";  $(BIN)/minigpt vocab --data data/data.jsonl --output data/vocab.json
	@echo "== 2/5 split ==";       $(BIN)/minigpt split --input data/data.jsonl --train_ratio 0.8
	@echo "== 3/5 statistics ==";  $(BIN)/minigpt stats --train_data data/train.jsonl --vocab_path data/vocab.json
	@echo "== 4/5 training ==";    $(BIN)/minigpt train --recipe qa-cpu --output $(DEMO) --overwrite --keep_every 105
	@echo "== 5/5 evaluation on questions it never saw =="; $(BIN)/minigpt eval --model $(DEMO)/best --data data/val.jsonl --show 10
	@echo ""
	@echo "Three commands to try next:"
	@echo "  $(BIN)/minigpt generate --model $(DEMO)/best"
	@echo "  $(BIN)/minigpt generate --model $(DEMO)/best --question 四川省的省会是哪里？"
	@echo "  $(BIN)/minigpt train --dry_run --recipe document"

# OMP_NUM_THREADS=1: two test processes on two cores; more threads would only wait for each other
test: .venv/ready-to-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/ready-to-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/ready-to-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documents as a site in both languages: build/site/index.html
site: .venv/ready-for-site
	$(BIN)/python docs/site/build.py build/site

# The pages with Python as Jupyter notebooks: build/notebooks/
notebooks: .venv/ready
	$(BIN)/python docs/notebooks.py build/notebooks

# The terminal's Chinese, after a change of a message: names the texts without a translation, and compiles it
catalogue: .venv/ready-to-test
	$(BIN)/python tests/test_language.py

# Resolve pyproject.toml anew: the newest versions that fit, recorded exactly.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet "setuptools>=77" torch==2.13.0
	build/lock/bin/python -m pip install --quiet ".[tensorboard,plot]"
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude minigpt | sed 's/+cpu//' > requirements.lock
	build/lock/bin/python -m pip install --quiet ".[test,datasets,excel,gguf,wandb]"
	(echo "-r requirements.lock"; build/lock/bin/python -m pip freeze --all --exclude pip --exclude minigpt \
	  | sed 's/+cpu//' | grep -vxFf requirements.lock) > requirements-test.lock
	cat requirements.lock requirements-test.lock | grep -v "^-r" > build/lock/held
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['site'], \
	  sep='\n')" > build/lock/site
	$(PYTHON) -m venv build/lock/for-site
	build/lock/for-site/bin/python -m pip install --quiet -c build/lock/held -r build/lock/site
	(echo "-r requirements.lock"; build/lock/for-site/bin/python -m pip freeze --all --exclude pip --exclude setuptools \
	  | grep -vxFf requirements.lock) > requirements-site.lock

clean:
	rm -rf .venv build output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
