"""Which rule keeps the experts evenly busy? `python -m evidence.balancer`, then again after any stop.

Claim (ZAYA1-8B report, arXiv 2605.05365, II-A2). AdamW on the balancing biases, with the error p_e - 1/N as gradient,
balances better than DeepSeek's fixed step against its sign. Published: an entropy of 0.99 by some 400 steps (Fig. 4).

Test. One model, 150 steps at a learning rate that does not decay; from step 110 on another text: English prose about
Python (pydoc's topics, which data/stdlib leaves out) instead of its source. Rules, with steps of two sizes:

    none         no balancing
    sign LR      b <- b - LR sign(p - 1/N)
    pid LR       b <- AdamW(b, p - 1/N)
    aux ALPHA    no bias; the loss has the term ALPHA N sum_e p_e P_e beside it, P_e the mean of s_e over the tokens
                 (Switch Transformer, 2101.03961, eq. 4): what the balancer is there to replace

For each run: the mean of the load entropy; its first step at 0.95 (110 if there is none before the change); level, the
mean over the 50 steps before the change; swing of an expert's load, the standard deviation over those steps; after
the change the lowest mean of 10 steps in a row, and how many steps such a mean is below 0.99 of the level; val loss at
the change. Of a rule with two sizes, the one with the higher level counts.

Refuted by: a sign rule that is no less even, swings no more, and is uneven no longer.

Legend:  N experts   M batch x sequence, the tokens of a step   p_e fraction of them that e got   s (M, N), P (N)
"""
import statistics
from pydoc_data import topics

import numpy as np
import torch
import torch.nn.functional as F

import router
import train
from evidence.claims import by_seed, run_claim, replaced, table, trained, verdict, with_seeds
from evidence.router import QUICK, derived, entropies, even_at, recipe, small

STEPS, CHANGE, EVERY = 150, 110, 2
SETTINGS = ['none', 'sign 0.003', 'sign 0.03', 'pid 0.003', 'pid 0.03', 'aux 0.01']


class Beside(torch.autograd.Function):
    """weight, unchanged; backward, `term` gets the gradient 1, as if it were added to the loss."""

    @staticmethod
    def forward(ctx, weight, term):
        return weight.clone()

    @staticmethod
    def backward(ctx, g):
        return g, g.new_ones(())


def auxiliary(probs, expert, alpha):
    """alpha N sum_e p_e P_e. probs (..., N), expert (...)."""
    N = probs.shape[-1]
    p = F.one_hot(expert.flatten(), N).float().mean(0)                          # counts have no gradient ...
    P = probs.flatten(0, -2).mean(0)                                            # ... probabilities have
    return alpha * N * (p * P).sum()


def with_auxiliary(alpha):
    """What takes the place of Router: one that has this term beside the loss."""
    def choose(probs, bias):
        expert, weight = router.choose(probs, bias)
        return expert, Beside.apply(weight, auxiliary(probs, expert, alpha)) if torch.is_grad_enabled() else weight

    def make(config, layer):
        made = router.Router(config, layer)
        made.choose = choose
        return made
    return make


def changing_at(change):
    """What takes the place of open_dataset: the same, but for the training data from step `change` on."""
    opened = train.open_dataset

    def open_dataset(dataset, split, B, S, seed):
        loader, tokenizer = opened(dataset, split, B, S, seed)
        tokens, code = torch.tensor(tokenizer.encode_ordinary(''.join(topics.topics.values()))), loader.batch

        def batch(step):
            if step < change:
                return code(step)
            begin = np.random.default_rng((seed, step)).integers(len(tokens) - S, size=B)
            windows = tokens[torch.from_numpy(begin)[:, None] + torch.arange(S + 1)]           # (B, S + 1)
            return windows[:, :-1], windows[:, 1:], None
        loader.batch = batch if split == 'train' else code
        return loader, tokenizer
    return open_dataset


def figures(log, change, window=10 // EVERY):
    """Of a run's log: what the table keeps of it."""
    steps, entropy = log['entropy']
    c = steps.index(change) + 1                                 # lines of the log before the change
    before = slice(c - 50 // EVERY, c)
    level = statistics.fmean(entropy[before])
    after = [statistics.fmean(entropy[i:i + window]) for i in range(c, len(entropy) - window + 1)]
    swing = statistics.fmean(statistics.stdev(values[before]) for name, (_, values) in log.items() if 'load_' in name)
    return {'even_at': int(even_at(steps[:c], entropy[:c])), 'level': level, 'swing': swing, 'falls_to': min(after),
            'uneven': EVERY * sum(value < 0.99 * level for value in after),
            'val_loss': dict(zip(*log['val_loss']))[change],
            **{f'entropy_{step:.0f}': value for step, value in zip(steps, entropy) if step % 10 == 0}}


def measure(setting, seed, folder, model_config, steps, change):
    rule, _, size = setting.partition(' ')
    form = with_auxiliary(float(size)) if rule == 'aux' else router.Router
    balancer = dict(balancer=rule, balancer_lr=float(size)) if rule in ('sign', 'pid') else dict(balancer='none')
    with replaced('model', Router=form), replaced('train', open_dataset=changing_at(change)):
        return figures(trained(f'{folder}/balancer/{setting} {seed}', model_config, eval_every=change, log_every=EVERY,
                               **recipe(steps, seed), **balancer), change)


def report(rows):
    """Print the table."""
    print('\n| rule, step | mean (seeds) | 0.95 at | level | swing | falls to | below (seeds) | val loss (seeds) |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- |')
    for setting in SETTINGS:
        cells = (with_seeds(by_seed(rows, setting, column), *form) for column, *form in (
            ('mean', '.3f'), ('even_at', '.0f', 0), ('level', '.3f', 0), ('swing', '.3f', 0), ('falls_to', '.3f', 0),
            ('uneven', '.0f'), ('val_loss', '.3f')))
        print(f'| {setting} | {" | ".join(cells)} |')


def judge(rows):
    """Print the verdicts."""
    level = lambda setting: statistics.fmean(by_seed(rows, setting, 'level'))
    pid, sign = (max((x for x in SETTINGS if x.startswith(rule)), key=level) for rule in ('pid', 'sign'))
    words = dict(even_at='even sooner', uneven='uneven for fewer steps', swing='swings less', val_loss='lower val loss')
    for other in sign, 'aux 0.01', 'none':
        for column in words:
            verdict(f'{pid} against {other}, {words[column]}', by_seed(rows, pid, column), by_seed(rows, other, column))
        verdict(f'{other} less even on average than {pid}', by_seed(rows, other, 'mean'), by_seed(rows, pid, 'mean'))


def main(config):
    rest = (f'{config.out}/quick', QUICK, 60, 50) if config.quick else (config.out, small(), STEPS, CHANGE)
    rows = derived(table('balancer', config, SETTINGS, lambda setting, seed: measure(setting, seed, *rest)))
    report(rows)
    judge(rows)


def draw(plt, rows):
    """From no balancing to a steady one; at the dotted line the text changes from code to prose."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
    for setting, color in zip(dict.fromkeys(row['setting'] for row in rows), plt.cm.tab10.colors):
        entropies(axis, rows, setting, color=color, label=setting)
    axis.axvline(CHANGE, color='black', linestyle=':', linewidth=1)
    axis.set(xlabel='step', ylabel='load entropy, 1: even', ylim=(0, 1.02))
    figure.legend(loc='outside upper center', ncols=3, frameon=False)
    return figure


if __name__ == '__main__':
    run_claim('balancer', main, draw)
