# Everything installs into .venv; nothing else on the machine is touched.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check install docs notebooks clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: install  ## train, judge an unseen task, write demo/report.html
	rm -rf demo
	$(BIN)/anatomaly demo --out demo

test: install  ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile  # a thread a worker: more would wait for each other

check: install  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

docs: .venv/.docs  ## the pages as a site, build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

notebooks: .venv/.docs  ## run docs/notebooks again and keep what they give
	rm -rf build/notebooks && mkdir -p build && cp -r docs/notebooks build/
	PYTHONWARNINGS=ignore $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level ERROR \
		--ExecutePreprocessor.record_timing=False build/notebooks/*.ipynb
	cp build/notebooks/*.ipynb docs/notebooks/

clean:
	rm -rf .venv build demo
