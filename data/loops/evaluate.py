"""Tables of Markovian RSA (rsa.py) on the loops task: of one model, and of experiments that train their models first.
From the project's root:

    python -m data.loops.evaluate --ckpt=runs/loops --split=hard     one model; settings: those of TableConfig
    python -m data.loops.evaluate main           RSA, single rollouts and lone chains, at four lengths
    python -m data.loops.evaluate aggregation    the same training with and without aggregation examples, under RSA
    python -m data.loops.evaluate trim           ap, truncate and drop at a context that holds half of a long trace

An experiment has the settings of ExperimentConfig, say --seeds=1 --problems=50 --steps=100 for a first look. It prints
one table: for each row the mean over the training seeds and, in brackets, the seeds one by one. Every training takes
minutes. The runs stay in runs/loops_experiments, and a finished one is not repeated.
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
from data.loops import task
from data.loops.prepare import LoopsConfig, prepare_loops
from data.problems import check_room, mean_ci95, score
from rsa import RSAConfig, load_speaker, markovian_rsa, sampler

ROOT = Path(__file__).resolve().parents[2]


# ---- the table of one model ----

@dataclass
class TableConfig(RSAConfig):       # all settings of rsa.py but `question` and `show`, and:
    split: str = 'hard'             # easy, medium, hard or deep: 3-7, 14-20, 25-32, 56-64 steps; several: 'easy hard'
    problems: int = 200             # of each split
    rows: int = 512                 # generated together: as many problems at a time as fit, but at least one

    def __post_init__(self):
        super().__post_init__()
        configurator.check_ranges(self, problems=(1, 10_000), rows=(1, None))
        if self.candidates > self.population:                   # found now, not after the first rows of a table
            raise ValueError(f'candidates is {self.candidates}: that many cannot be drawn from a population of '
                             f'{self.population}')
        unknown = [name for name in self.split.split() if name not in task.LENGTHS]
        if unknown or not self.split.split():
            raise ValueError(f'split is {self.split!r}, choose from {", ".join(task.LENGTHS)}')
        if self.question != '-' or self.show or self.server:
            raise ValueError('question, show and server are settings of rsa.py: a table is of many problems, made here')
        self.budget, self.tail = self.budget or 41, self.tail or 10             # as in rsa.py
        if self.tail > self.budget:
            raise ValueError(f'tail is {self.tail}, more than the budget of {self.budget} that it is the end of')


class Row(NamedTuple):
    """One method on the problems of one split."""
    name: str
    mean: float                     # as in rsa.score, over problems
    half: float                     # half the width of its 95 % interval
    majority: float
    best: float
    tokens: float                   # generated, a problem
    longest: int                    # prompt, in tokens
    seconds: float


def measure(speaker, problems, config, name, budget=None, **settings):
    """Let RSA with these settings of markovian_rsa solve all problems, some at a time. Return a Row.

    Without a budget, a rollout has what its question leaves of the context.
    """
    speak, at_a_time = sampler(speaker, config), max(1, config.rows // config.population)
    scores, tokens, longest, began = [], 0, 0, time.perf_counter()
    groups = defaultdict(list)                                  # budget -> the problems that have it
    for problem in problems:
        room = speaker.model.config.context - len(speaker.build_prompt(speaker.encode(problem.question), []))
        groups[budget or room].append(problem)
    chunks = [(limit, group[i:i + at_a_time]) for limit, group in groups.items()
              for i in range(0, len(group), at_a_time)]
    with tqdm(total=len(problems), desc=name, leave=False, dynamic_ncols=True, unit='problem') as bar:
        for limit, chunk in chunks:
            questions = [speaker.encode(problem.question) for problem in chunk]
            results = markovian_rsa(questions, speak, speaker.build_prompt, answer_of=speaker.answer_of, budget=limit,
                                    population=config.population, seed=config.seed, **settings)
            for problem, result in zip(chunk, results):
                right = str(task.solve(problem.question))
                scores.append(score(result['answers'], lambda answer: speaker.decode(answer) == right))
                tokens += result['tokens']
                prompts = [prompt for now in result['rounds'] for prompt in now['prompts'] if prompt is not None]
                longest = max(longest, *map(len, prompts))
            bar.update(len(chunk))
    majority, best = (statistics.fmean(s[key] for s in scores) for key in ('majority', 'best_of_n'))
    return Row(name, *mean_ci95([s['mean'] for s in scores]), majority, best, tokens / len(problems), longest,
               time.perf_counter() - began)


def rounds_of_split(config, split):
    """Return T, for the longest problems of a split."""
    return config.rounds if config.rounds >= 0 else task.rounds_needed(task.LENGTHS[split][1], config.budget)


def rows_of_table(speaker, config, split):
    """Measure the methods on one split, cheapest first. Yield a Row for each."""
    problems, high = task.test_problems(split, config.problems), task.LENGTHS[split][1]
    T = rounds_of_split(config, split)
    bounds, last = dict(budget=config.budget, tail=config.tail), config.final_budget or None
    yield measure(speaker, problems, config, 'one bounded rollout each, T=0', candidates=1, rounds=0, **bounds)
    prompt = max(len(speaker.build_prompt(speaker.encode(problem.question), [])) for problem in problems)
    longest = prompt + 1 + high * task.STEP + 3                 # start value, steps; </think>, answer, <|end|>
    if longest <= speaker.model.config.context:
        yield measure(speaker, problems, config, 'one unbounded rollout each', candidates=1, rounds=0, tail=1)
    for C in sorted({1, config.candidates}):
        yield measure(speaker, problems, config, f'C={C}, T={T}', candidates=C, rounds=T, final_budget=last,
                      compact=config.compact, **bounds)


def print_table(config):
    """Print the table of the model in config.ckpt, row by row as they come."""
    speaker, N = load_speaker(config.ckpt, configurator.pick_device(config.device)), config.population
    if speaker.build_prompt is not task.build_prompt:
        raise ValueError(f'{config.ckpt} was not trained on the loops task: ask it with `python rsa.py --question=...`')
    for split in config.split.split():
        T = rounds_of_split(config, split)
        questions = [problem.question for problem in task.test_problems(split, config.problems)]
        check_room(speaker, questions, rounds=T, candidates=config.candidates, budget=config.budget,
                            tail=config.tail, final_budget=config.final_budget or config.budget)
    print(f'{config.problems} held-out problems of each length, N={N}, beta={config.budget}, tau={config.tail}, '
          f'temperature {config.temperature:g}; mean with its 95 % CI over problems; best: if the verifier chose\n')
    print(f'| steps | method | mean of {N}, % | majority of {N}, % | best of {N}, % | generated tokens '
          '| longest prompt | seconds |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- |')
    for split in config.split.split():
        for row in rows_of_table(speaker, config, split):
            print(f'| {steps(split)} | {row.name} | {100 * row.mean:.1f} +-{100 * row.half:.1f} | '
                  f'{100 * row.majority:.1f} | {100 * row.best:.1f} | {row.tokens:,.0f} | {row.longest} | '
                  f'{row.seconds:.0f} |', flush=True)


def steps(split):
    """Return the numbers of steps of a split's problems as text: 25-32."""
    return '-'.join(map(str, task.LENGTHS[split]))


