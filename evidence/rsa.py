"""Evaluate Markovian RSA (rsa.py) on the loops task:

    python -m evidence.rsa main           RSA, single rollouts and independent chains, at four lengths
    python -m evidence.rsa aggregation    RSA after training with and without aggregation examples

Claims (ZAYA1-8B report, arXiv 2605.05365, VI and III). (1) Candidates that read C = 4 tails beat independent chains.
Published, AIME'25 at 8K/4K: 86.5 against 82.1, one rollout 88.3; 91.9 at 40K/4K. (2) Aggregation examples in the
training data teach the model to use tails; no figure is published. C = 1 as good as C = 4, or training without the
examples as good as with them, would refute the claims.

Tests. A rollout has a budget of 41 tokens (the value and 8 steps), its tail is 10 tokens (2 steps). For seeds 0 to 2
the CSVs hold percentages rounded to 0.1, and tokens and longest prompts over all seeds together.
"""
import functools
import itertools
import os
import statistics
from pathlib import Path

import configurator
import train
from tasks.loops import task
from evaluate import measure, steps
from tasks.loops.prepare import LoopsConfig, prepare_loops
from evidence.claims import (below, by_seed, fill_table, picture, print_table, print_verdicts, run_experiments,
                             spread)
from model import ZayaConfig
from rsa import RSASettings, load_policy
from runtime.device import pick_device
from sample import SamplingOptions

BOUNDS = dict(budget=41, tail=10)
UNBOUNDED = dict(candidates=1, rounds=0, tail=1, unbounded=True)
QUICK = '--max_steps=2 --eval_batches=1 --n_layer=1 --n_embd=32 --head_dim=8 --expert_dim=16'.split()


def prepare_data(config, folder='tasks/loops', **settings):
    """Prepare the two datasets of the task unless they exist. Return their folder. settings: fields of LoopsConfig."""
    folder, samples = (config.folder(Path(folder).name), 100) if config.quick else (folder, 30_000)
    if not Path(folder, 'votes', 'meta.json').exists():         # written last
        prepare_loops(LoopsConfig(out=folder, traces=samples, votes=samples, **settings))
    return os.path.relpath(folder)                              # train.py separates datasets by spaces


@functools.lru_cache(1)
def train_policy(folder, *flags):
    """Train a model of the loops task into a folder, or resume. Return its Policy."""
    train.train(*configurator.read(['config/loops.py', f'--out_dir={folder}', *flags], train.TrainConfig, ZayaConfig))
    return load_policy(folder, pick_device('auto'))


def trained_model(config, label, seed, data, *flags):
    """Return the run folder and the Policy of a model of the task. label: 'without' aggregation examples, 'with' them,
    or the name of a variant with other data or flags of train.py."""
    sets = f'{data}/traces' if label == 'without' else f'{data}/traces:0.5 {data}/votes:0.5'
    folder = f'{config.folder("loops")}/{label}{seed}'
    return folder, train_policy(folder, f'--seed={seed}', f'--dataset={sets}', *flags, *QUICK * config.quick)


def methods(config, lengths):
    """Return {'25-32: C=4, T=4': (split, settings of score)}, the cheapest first. lengths: names in task.LENGTHS."""
    found = {}
    for split in ['easy'] if config.quick else lengths.split():
        T = task.rounds_needed(task.LENGTHS[split][1], BOUNDS['budget'])
        add = lambda name, **settings: found.update({f'{steps(split)}: {name}': (split, settings)})
        add('one bounded rollout each, T=0', candidates=1, rounds=0, **BOUNDS)
        if task.LENGTHS[split][1] <= LoopsConfig.high:          # longer solutions do not fit into the context
            add('one unbounded rollout each', **UNBOUNDED)
        for C in 1, 4:
            add(f'C={C}, T={T}', candidates=C, rounds=T, **BOUNDS)
    return found


def score(policy, problems, seed, N=16, rows=512, unbounded=False, **settings):
    """Solve the problems by RSA, `rows` rollouts per batch. Return the measurements."""
    row = measure(policy, problems, RSASettings(population=N, seed=seed, **settings), SamplingOptions(seed=seed),
                  rows=rows, unbounded=unbounded)
    return {'mean': 100 * row.mean, 'majority': 100 * row.majority, 'tokens': row.tokens, 'longest': row.longest}


def by_length(rows):
    """Return {length: {method: setting}} of settings 'length: method' and 'length: method, T=rounds'."""
    found = {}
    for setting in dict.fromkeys(row['setting'] for row in rows):
        length, method = setting.split(', T=')[0].split(': ', 1)
        found.setdefault(length, {})[method] = setting
    return found


