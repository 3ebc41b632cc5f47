"""Does reading tails keep a population right (rsa.py)? On the loops task:

    python -m evidence.rsa main           RSA, single rollouts and lone chains, at four lengths
    python -m evidence.rsa aggregation    the same training with and without aggregation examples, under RSA

Claims (ZAYA1-8B report, arXiv 2605.05365, VI and III). (1) Candidates that read C = 4 tails beat lone chains.
Published, AIME'25 at 8K/4K: 86.5 against 82.1, one rollout 88.3; 91.9 at 40K/4K. (2) Aggregation examples in the
training are what teaches it; no figure is published.

Tests. A rollout has room for the value and 8 steps (41 tokens), its tail is 2 steps (10). Models of three training
seeds, each asked the same 200 held-out problems of each length (main), 100 of 25 to 32 steps (aggregation).

Refuted by: C = 1 no worse than C = 4; a training without examples no worse.

The rows of seeds 0 to 2 come from the table that an earlier program printed: shares are rounded to 0.1 %, and tokens
and longest prompts are those of all seeds together.
"""
import functools
import os
import statistics
from pathlib import Path

import configurator
import train
from tasks.loops import task
from evaluate import TableConfig, measure, steps
from tasks.loops.prepare import LoopsConfig, prepare_loops
from evidence.claims import by_seed, picture, run_experiments, table, verdict, with_seeds
from model import ZayaConfig
from rsa import load_policy
from runtime.device import pick_device

BOUNDS = dict(budget=41, tail=10)
UNBOUNDED = dict(candidates=1, rounds=0, tail=1)                # its budget is what the question leaves of the context
QUICK = '--max_steps=2 --eval_batches=1 --n_layer=1 --n_embd=32 --head_dim=8 --expert_dim=16'.split()


def data_of(config, folder='tasks/loops', **settings):
    """The folder of the task's two sets, prepared if they are not there. settings: of LoopsConfig. For a quick look the
    sets are small."""
    folder, samples = (config.folder(Path(folder).name), 100) if config.quick else (folder, 30_000)
    if not Path(folder, 'votes', 'meta.json').exists():         # written last
        prepare_loops(LoopsConfig(out=folder, traces=samples, votes=samples, **settings))
    return os.path.relpath(folder)                              # train.py ends the name of a set at a space


@functools.lru_cache(1)
def policy_of(folder, *flags):
    """Train by the recipe of the loops task into a folder, or go on there. Return the model's Policy."""
    train.train(*configurator.read(['config/loops.py', f'--out_dir={folder}', *flags], train.TrainConfig, ZayaConfig))
    return load_policy(folder, pick_device('auto'))


def trained_model(config, label, seed, data, *flags):
    """The run folder of a model of the task, and its Policy. label: 'with' aggregation examples, 'without', or another
    name for 'with' other data or flags of train.py."""
    sets = f'{data}/traces' if label == 'without' else f'{data}/traces:0.5 {data}/votes:0.5'
    folder = f'{config.folder("loops")}/{label}{seed}'
    return folder, policy_of(folder, f'--seed={seed}', f'--dataset={sets}', *flags, *QUICK * config.quick)


def methods(lengths):
    """{'25-32: C=4, T=4': (split, settings of measure)}, cheapest first."""
    found = {}
    for split in lengths.split():
        T = task.rounds_needed(task.LENGTHS[split][1], BOUNDS['budget'])
        add = lambda name, **settings: found.update({f'{steps(split)}: {name}': (split, settings)})
        add('one bounded rollout each, T=0', candidates=1, rounds=0, **BOUNDS)
        if task.LENGTHS[split][1] <= LoopsConfig.high:          # longer ones do not fit into the context
            add('one unbounded rollout each', **UNBOUNDED)
        for C in 1, 4:
            add(f'C={C}, T={T}', candidates=C, rounds=T, **BOUNDS)
    return found


def figures(policy, problems, seed, N=16, rows=512, **settings):
    """Let RSA solve the problems, `rows` rollouts at a time. Return what the table keeps."""
    row = measure(policy, problems, TableConfig(seed=seed, population=N, candidates=1, rows=rows), '', **settings)
    return {'mean': 100 * row.mean, 'majority': 100 * row.majority, 'tokens': row.tokens, 'longest': row.longest}


def report(rows):
    """Print the table of main, aggregation or trimming."""
    print('\n| steps | what | mean of 16, % (seeds) | majority of 16, % (seeds) | generated tokens | longest prompt |')
    print('| --- | --- | --- | --- | --- | --- |')
    for setting in dict.fromkeys(row['setting'] for row in rows):
        mean, majority, tokens, longest = (
            by_seed(rows, setting, column) for column in ('mean', 'majority', 'tokens', 'longest'))
        print(f'| {" | ".join(setting.split(": ", 1))} | {with_seeds(mean, ".1f")} | {with_seeds(majority, ".1f")} '
              f'| {with_seeds(tokens, ",.0f", False)} | {max(longest):.0f} |')
    print()


