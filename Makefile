# `make demo` trains a small language model and a small reasoning model, and shows both. `make test` checks the style and runs
# all tests. Both install what they need at the first call: into .venv, or, if an environment with a CUDA or ROCm build of
# torch is active, into that environment, without replacing its torch or any package it already has.
PYTHON ?= python3
ifeq ($(shell $(PYTHON) -c "import torch; print(bool(torch.version.cuda or torch.version.hip))" 2>/dev/null),True)
PY := $(PYTHON)
else
PY := .venv/bin/python
endif

demo: data/stdlib/meta.json tasks/loops/votes/meta.json
	$(PY) train.py config/demo.py
	$(PY) sample.py --ckpt=runs/demo --prompt='    def __init__(self' --max_new_tokens=45 --temperature=0.5 --seed=2
	$(PY) train.py config/loops.py
	$(PY) evaluate.py --ckpt=runs/loops --split=hard

# Two test files at a time, one thread each: the tests' tensors are too small to gain from more threads.
test: environment
	$(PY) -m ruff check -q
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist=loadfile

# The benchmark on a tiny model, to see that it runs; its figures mean nothing.
bench-quick: environment
	$(PY) bench.py --quick=True

# The pictures of README and RESULTS.md, from evidence/results/*.csv.
pictures: environment
	$(PY) -m pip install -q 'matplotlib>=3.8'
	$(PY) -m evidence.pictures

data/stdlib/meta.json: | environment
	$(PY) -m data.stdlib.prepare

tasks/loops/votes/meta.json: | environment
	$(PY) -m tasks.loops.prepare

ifeq ($(PY),.venv/bin/python)
environment: .venv/ready

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch .venv/ready
else
environment:
	sed '/^torch==/d; s/==[^ ]*//' requirements.txt | $(PY) -m pip install -q -r /dev/stdin
endif

.PHONY: demo test bench-quick pictures environment
