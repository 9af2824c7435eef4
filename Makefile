# The two commands: `make demo` runs the main job on an embedded corpus, `make test` passes the tests. Both make .venv.
PYTHON ?= python3.11
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export RAY_DATA_DISABLE_PROGRESS_BARS ?= 1

.PHONY: demo peers test test-chaos studies lint clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/medim-ray prepare --config configs/sources/phantom.yaml source.num_images=480 out=demo/shards
	$(BIN)/medim-ray pretrain --config configs/demo-medim-vit_tiny-2w-z1.yaml data.shards=demo/shards run.dir=demo/run
	$(BIN)/medim-ray probe run=demo/run
	$(BIN)/medim-ray masks run=demo/run out=demo/masks.html
	$(BIN)/medim-ray report demo/run

# What benchmarks/stream.py is measured against: an environment over ours that holds nothing but the peers.
# benchmarks/dino_step.py: lightly-train in an environment of its own, since its versions are not ours.
PEERS := webdataset mosaicml-streaming braceexpand brotli catalogue cramjam python-snappy zstd simplejpeg
peers: .venv/installed
	$(PYTHON) -m venv .venv-peers
	cd .venv-peers/lib/python3*/site-packages && echo $(CURDIR)/.venv/lib/python3*/site-packages > ours.pth
	.venv-peers/bin/pip install --quiet --no-deps $(PEERS)
	$(PYTHON) -m venv .venv-lightly
	.venv-lightly/bin/pip install --quiet lightly-train

test: .venv/installed
	$(BIN)/pytest -m "not chaos"

test-chaos: .venv/installed
	$(BIN)/pytest -m chaos

# The small studies on phantoms, one after the other; hours on two cores. Each goes on from where it was ended, and its
# tables come to jobs/results as soon as it is done.
STUDIES := mask_ratio resolution initialisation data_quantity compute terms workers_zero compare
studies: .venv/installed
	$(BIN)/medim-ray prepare --config configs/sources/phantom.yaml source.num_images=480 out=shards/phantoms
	$(BIN)/medim-ray prepare --config configs/sources/phantom.yaml source.num_images=4000 out=shards/phantoms4k
	@for name in $(STUDIES); do \
		if [ $$name = mask_ratio ]; then words="sweep --config configs/sweeps"; else words="ablate --config configs/studies"; fi; \
		case $$name in data_quantity|compute) of=4k;; *) of=;; esac; \
		$(BIN)/medim-ray $$words/$$name-phantoms.yaml shards=shards/phantoms$$of runs=studies/runs$$of || exit 1; \
		mkdir -p jobs/results/$$name-phantoms; \
		(cd studies/$$name-phantoms && cp *.json *.csv report.html ../../jobs/results/$$name-phantoms/); \
	done
	$(BIN)/python benchmarks/learning.py shards/phantoms studies/learning
	$(BIN)/python -m benchmarks.dino_learning shards/phantoms studies/dino_learning
	mkdir -p jobs/results/learning
	cp studies/learning/learning.md jobs/results/learning/learning-tables.md  # learning.md is these tables with what they say
	cp studies/dino_learning/dino_learning.md jobs/results/learning/dino_learning-tables.md

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-peers .venv-lightly .mypy_cache .ruff_cache .hypothesis build *.egg-info demo
