"""Compare rules that balance the load of the experts: `python -m evidence.balancer`; the same command resumes.

Claim (ZAYA1-8B report, arXiv 2605.05365, II-A2). AdamW on the balancing biases, with the error p_e - 1/N as gradient,
balances better than DeepSeek's fixed step against the sign of the error. Published: an entropy of 0.99 at about step
400 (Fig. 4). A sign rule that is as even, swings as little and recovers as fast would refute the claim.

Test. The model of evidence/router.py, 150 steps at a constant learning rate; from step 110 on, the training text
changes to English prose about Python (pydoc's topics, which data/stdlib excludes). A rule with two step sizes is judged
by the one with the higher load entropy before the change.

Legend:  N experts   M tokens per step   p_e fraction of them routed to expert e   s (M, N) probabilities   P (N)
"""
import statistics
from pydoc_data import topics

import numpy as np
import torch
import torch.nn.functional as F

import train
from evidence.claims import (by_seed, compare, fill_table, print_settings, print_verdicts, replaced, run_claim,
                             train_run)
from evidence.router import QUICK, derived, entropies, even_at, recipe, small
from router import choose

STEPS, CHANGE, EVERY = 150, 110, 2
# sign LR: b <- b - LR sign(p - 1/N). pid LR: b <- AdamW(b, p - 1/N). aux ALPHA: no bias, but an auxiliary loss, which
# the balancer is meant to replace.
SETTINGS = ['none', 'sign 0.003', 'sign 0.03', 'pid 0.003', 'pid 0.03', 'aux 0.01']


class AddToLoss(torch.autograd.Function):
    """Return weight unchanged; in backward, `term` gets gradient 1, as if it were added to the loss."""

    @staticmethod
    def forward(ctx, weight, term):
        return weight.clone()

    @staticmethod
    def backward(ctx, g):
        return g, g.new_ones(())


def auxiliary(probs, expert, alpha):
    """Return alpha N sum_e p_e P_e, P_e the mean of s_e over the tokens (Switch Transformer, arXiv 2101.03961, eq. 4).
    probs (..., N), expert (...)."""
    N = probs.shape[-1]
    p = F.one_hot(expert.flatten(), N).float().mean(0)                          # counts have no gradient,
    P = probs.flatten(0, -2).mean(0)                                            # probabilities have one
    return alpha * N * (p * P).sum()


def with_auxiliary(alpha):
    """Return a replacement of router.choose that adds the auxiliary loss."""
    def choose_and_add(probs, bias):
        expert, weight = choose(probs, bias)
        return expert, AddToLoss.apply(weight, auxiliary(probs, expert, alpha)) if torch.is_grad_enabled() else weight
    return choose_and_add


def changing_at(change):
    """Return a replacement of open_dataset whose training data changes at step `change`."""
    original = train.open_dataset

    def open_dataset(dataset, split, B, S, seed):
        loader, tokenizer = original(dataset, split, B, S, seed)
        tokens, code = torch.tensor(tokenizer.encode_ordinary(''.join(topics.topics.values()))), loader.batch

        def batch(step):
            if step < change:
                return code(step)
            first = np.random.default_rng((seed, step)).integers(len(tokens) - S, size=B)
            windows = tokens[torch.from_numpy(first)[:, None] + torch.arange(S + 1)]           # (B, S + 1)
            return windows[:, :-1], windows[:, 1:], None
        loader.batch = batch if split == 'train' else code
        return loader, tokenizer
    return open_dataset


def summarize(log, change, window=10 // EVERY):
    """Return the measurements of a run, from its log: level, the mean entropy over the 50 steps before the change, and
    swing, the standard deviation of an expert's load over them; after it, the lowest moving average over 10 steps, and
    for how many steps it is below 0.99 of the level."""
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
    chooser = with_auxiliary(float(size)) if rule == 'aux' else choose
    balancer = dict(balancer=rule, balancer_lr=float(size)) if rule in ('sign', 'pid') else dict(balancer='none')
    with replaced('router', choose=chooser), replaced('train', open_dataset=changing_at(change)):
        return summarize(train_run(f'{folder}/balancer/{setting} {seed}', model_config, eval_every=change,
                                   log_every=EVERY, **recipe(steps, seed), **balancer), change)


def main(config):
    rest = (f'{config.out}/quick', QUICK, 60, 50) if config.quick else (config.out, small(), STEPS, CHANGE)
    rows = derived(fill_table('balancer', config, SETTINGS, lambda setting, seed: measure(setting, seed, *rest)))
    print_settings(rows, SETTINGS, mean=('mean entropy', '.3f'), even_at=('first step at 0.95', '.0f'),
                   level=('level', '.3f'), uneven=('uneven steps after the change', '.0f'),
                   val_loss=('val loss, nats per token', '.3f'))
    level = lambda setting: statistics.fmean(by_seed(rows, setting, 'level'))
    pid, sign = (max((x for x in SETTINGS if x.startswith(rule)), key=level) for rule in ('pid', 'sign'))
    pairs = [(pid, other) for other in (sign, 'aux 0.01', 'none')]
    units = dict(even_at='steps', uneven='steps', swing='', val_loss='nats')
    print_verdicts([line for column, unit in units.items() for line in compare(rows, column, unit, *pairs)]
                   + compare(rows, 'mean', '', *(pair[::-1] for pair in pairs)))


def draw(figure, rows):
    """Plot the load entropy of each rule; at the dotted line the text changes from code to prose."""
    axis = figure.subplots()
    for i, setting in enumerate(SETTINGS):
        entropies(axis, rows, setting, color=f'C{i}', label=setting)
    axis.axvline(CHANGE, color='black', linestyle=':', linewidth=1)
    axis.set(xlabel='step', ylabel='load entropy (1: even)', ylim=(0, 1.02))


if __name__ == '__main__':
    run_claim('balancer', main, draw)
