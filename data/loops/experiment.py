"""Experiments with the loops task, one command each; every training takes minutes, and a run that is there is not repeated.

    python data/loops/experiment.py main          Markovian RSA against single rollouts and lone chains, at four lengths
    python data/loops/experiment.py aggregation   the same training with and without aggregation examples, under RSA
    python data/loops/experiment.py trim          ap, truncate and drop at a context that holds half of a long trace

Settings: those of ExperimentConfig, say --seeds=1 --problems=50 --steps=100 for a first look.
Prints one table: for each row the mean over the seeds and, in brackets, the seeds one by one. All runs are in runs/loops_experiments.
"""

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))                                 # the repository's root, for `rsa`
import configurator
from data.loops.prepare import LoopsConfig, prepare_loops
from data.loops.task import LENGTHS, rounds_needed, test_problems
from rsa import RSAConfig, load_speaker, measure, rows_of_table
from configurator import pick_device


@dataclass
class ExperimentConfig:
    seeds: int = 3
    problems: int = 200
    recipe: str = 'config/loops.py' # by which the models are trained
    samples: int = 30_000           # of each kind, in the sets that `trim` prepares
    steps: int = 0                  # of a training run; 0: as many as the recipe says
    out: str = ''                   # folder of the runs
    splits: str = ''                # lengths to measure; '': those that the experiment is about
    device: str = 'auto'

    def __post_init__(self):
        for key, low in (('seeds', 1), ('problems', 1), ('samples', 1), ('steps', 0)):
            if getattr(self, key) < low:
                raise ValueError(f'{key} is {getattr(self, key)}, it must be at least {low}')
        RSAConfig(split=self.splits or 'hard')                # raises for a length that it does not know


def train(out, seed, config, *flags):
    """Train by the recipe into the folder out (train.py goes on where it was stopped) -> the model to measure."""
    flags = [f'--out_dir={out}', f'--seed={seed}', f'--device={config.device}', *flags]
    if config.steps:
        flags += [f'--max_steps={config.steps}']
    if subprocess.run([sys.executable, 'train.py', config.recipe, *flags], cwd=ROOT).returncode:
        raise ValueError(f'the training into {out} failed, for the reason above')
    return load_speaker(out, pick_device(config.device))


def prepare_once(out, **settings):
    if not (out / 'votes' / 'meta.json').exists():            # written last
        prepare_loops(LoopsConfig(out=str(out), **settings))


def report(rows):
    """rows: {(split, what): [an rsa.Row for each seed]} -> the table, printed."""
    print('\n| steps | what | mean of 16, % (seeds) | majority of 16, % (seeds) | generated tokens | longest prompt |')
    print('| --- | --- | --- | --- | --- | --- |')
    percent = lambda values: f'{100 * statistics.fmean(values):.1f} ({", ".join(f"{100 * v:.1f}" for v in values)})'
    for (split, what), measured in rows.items():
        print(f'| {"-".join(map(str, LENGTHS[split]))} | {what} | {percent([row.mean for row in measured])} | '
              f'{percent([row.majority for row in measured])} | {statistics.fmean(row.tokens for row in measured):,.0f} | '
              f'{max(row.longest for row in measured)} |')


def under_rsa(config, out, variants, splits):
    """RSA's table for each seed and variant, {label in the table: (folder of its runs, flags of its training)}."""
    rows = {}
    for seed in range(config.seeds):
        for label, (folder, flags) in variants.items():
            speaker = train(out / f'{folder}{seed}', seed, config, *flags)
            for split in (config.splits or splits).split():
                for row in rows_of_table(speaker, RSAConfig(problems=config.problems, seed=seed), split, 41, 10):
                    rows.setdefault((split, label + row.name), []).append(row)
    report(rows)


def main_table(config, out):
    """What `make demo` shows, for several training seeds and all lengths."""
    under_rsa(config, out, {'': ('with', [])}, ' '.join(LENGTHS))


def aggregation(config, out):
    """Without aggregation examples a model has never been shown tails, and does not know what to do with them. The models
    with them are those of `main`."""
    under_rsa(config, out, {'with: ': ('with', []), 'without: ': ('without', ['--dataset=data/loops/traces'])}, 'hard')


def trim(config, out, context=116):
    """Problems of 3 to 36 steps in windows of 116 tokens, which hold some 18 steps beside the question. One rollout has the
    rest of that context to answer in; Markovian RSA reads tails, so that all lengths can be answered in it."""
    rows = {}
    for rule in 'ap', 'truncate', 'drop':
        data = out / f'data_{rule}'
        sets = os.path.relpath(data, ROOT)                    # relative: a space in a path would end it
        prepare_once(data, context=context, rule=rule, traces=config.samples, votes=config.samples)
        for seed in range(config.seeds):
            speaker = train(out / f'{rule}{seed}', seed, config, f'--context={context}', '--batch_size=18',
                            f'--dataset={sets}/traces:0.5 {sets}/votes:0.5')
            for split in (config.splits or 'easy medium hard').split():
                problems, T = test_problems(split, config.problems), rounds_needed(LENGTHS[split][1], 41)
                settings = RSAConfig(seed=seed)
                for name, kwargs in (('one rollout', dict(candidates=1, rounds=0, tail=1)),
                                     (f'C=4, T={T}', dict(candidates=4, rounds=T, budget=41, tail=10))):
                    row = measure(speaker, problems, settings, f'{rule} {split}', **kwargs)
                    rows.setdefault((split, f'{rule}: {name}'), []).append(row)
    report(dict(sorted(rows.items(), key=lambda row: list(LENGTHS).index(row[0][0]))))


EXPERIMENTS = {'main': main_table, 'aggregation': aggregation, 'trim': trim}

if __name__ == '__main__':
    with configurator.one_line_errors('experiment.py', when_stopped='run the same command again to go on'):
        if len(sys.argv) < 2 or sys.argv[1] not in EXPERIMENTS:
            raise ValueError(f'name an experiment: {", ".join(EXPERIMENTS)}')
        config, = configurator.read(sys.argv[2:], ExperimentConfig)
        if sys.argv[1] != 'trim':                             # which prepares sets of its own
            prepare_once(ROOT / 'data/loops')
        EXPERIMENTS[sys.argv[1]](config, Path(config.out or ROOT / 'runs/loops_experiments').resolve())