# ---- experiments ----

@dataclass
class ExperimentConfig:
    seeds: int = 3                  # training runs of each kind, with seeds 0, 1, ...
    problems: int = 200             # of each split
    recipe: str = 'config/loops.py' # by which the models are trained
    samples: int = 30_000           # of each kind, in the sets that `trim` prepares
    steps: int = 0                  # of a training run; 0: as many as the recipe says
    out: str = ''                   # folder of the runs; '': runs/loops_experiments
    splits: str = ''                # as in TableConfig; '': those that the experiment is about
    device: str = 'auto'

    def __post_init__(self):
        configurator.check_ranges(self, seeds=(1, None), problems=(1, 10_000), samples=(1, None), steps=(0, None))
        TableConfig(split=self.splits or 'hard')                # raises for a split that it does not know


def train(out, seed, config, *flags):
    """Train by the recipe into the folder out; train.py goes on where it was stopped. Return the Speaker to measure."""
    flags = [f'--out_dir={out}', f'--seed={seed}', f'--device={config.device}', *flags]
    if config.steps:
        flags += [f'--max_steps={config.steps}']
    if subprocess.run([sys.executable, 'train.py', config.recipe, *flags], cwd=ROOT).returncode:
        raise ValueError(f'the training into {out} failed, for the reason above')
    return load_speaker(out, configurator.pick_device(config.device))


