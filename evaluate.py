"""Score a model on the loops task: single rollouts, chains (C = 1) and Markovian RSA (rsa.py), as a table.

    python evaluate.py --ckpt=runs/loops --split=hard

Experiments over several training runs are in evidence/: rsa.py, rsa_cost.py, trimming.py, rl.py.
"""
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import NamedTuple

from tqdm import tqdm

import configurator
from rsa import RSASettings, markovian_rsa
from runtime.device import pick_device
from sample import SamplingOptions
from tasks.loops import task
from tasks.policy import load_policy
from tasks.problems import check_room, mean_ci95, percent, score


@dataclass
class TableConfig:                  # more flags: RSASettings (rsa.py) and SamplingOptions (sample.py)
    ckpt: str = 'runs/loops'        # a run folder of train.py or rl.py
    split: str = 'hard'             # of task.LENGTHS: easy, medium, hard, deep, ...; several: 'easy hard'
    problems: int = 200             # per split
    rows: int = 512                 # outputs generated in one batch: as many problems as fit, but at least one
    device: str = 'auto'

    def __post_init__(self):
        configurator.check_ranges(self, problems=(1, 10_000), rows=(1, None))
        unknown = [name for name in self.split.split() if name not in task.LENGTHS]
        if unknown or not self.split.split():
            raise ValueError(f'split is {self.split!r}, choose from {", ".join(task.LENGTHS)}')


class Row(NamedTuple):
    """One method on the problems of one split."""
    name: str
    mean: float                     # scores as in problems.score, averaged over problems
    half: float                     # half the width of the 95 % interval of the mean
    majority: float
    best: float
    tokens: float                   # generated per problem
    longest: int                    # prompt, in tokens
    seconds: float


def measure(policy, problems, settings, options=SamplingOptions(), name='', rows=512, unbounded=False):
    """Solve problems by Markovian RSA, at most `rows` outputs per batch. Return a Row. unbounded: the budget is the
    rest of the context after the question, not that of the settings."""
    generate, at_a_time = policy.sampler(options), max(1, rows // settings.population)
    scores, tokens, longest, began = [], 0, 0, time.perf_counter()
    groups = defaultdict(list)                                  # budget -> its problems
    for problem in problems:
        room = policy.model.config.context - len(policy.build_prompt(policy.encode(problem.question), []))
        groups[room if unbounded else settings.budget].append(problem)
    batches = [(budget, group[i:i + at_a_time]) for budget, group in groups.items()
               for i in range(0, len(group), at_a_time)]
    with tqdm(total=len(problems), desc=name, leave=False, dynamic_ncols=True, unit='problem') as bar:
        for budget, batch in batches:
            bounded = replace(settings, budget=budget, final_budget=settings.final_budget * (not unbounded))
            results = markovian_rsa([policy.encode(problem.question) for problem in batch], generate, policy, bounded)
            for problem, rounds in zip(batch, results):
                right, answers = str(task.solve(problem.question)), [c.answer for c in rounds[-1].candidates]
                scores.append(score(answers, lambda answer: policy.decode(answer) == right))
                tokens += sum(now.tokens for now in rounds)
                longest = max(longest, *(len(c.prompt) for now in rounds for c in now.candidates if c.prompt))
            bar.update(len(batch))
    majority, best = (statistics.fmean(s[key] for s in scores) for key in ('majority', 'best_of_n'))
    return Row(name, *mean_ci95([s['mean'] for s in scores]), majority, best, tokens / len(problems), longest,
               time.perf_counter() - began)


def settings_for(split, settings):
    """Return the settings with the defaults of the loops task, T being that of the longest problems of a split."""
    return settings.resolved(task.rounds_needed(task.LENGTHS[split][1], settings.budget or 41), 41, 10, 41)


def rows_of_table(policy, split, config, settings, options):
    """Measure the methods on one split, cheapest first. Yield a Row for each."""
    problems, settings = task.test_problems(split, config.problems), settings_for(split, settings)
    run = lambda name, settings, **how: measure(policy, problems, settings, options, name, config.rows, **how)
    single = replace(settings, candidates=1, rounds=0, final_budget=settings.budget, compact='tail')
    yield run('one bounded rollout each, T=0', single)
    prompt = max(len(policy.build_prompt(policy.encode(problem.question), [])) for problem in problems)
    longest = prompt + 1 + task.LENGTHS[split][1] * task.STEP + 3       # start value, steps; </think>, answer, <|end|>
    if longest <= policy.model.config.context:
        yield run('one unbounded rollout each', replace(single, tail=1), unbounded=True)
    for C in sorted({1, settings.candidates}):
        yield run(f'C={C}, T={settings.rounds}', replace(settings, candidates=C))


def print_table(config, settings, options):
    """Print the table of the model in config.ckpt, row by row."""
    policy, splits = load_policy(config.ckpt, pick_device(config.device)), config.split.split()
    if policy.build_prompt is not task.build_prompt:
        raise ValueError(f'{config.ckpt} was not trained on the loops task: ask it with `python rsa.py --question=...`')
    for split in splits:
        questions = [problem.question for problem in task.test_problems(split, config.problems)]
        check_room(policy, questions, settings_for(split, settings))
    N, used = settings.population, settings_for(splits[0], settings)
    print(f'{config.problems} held-out problems per split, N={N}, beta={used.budget}, tau={used.tail}, temperature '
          f'{options.temperature:g}; mean with its 95 % CI over problems; best: chosen by the verifier\n')
    print(f'| steps | method | mean of {N}, % | majority of {N}, % | best of {N}, % | generated tokens per problem '
          '| longest prompt, tokens | seconds |')
    print('| --- ' * 8 + '|')
    for split in splits:
        for row in rows_of_table(policy, split, config, settings, options):
            print(f'| {steps(split)} | {row.name} | {percent(row.mean, row.half)} | '
                  f'{100 * row.majority:.1f} | {100 * row.best:.1f} | {row.tokens:,.0f} | {row.longest} | '
                  f'{row.seconds:.0f} |', flush=True)


def steps(split):
    """Return the range of steps of a split's problems as text: 25-32."""
    return '-'.join(map(str, task.LENGTHS[split]))


if __name__ == '__main__':
    with configurator.one_line_errors('evaluate.py', 'try a smaller --rows, --population or --budget'):
        print_table(*configurator.read(sys.argv[1:], TableConfig, RSASettings, SamplingOptions))
