# `make demo` trains a small reasoning model and a small language model, and shows both. `make test` checks the style and
# runs all tests. Both install what they need at the first call: into .venv, or, if an environment with a CUDA or ROCm build of
# torch is active, into that environment, without replacing its torch or any package it already has.
PYTHON ?= python3
ifeq ($(shell $(PYTHON) -c "import torch; print(bool(torch.version.cuda or torch.version.hip))" 2>/dev/null),True)
PY := $(PYTHON)
else
PY := .venv/bin/python
endif

demo: tasks/loops/votes/meta.json data/stdlib/meta.json
	@echo '== 1 of 4, 2 minutes: train a reasoning model. Watch the solution of a held-out problem every 200 steps.'
	$(PY) train.py config/demo_loops.py
	@echo '== 2 of 4, 5 seconds: it solves a problem with Markovian RSA; the solution is longer than its budget of 41 tokens.'
	$(PY) rsa.py --ckpt=runs/demo_loops --question='3x:a-2b*7c+3d+4=5' --show=True
	@echo '== 3 of 4, 30 seconds: its accuracy on 64 held-out problems of 25 to 32 steps.'
	$(PY) evaluate.py --ckpt=runs/demo_loops --split=hard --problems=64
	@echo '== 4 of 4, 75 seconds: train a small language model on the source of the standard library, and sample from it.'
	$(PY) train.py config/demo.py
	$(PY) sample.py --ckpt=runs/demo --prompt='    def __init__(self' --max_new_tokens=45 --temperature=0.5 --seed=2

# Two test files at a time, one thread each: the tests' tensors are too small to gain from more threads.
test: environment
	$(PY) -m ruff check -q
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist=loadfile

# A smoke test of the benchmark on a tiny model; its timings are not meaningful.
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
