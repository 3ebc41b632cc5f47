"""Measure the cost of Markovian RSA and the effect of its settings: `python -m evidence.rsa_cost`, after training
config/loops.py.

Claims (ZAYA1-8B report, arXiv 2605.05365, VI). (1) No prompt is longer than the question and C tails, whatever T and
beta are. (2) N = 8, C = 4, T = 2 took 0.4 of the wall-clock time of one long rollout, since it is batched and bounded.
(3) A longer tail need not help: at 40K, tau = 8K gives 90.8 on AIME'25, tau = 4K 91.9. Prompts that grow with T, RSA
slower than one rollout, or a longer tail that is better than tau = 10 would refute them.

Test. The model of runs/loops, trained on tails of 10 tokens, on 8 problems of 25 to 32 steps per seed; one of N, C, T,
tau is changed at a time. With tau = 41 whole outputs are passed on. CPU time is measured on the first two problems, one
at a time; with OMP_NUM_THREADS=1 it equals wall-clock time on an idle machine.

Legend:  N population   C candidates   T rounds after round 0   tau tail   beta budget, 41 tokens
"""
import functools
import statistics
import time

from tasks.loops import task
from evidence.claims import by_seed, compare, fill_table, print_settings, print_verdicts, run_claim
from evidence.rsa import UNBOUNDED, score
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


def main(config):
    n, policy = 2 if config.quick else 8, functools.cache(lambda: load_policy('runs/loops', pick_device('auto')))

    def measure(setting, seed):
        problems = task.test_problems('hard', n * (seed + 1))[-n:]
        model = policy()
        start = time.process_time()
        if setting in TIMED:
            score(model, problems[:2], seed, rows=1, **SETTINGS[setting])
        seconds = (time.process_time() - start) / 2 if setting in TIMED else ''
        return score(model, problems, seed, **SETTINGS[setting]) | {'seconds': seconds}
    rows = fill_table('rsa_cost', config, SETTINGS, measure)            # C = 8, T = 3, T = 6 make no difference
    print_settings(rows, [setting for setting in SETTINGS if setting not in (named(C=8), named(T=3), named(T=6))],
                   mean=('mean of N, %', '.1f'), majority=('majority vote, %', '.1f'),
                   tokens=('generated tokens per problem', ',.0f'),
                   longest=('longest prompt, tokens', lambda values: f'{max(values):.0f}'),
                   seconds=('CPU seconds per problem', '.2f'))
    longest = {max(by_seed(rows, named(T=T), 'longest')) for T in (2, 3, 4, 6)}
    print_verdicts([
        *compare(rows, 'mean', 'points', *((setting, named()) for setting in SETTINGS if setting != named())),
        ('prompts do not grow with T', f'{max(longest) - min(longest):.0f} tokens',
         'reproduced' if len(longest) == 1 else 'contradicted'),
        *compare(rows, 'seconds', 's', TIMED[::-1])])


def draw(figure, rows):
    """Plot the mean of N outputs against each setting; dashed: one long rollout."""
    figure.set_figheight(2.6)
    axes = figure.subplots(1, 4, sharey=True)
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
    axes[0].set(ylabel='correct answers, %')


if __name__ == '__main__':
    run_claim('rsa_cost', main, draw)
