PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-long lint bench clean

demo: $(STAMP)  ## the whole line on real images: sweep, promote, serve, recognise, group and name over HTTP, test
	$(BIN)/python examples/demo.py $(ARGS)

# A thread for each process: more would wait for one another, actively.
test: export OMP_NUM_THREADS = 1
test: $(STAMP)  ## all tests, two files of them at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(STAMP)  ## what takes minutes: ten thousand mutated requests, replicas killed again and again
	$(BIN)/python -m pytest -m long

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(STAMP)  ## speed and quality against peers, as ratios; minutes
	$(BIN)/python benchmarks/metrics.py
	$(BIN)/python benchmarks/detectors.py
	$(BIN)/python benchmarks/openmax.py
	$(BIN)/python benchmarks/jacobian.py
	$(BIN)/python benchmarks/discovery/quality.py
	$(BIN)/python benchmarks/discovery/scale.py
	$(BIN)/python benchmarks/discovery/enrolment.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/gallery.py
	$(BIN)/python benchmarks/serving.py

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