def prepare_once(out, **settings):
    """Prepare the two sets of the loops task in the folder out, unless they are there."""
    if not (out / 'votes' / 'meta.json').exists():              # written last
        prepare_loops(LoopsConfig(out=str(out), **settings))


def report(rows):
    """Print the table of rows: {(split, what): [a Row for each seed]}."""
    print('\n| steps | what | mean of 16, % (seeds) | majority of 16, % (seeds) | generated tokens | longest prompt |')
    print('| --- | --- | --- | --- | --- | --- |')
    percent = lambda values: f'{100 * statistics.fmean(values):.1f} ({", ".join(f"{100 * v:.1f}" for v in values)})'
    for (split, what), measured in rows.items():
        mean, majority = (percent([getattr(row, key) for row in measured]) for key in ('mean', 'majority'))
        tokens, longest = statistics.fmean(row.tokens for row in measured), max(row.longest for row in measured)
        print(f'| {steps(split)} | {what} | {mean} | {majority} | {tokens:,.0f} | {longest} |')


def under_rsa(config, out, variants, splits):
    """Print RSA's table over seeds. variants: {label in the table: (folder of its runs, flags of its training)}."""
    rows = {}
    for seed in range(config.seeds):
        for label, (folder, flags) in variants.items():
            speaker = train(out / f'{folder}{seed}', seed, config, *flags)
            for split in (config.splits or splits).split():
                for row in rows_of_table(speaker, TableConfig(problems=config.problems, seed=seed), split):
                    rows.setdefault((split, label + row.name), []).append(row)
    report(rows)


def main_table(config, out):
    """What `make demo` shows, for several training seeds and all lengths."""
    under_rsa(config, out, {'': ('with', [])}, ' '.join(task.LENGTHS))


def aggregation(config, out):
    """Without aggregation examples a model has never seen tails, and does not know what to do with them. The models
    with them are those of `main`."""
    under_rsa(config, out, {'with: ': ('with', []), 'without: ': ('without', ['--dataset=data/loops/traces'])}, 'hard')


def trim(config, out, context=116):
    """Problems of 3 to 36 steps in windows of 116 tokens, which hold some 18 steps beside the question. One rollout has
    the rest of that context to answer in; Markovian RSA reads tails, so that all lengths can be answered in it."""
    rows = {}
    for rule in 'ap', 'truncate', 'drop':
        data = out / f'data_{rule}'
        sets = os.path.relpath(data, ROOT)                      # relative: a space in a path would end it
        prepare_once(data, context=context, rule=rule, traces=config.samples, votes=config.samples)
        for seed in range(config.seeds):
            settings = TableConfig(seed=seed)
            speaker = train(out / f'{rule}{seed}', seed, config, f'--context={context}', '--batch_size=18',
                            f'--dataset={sets}/traces:0.5 {sets}/votes:0.5')
            for split in (config.splits or 'easy medium hard').split():
                problems = task.test_problems(split, config.problems)
                T = task.rounds_needed(task.LENGTHS[split][1], 41)
                for name, kwargs in (('one rollout', dict(candidates=1, rounds=0, tail=1)),
                                     (f'C=4, T={T}', dict(candidates=4, rounds=T, budget=41, tail=10))):
                    row = measure(speaker, problems, settings, f'{rule} {split}', **kwargs)
                    rows.setdefault((split, f'{rule}: {name}'), []).append(row)
    report(dict(sorted(rows.items(), key=lambda row: list(task.LENGTHS).index(row[0][0]))))


EXPERIMENTS = {'main': main_table, 'aggregation': aggregation, 'trim': trim}


def main(arguments):
    if not arguments or arguments[0].startswith('--') or arguments[0].endswith('.py'):
        return print_table(*configurator.read(arguments, TableConfig))
    if arguments[0] not in EXPERIMENTS:
        raise ValueError(f'{arguments[0]} is no experiment, choose from {", ".join(EXPERIMENTS)}')
    config, = configurator.read(arguments[1:], ExperimentConfig)
    if arguments[0] != 'trim':                                  # which prepares sets of its own
        prepare_once(ROOT / 'data/loops')
    EXPERIMENTS[arguments[0]](config, Path(config.out or ROOT / 'runs/loops_experiments').resolve())


if __name__ == '__main__':
    with configurator.one_line_errors('data.loops.evaluate', 'try a smaller --rows, --population or --budget',
                                      'an experiment goes on when the same command is run again'):
        main(sys.argv[1:])