def print_methods(rows):
    """Print a line per method and a column per length."""
    def cell(setting):
        mean, majority = (by_seed(rows, setting, column) for column in ('mean', 'majority'))
        return f'{spread(mean, ".1f")} ({statistics.fmean(majority):.1f})' if mean else ''
    lengths = by_length(rows)
    print('mean of 16 outputs (majority vote of 16), % of problems, by the steps per problem\n')
    print_table(['method', *lengths], [[method, *(cell(names.get(method)) for names in lengths.values())]
                                       for method in dict.fromkeys(itertools.chain(*lengths.values()))])


def compare_methods(rows, *pairs, columns=('mean', 'mean')):
    """Return the lines of print_verdicts for each length and each pair (lower, higher) of methods."""
    return [below(f'{length} steps: {columns[0]} of {a} below {columns[1]} of {b}', by_seed(rows, names[a], columns[0]),
                  by_seed(rows, names[b], columns[1]), 'points')
            for length, names in by_length(rows).items() for a, b in pairs if {a, b} <= set(names)]


def report_main(rows):
    print_methods(rows)
    print_verdicts(compare_methods(rows, ('C=1', 'C=4'), ('one unbounded rollout each', 'C=4'))
                   + compare_methods(rows, ('C=1', 'C=4'), columns=('majority', 'mean')))


def report_aggregation(rows):
    print_methods(rows)
    print_verdicts(compare_methods(rows, ('without: C=1', 'with: C=1'), ('without: C=4', 'with: C=4')))


def run_table(name, config, settings, n, policy_of, seeds=None):
    """Fill results/NAME.csv and return its lines. settings: {setting: (label, split, settings of score)}; the Policy
    policy_of(label, seed) solves n problems of the split, one with --quick."""
    def one(setting, seed):
        label, split, how = settings[setting]
        return score(policy_of(label, seed), task.test_problems(split, 1 if config.quick else n), seed, **how)
    return fill_table(name, config, settings, one, seeds)


def main_table(config):
    settings = {name: ('with', *how) for name, how in methods(config, 'easy medium hard deep').items()}
    policy_of = lambda label, seed: trained_model(config, label, seed, prepare_data(config))[1]
    report_main(run_table('rsa_lengths', config, settings, 200, policy_of))
    config.quick or picture('rsa_lengths', draw_lengths)


def aggregation(config):
    settings = {name.replace(': ', f': {label}: ', 1): (label, *how) for label in ('with', 'without')
                for name, how in methods(config, 'hard').items()}
    policy_of = lambda label, seed: trained_model(config, label, seed, prepare_data(config))[1]
    report_aggregation(run_table('rsa_aggregation', config, settings, 100, policy_of))
    config.quick or picture('rsa_aggregation', draw_aggregation)


def draw_lengths(figure, rows):
    """Plot the mean of 16 outputs against the length of the problem."""
    axis = figure.subplots()
    lengths = by_length(rows)
    for method, style in (('C=4', 'o-'), ('C=1', 's-'), ('one unbounded rollout each', '^--'),
                          ('one bounded rollout each', 'v:')):
        x, values = zip(*[(i, by_seed(rows, names[method], 'mean'))
                          for i, names in enumerate(lengths.values()) if method in names])
        y = list(map(statistics.fmean, values))
        ranges = [[mean - min(v) for mean, v in zip(y, values)], [max(v) - mean for mean, v in zip(y, values)]]
        axis.errorbar(x, y, ranges, fmt=style, capsize=3, label=method.removesuffix(' each'))
    axis.set(xticks=range(len(lengths)), xticklabels=lengths, xlabel='steps per problem', ylim=(-3, 103),
             ylabel='correct answers, %')


def bars(figure, rows, groups, label):
    """Plot a bar per setting, the mean over seeds, and a dot per seed. groups: {group: {kind: setting}}."""
    axis = figure.subplots()
    kinds = list(next(iter(groups.values())))
    for k, kind in enumerate(kinds):
        x = [g + (k - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for g in range(len(groups))]
        values = [by_seed(rows, settings[kind], 'mean') for settings in groups.values()]
        axis.bar(x, list(map(statistics.fmean, values)), 0.75 / len(kinds), label=kind)
        axis.plot(*zip(*[(at, value) for at, found in zip(x, values) for value in found]), 'k.', markersize=3)
    axis.set(xticks=range(len(groups)), xticklabels=groups, xlabel=label, ylim=(0, 103), ylabel='correct answers, %')


def draw_aggregation(figure, rows):
    """Plot the mean of 16 outputs after training with and without aggregation examples."""
    names, = by_length(rows).values()
    groups = {method: {label: names[f'{label}: {method}'] for label in ('with', 'without')}
              for method in ('one unbounded rollout each', 'C=1', 'C=4')}
    bars(figure, rows, groups, 'training with and without aggregation examples')


if __name__ == '__main__':
    run_experiments('rsa', {'main': main_table, 'aggregation': aggregation})