def judge(rows, *pairs, columns=('mean', 'mean')):
    """Print a verdict for each pair of settings, (lower, higher), where the rows have both; at every length."""
    for length in dict.fromkeys(row['setting'].split(': ')[0] for row in rows):
        names = {row['setting'].split(': ', 1)[1].partition(', T=')[0]: row['setting'] for row in rows
                 if row['setting'].startswith(f'{length}: ')}
        for pair in pairs:
            if set(pair) <= set(names):
                words = [f'{column} of {name}' for column, name in zip(columns, pair)]
                verdict(f'{length} steps: {" below ".join(words)}', *(
                    by_seed(rows, names[name], column) for column, name in zip(columns, pair)))


def main_table(config):
    data, problems = data_of(config), 1 if config.quick else 200
    settings = methods('easy' if config.quick else 'easy medium hard deep')

    def one(setting, seed):
        split, how = settings[setting]
        return figures(trained_model(config, 'with', seed, data)[1], task.test_problems(split, problems), seed, **how)
    rows = table('rsa_lengths', config, settings, one)
    report(rows)
    judge(rows, ('C=1', 'C=4'), ('one unbounded rollout each', 'C=4'))
    judge(rows, ('C=1', 'C=4'), columns=('majority', 'mean'))
    config.quick or picture('rsa_lengths', draw_lengths)


def aggregation(config):
    data, problems = data_of(config), 1 if config.quick else 100
    settings = {setting.replace(': ', f': {label}: ', 1): how for label in ('with', 'without')
                for setting, how in methods('easy' if config.quick else 'hard').items()}

    def one(setting, seed):
        (split, how), label = settings[setting], setting.split(': ')[1]
        return figures(trained_model(config, label, seed, data)[1], task.test_problems(split, problems), seed, **how)
    rows = table('rsa_aggregation', config, settings, one)
    report(rows)
    judge(rows, ('without: C=1', 'with: C=1'), ('without: C=4', 'with: C=4'))
    config.quick or picture('rsa_aggregation', draw_aggregation)


def draw_lengths(plt, rows):
    """Reading four tails instead of one keeps a population right, however long the problem is."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
    lengths = list(dict.fromkeys(row['setting'].split(': ')[0] for row in rows))
    for method, style in ('C=4', 'o-'), ('C=1', 's-'), ('one unbounded rollout', '^--'), ('one bounded rollout', 'v:'):
        per_length = {s: [float(row['mean']) for row in rows if row['setting'].startswith(f'{s}: {method}')]
                      for s in lengths}
        points = [(i, statistics.fmean(per_length[s]), min(per_length[s]), max(per_length[s]))
                  for i, s in enumerate(lengths) if per_length[s]]
        x, y, low, high = zip(*points)
        spread = [[a - b for a, b in zip(y, low)], [a - b for a, b in zip(high, y)]]
        axis.errorbar(x, y, spread, fmt=style, capsize=3, label=method)
    axis.set(xticks=range(len(lengths)), xticklabels=lengths, xlabel='steps of the problem', ylim=(-3, 103),
             ylabel='right answers, %')
    figure.legend(loc='outside upper center', ncols=4, frameon=False)
    return figure


def bars(plt, rows, groups, kinds, label):
    """A bar for the mean over the seeds of each setting 'group: kind', and a dot for each seed."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
    for k, kind in enumerate(kinds):
        x = [g + (k - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for g in range(len(groups))]
        values = [[float(row['mean']) for row in rows if row['setting'] == f'{group}: {kind}']
                  for group in groups]
        axis.bar(x, list(map(statistics.fmean, values)), 0.75 / len(kinds), label=kind)
        axis.plot(*zip(*[(at, value) for at, found in zip(x, values) for value in found]), 'k.', markersize=3)
    axis.set(xticks=range(len(groups)), xticklabels=groups, xlabel=label, ylim=(0, 103), ylabel='right answers, %')
    figure.legend(loc='outside upper center', ncols=3, frameon=False)
    return figure


def draw_aggregation(plt, rows):
    """Without aggregation examples a model reasons as well, but does not know what to do with tails."""
    rows = [row | {'setting': ': '.join(row['setting'].split(', T=')[0].split(': ')[:0:-1])}    # to 'C=4: with'
            for row in rows]
    return bars(plt, rows, ['one unbounded rollout each', 'C=1', 'C=4'], ['with', 'without'],
                'aggregation examples in the training: with them, without them')


if __name__ == '__main__':
    run_experiments('rsa', {'main': main_table, 'aggregation': aggregation})
