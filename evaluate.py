"""The table of one model: Markovian RSA (rsa.py), single rollouts and lone chains on the loops task. From the project's
root, with the settings of TableConfig:

    python evaluate.py --ckpt=runs/loops --split=hard

Experiments, over several trainings, are in evidence/: rsa.py, rsa_cost.py, trimming.py, rl.py.
"""
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from tqdm import tqdm

import configurator
from tasks.loops import task
from tasks.problems import check_room, mean_ci95, score
from rsa import RSAConfig, load_policy, markovian_rsa, sampler
from runtime.device import pick_device


@dataclass
class TableConfig(RSAConfig):       # all settings of rsa.py but `question` and `show`, and:
    split: str = 'hard'             # of task.LENGTHS: easy, medium, hard, deep, ...; several: 'easy hard'
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


def measure(policy, problems, config, name, budget=None, **settings):
    """Let RSA with these settings of markovian_rsa solve all problems, some at a time. Return a Row.

    Without a budget, a rollout has what its question leaves of the context.
    """
    speak, at_a_time = sampler(policy, config), max(1, config.rows // config.population)
    scores, tokens, longest, began = [], 0, 0, time.perf_counter()
    groups = defaultdict(list)                                  # budget -> the problems that have it
    for problem in problems:
        room = policy.model.config.context - len(policy.build_prompt(policy.encode(problem.question), []))
        groups[budget or room].append(problem)
    chunks = [(limit, group[i:i + at_a_time]) for limit, group in groups.items()
              for i in range(0, len(group), at_a_time)]
    with tqdm(total=len(problems), desc=name, leave=False, dynamic_ncols=True, unit='problem') as bar:
        for limit, chunk in chunks:
            questions = [policy.encode(problem.question) for problem in chunk]
            results = markovian_rsa(questions, speak, policy.build_prompt, answer_of=policy.answer_of, budget=limit,
                                    population=config.population, seed=config.seed, **settings)
            for problem, result in zip(chunk, results):
                right = str(task.solve(problem.question))
                scores.append(score(result['answers'], lambda answer: policy.decode(answer) == right))
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


def rows_of_table(policy, config, split):
    """Measure the methods on one split, cheapest first. Yield a Row for each."""
    problems, high = task.test_problems(split, config.problems), task.LENGTHS[split][1]
    T = rounds_of_split(config, split)
    bounds, last = dict(budget=config.budget, tail=config.tail), config.final_budget or None
    yield measure(policy, problems, config, 'one bounded rollout each, T=0', candidates=1, rounds=0, **bounds)
    prompt = max(len(policy.build_prompt(policy.encode(problem.question), [])) for problem in problems)
    longest = prompt + 1 + high * task.STEP + 3                 # start value, steps; </think>, answer, <|end|>
    if longest <= policy.model.config.context:
        yield measure(policy, problems, config, 'one unbounded rollout each', candidates=1, rounds=0, tail=1)
    for C in sorted({1, config.candidates}):
        yield measure(policy, problems, config, f'C={C}, T={T}', candidates=C, rounds=T, final_budget=last,
                      compact=config.compact, **bounds)


def print_table(config):
    """Print the table of the model in config.ckpt, row by row as they come."""
    policy, N = load_policy(config.ckpt, pick_device(config.device)), config.population
    if policy.build_prompt is not task.build_prompt:
        raise ValueError(f'{config.ckpt} was not trained on the loops task: ask it with `python rsa.py --question=...`')
    for split in config.split.split():
        T = rounds_of_split(config, split)
        questions = [problem.question for problem in task.test_problems(split, config.problems)]
        check_room(policy, questions, rounds=T, candidates=config.candidates, budget=config.budget,
                            tail=config.tail, final_budget=config.final_budget or config.budget)
    print(f'{config.problems} held-out problems of each length, N={N}, beta={config.budget}, tau={config.tail}, '
          f'temperature {config.temperature:g}; mean with its 95 % CI over problems; best: if the verifier chose\n')
    print(f'| steps | method | mean of {N}, % | majority of {N}, % | best of {N}, % | generated tokens '
          '| longest prompt | seconds |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- |')
    for split in config.split.split():
        for row in rows_of_table(policy, config, split):
            print(f'| {steps(split)} | {row.name} | {100 * row.mean:.1f} +-{100 * row.half:.1f} | '
                  f'{100 * row.majority:.1f} | {100 * row.best:.1f} | {row.tokens:,.0f} | {row.longest} | '
                  f'{row.seconds:.0f} |', flush=True)


def steps(split):
    """Return the numbers of steps of a split's problems as text: 25-32."""
    return '-'.join(map(str, task.LENGTHS[split]))


if __name__ == '__main__':
    with configurator.one_line_errors('evaluate', 'try a smaller --rows, --population or --budget'):
        print_table(*configurator.read(sys.argv[1:], TableConfig))
