"""Tables of Markovian RSA (rsa.py) on the loops task: one model's, and three experiments that train their models first.
From the project's root:

    python -m data.loops.evaluate --ckpt=runs/loops --split=hard      one model; more settings: those of TableConfig
    python -m data.loops.evaluate main            RSA against single rollouts and lone chains, at four lengths
    python -m data.loops.evaluate aggregation     the same training with and without aggregation examples, under RSA
    python -m data.loops.evaluate trim            ap, truncate and drop at a context that holds half of a long trace

The settings of an experiment are those of ExperimentConfig, say --seeds=1 --problems=50 --steps=100 for a first look. Its
table has the mean over the training seeds and, in brackets, each of them. Every training takes minutes; the runs stay in
runs/loops_experiments, and one that is there is not repeated.
"""
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import configurator
from data.loops.prepare import LoopsConfig, prepare_loops
from data.loops.task import LENGTHS, STEP, rounds_needed, solve, test_problems
from rsa import RSAConfig, load_speaker, markovian_rsa, mean_ci95, sampler, score

ROOT = Path(__file__).resolve().parents[2]
BUDGET, TAIL = 41, 10               # tokens: one value and 8 steps; the last 2 steps
