"""Does the router's form keep the experts evenly busy? `python -m evidence.router`, then again after any stop.

Claim (ZAYA1-8B report, arXiv 2605.05365, II-A2 and Fig. 4). A linear router first collapses; an MLP whose state is
averaged over depth (EDA) is even early. Published, for a fresh model of 1.8B parameters: load entropy, the mean over
the layers of H(p) / ln N, passes 0.99 by about step 400 with MLP + EDA; with a linear router it falls to about 0.1
first, and takes about 900 steps. That it comes back shows that a balancer was at work.

Test. Three routers, in the place of model.py's, each with the balancer and, to see what they do by themselves, without:

    linear       s = softmax(W h)
    mlp          router.py without EDA: r_l = W_down h_l + b_down
    mlp + eda    router.py as it is

and the last two once more in a model of 12 thin layers, where EDA has more depth to average over. The learning rate
does not decay, as in the first steps of a long run. For each run: the first step with a load entropy of 0.99 (the run's
length if there is none), the lowest entropy on the way, and the loss on held-out files.

Refuted by: a linear router that is even no later, or whose lowest entropy is no lower, than MLP + EDA; EDA is
not needed for it if the MLP alone does no worse.

Legend:  N experts   h (B, S, E) normed x   s (B, S, N)
"""
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

import configurator
import router
from evidence.claims import RESULTS, ClaimConfig, by_seed, read_table, replaced, table, trained, verdict, with_seeds
from layers import wide
from model import ZayaConfig, sizes

STEPS, EVERY, EVEN = 400, 10, 0.99


class Linear(nn.Module):
    """What most mixtures of experts have: one matrix. forward: as Router's, but it has no state to hand up."""

    def __init__(self, config, layer):
        super().__init__()
        self.n_expert = config.n_expert
        self.out_proj = nn.Linear(config.n_embd, self.n_expert, bias=False)     # W
        self.register_buffer('balancing_bias', torch.zeros(self.n_expert))
        self.register_buffer('load', torch.zeros(self.n_expert, dtype=torch.int64), persistent=False)

    def forward(self, x, r_below=None):
        probs = wide(self.out_proj(x)).softmax(-1)                              # s (B, S, N), float32
        expert, weight = router.choose(probs, self.balancing_bias)
        if self.training:
            self.load += F.one_hot(expert.flatten(), self.n_expert).sum(0)
        return expert, weight, None


class NoEDA(router.Router):
    """The MLP, but every layer decides as the first does: from its own input alone."""

    def __init__(self, config, layer):
        super().__init__(config, 0)


ROUTERS = {'linear': Linear, 'mlp': NoEDA, 'mlp + eda': router.Router}
SETTINGS = [f'{name}, {rule}' for rule in ('pid', 'none') for name in ROUTERS] + [
    f'{name}, pid, 12 layers' for name in ('mlp', 'mlp + eda')]


def small(n_layer=4, width=64, context=96):
    return ZayaConfig(n_layer=n_layer, n_embd=width, n_head=4, n_kv_head=1, head_dim=width // 8, n_expert=8,
                      expert_dim=width, router_dim=width // 2, context=context)


QUICK = small(2, 32, 16)


def recipe(config, seed):
    """What all runs share, as settings of train.py."""
    return dict(seed=seed, max_steps=20 if config.quick else STEPS, batch_size=8, lr=6e-3, warmup_steps=20,
                decay_fraction=0.0, log_every=EVERY, dtype='float32')


def figures(log, model_config):
    """Of a run's log: what the table keeps of it."""
    steps, entropy = log['entropy']
    n, tokens = sizes(model_config), log['tokens'][1]
    seconds = sum((b - a) / speed for a, b, speed in zip(tokens, tokens[1:], log['tokens_per_s'][1]))
    return {'val_loss': log['val_loss'][1][-1], 'lowest': min(entropy), 'even_at': even_at(steps, entropy),
            'parameters': n['total'], 'active': n['active'], 'tokens': int(tokens[-1]), 'seconds': round(seconds),
            **{f'entropy_{step:.0f}': value for step, value in zip(steps, entropy)}}


def even_at(steps, entropy):
    """The first step with an even load; the last step of the run if there is none."""
    return int(next((step for step, value in zip(steps, entropy) if value >= EVEN), steps[-1]))


def measure(config):
    def one(setting, seed):
        name, rule, *deep = setting.split(', ')
        model_config = QUICK if config.quick else small(12) if deep else small()
        with replaced('model', Router=ROUTERS[name]):
            log = trained(f'{config.out}/router/{"quick " * config.quick}{setting} {seed}', model_config, balancer=rule,
                          **recipe(config, seed))
            return figures(log, model_config)
    return one


def report(rows):
    """Print the table and the verdicts."""
    print('\n| router, balancer | lowest load entropy (seeds) | at the end | even at step (seeds) | val loss (seeds) |')
    print('| --- | --- | --- | --- | --- |')
    last = max((column for column in rows[0] if column.startswith('entropy_')), key=lambda name: int(name[8:]))
    get = lambda setting, column: by_seed(rows, setting, column)
    for setting in SETTINGS:
        never = ', none' in setting and min(get(setting, 'even_at')) == int(last[8:])
        print(f'| {setting} | {with_seeds(get(setting, "lowest"), ".2f")} | {with_seeds(get(setting, last), ".3f", 0)} '
              f'| {"never" if never else with_seeds(get(setting, "even_at"), ".0f")} '
              f'| {with_seeds(get(setting, "val_loss"), ".3f")} |')
    print()
    for column, words in (('even_at', 'is even sooner'), ('val_loss', 'has the lower val loss')):
        verdict(f'mlp + eda {words} than linear, steps' if column == 'even_at' else f'mlp + eda {words} than linear',
                get('mlp + eda, pid', column), get('linear, pid', column))
        verdict(f'mlp + eda {words} than mlp', get('mlp + eda, pid', column), get('mlp, pid', column))
        verdict(f'the same in 12 layers', *(get(f'{name}, pid, 12 layers', column) for name in ('mlp + eda', 'mlp')))
    verdict('linear falls lower than mlp + eda, with the balancer', get('linear, pid', 'lowest'),
            get('mlp + eda, pid', 'lowest'))
    verdict('... and without it', get('linear, none', 'lowest'), get('mlp + eda, none', 'lowest'))


def main(config):
    report(table('router', config, SETTINGS, measure(config)))


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.router', '', 'the same command goes on where it was'):
        main(*configurator.read(sys.argv[1:], ClaimConfig))
