"""What Markovian RSA costs, and what each of its numbers gives: `python -m evidence.rsa_cost`, after `make demo`.

Claims (ZAYA1-8B report, arXiv 2605.05365, VI). (1) No prompt is longer than the question and C tails, whatever T and
beta are. (2) N = 8, C = 4, T = 2 took 0.4 of the wall clock of one long rollout, for it is batched and bounded. (3) A
longer tail need not help: at 40K, tau = 8K gives 90.8 on AIME'25, tau = 4K 91.9.

Test. The model of runs/loops, problems of 25 to 32 steps, one of N, C, T, tau changed at a time. A seed is that of the
draws, and has 8 other held-out problems. The clock, for two settings, is that of the first two, one at a time: the
processor's, with OMP_NUM_THREADS=1 what the one on the wall shows where nothing else runs. One long rollout writes the
whole solution, N = 1. tau = 41 is the whole budget: whole outputs are carried on, full-chain RSA as far as one output
goes. Chains of several outputs do not fit: four of them, each of 5 rounds, are 820 tokens, the context is 256.

Refuted by: prompts that grow with T; RSA slower than the one rollout; a longer tail that does better than tau = 10.

The model was trained on tails of 10 tokens: other settings may ask of it what it has not seen. Without a GPU rows are
not free, so the clock shows less of what batching gives.

Legend:  N population   C candidates   T rounds after round 0   tau tail   beta budget, 41 tokens
"""
import statistics
import time

from tasks.loops import task
from evidence.claims import by_seed, run_claim, table, verdict, with_seeds
from evidence.rsa import UNBOUNDED, figures
from rsa import load_policy
from runtime.device import pick_device

BASE = dict(N=16, C=4, T=4, tau=10)
CHANGES = [{}, dict(C=1), dict(C=2), dict(C=8), dict(N=4), dict(N=8), dict(T=2), dict(T=3), dict(T=6), dict(tau=5),
           dict(tau=20), dict(tau=41)]
LONG = 'one long rollout'


def named(**changed):
    return ' '.join(f'{key}={value}' for key, value in (BASE | changed).items())


SETTINGS = {LONG: dict(N=1, **UNBOUNDED)} | {
    named(**change): dict(N=N, candidates=C, rounds=T, budget=41, tail=tau)
    for change in CHANGES for N, C, T, tau in [(BASE | change).values()]}
TIMED = LONG, named(N=8)


def report(rows):
    """Print the table."""
    print('\n| setting | mean of N, % (seeds) | majority, % (seeds) | generated tokens | longest prompt | seconds |')
    print('| --- | --- | --- | --- | --- | --- |')
    for setting in SETTINGS:
        mean, majority, tokens, longest = (
            by_seed(rows, setting, column) for column in ('mean', 'majority', 'tokens', 'longest'))
        seconds = with_seeds(by_seed(rows, setting, 'seconds'), '.2f', False) if setting in TIMED else ''
        print(f'| {setting} | {with_seeds(mean, ".1f")} | {with_seeds(majority, ".1f")} '
              f'| {with_seeds(tokens, ",.0f", False)} | {max(longest):.0f} | {seconds} |')
    print()


def judge(rows):
    """Print the verdicts."""
    get = lambda setting, column='mean': by_seed(rows, setting, column)
    for change in CHANGES[1:]:
        verdict(f'mean: {named(**change)} below {named()}', get(named(**change)), get(named()))
    verdict(f'mean: {LONG} below {named()}', get(LONG), get(named()))
    longest = {max(get(named(**change), 'longest')) for change in CHANGES if set(change) <= {'T'}}
    print(f'longest prompts at T = 2, 3, 4, 6: {longest}: {"reproduced" if len(longest) == 1 else "contradicted"}')
    verdict(f'seconds: {named(N=8)} below {LONG}', get(named(N=8), 'seconds'), get(LONG, 'seconds'))


def main(config):
    n, policy = 2 if config.quick else 8, load_policy('runs/loops', pick_device('auto'))

    def measure(setting, seed):
        problems = task.test_problems('hard', n * (seed + 1))[-n:]
        began = time.process_time()
        if setting in TIMED:
            figures(policy, problems[:2], seed, rows=1, **SETTINGS[setting])
        seconds = (time.process_time() - began) / 2 if setting in TIMED else ''
        return figures(policy, problems, seed, **SETTINGS[setting]) | {'seconds': seconds}
    rows = table('rsa_cost', config, SETTINGS, measure)
    report(rows)
    judge(rows)


def draw(plt, rows):
    """Enough rounds, more than two tails to outvote errors, tails as long as those trained on."""
    figure, axes = plt.subplots(1, 4, figsize=(7, 2.6), sharey=True, layout='constrained')
    long = statistics.fmean(by_seed(rows, LONG, 'mean'))
    changed = dict(C=(1, 2, 4, 8), N=(4, 8, 16), T=(2, 3, 4, 6), tau=(5, 10, 20, 41))
    for axis, (key, values) in zip(axes, changed.items()):
        means = []
        for value in values:
            found = by_seed(rows, named(**{key: value}), 'mean')
            axis.plot([value] * len(found), found, 'k.', markersize=3)
            means.append(statistics.fmean(found))
        axis.plot(values, means, 'o-', color='tab:blue', markersize=4)
        axis.axhline(long, color='tab:orange', linestyle='--', linewidth=1)
        axis.set(xlabel=key, xticks=values, ylim=(-3, 103))
    axes[0].set(ylabel='right answers, %')
    return figure


if __name__ == '__main__':
    run_claim('rsa_cost', main, draw)
