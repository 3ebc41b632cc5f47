"""Does the router's form keep the experts evenly busy? `python -m evidence.router`, then again after any stop.

Claim (ZAYA1-8B report, arXiv 2605.05365, II-A2 and Fig. 4). A linear router first collapses; an MLP whose state is
averaged over depth (EDA) is even early. Published, a fresh model of 1.8B parameters: load entropy, the layers' mean of
H(p) / ln N, passes 0.99 by about step 400 with MLP + EDA; with a linear router it falls to about 0.1 first, and takes
about 900 steps. That it comes back shows that a balancer was at work.

Test. Three routers, in the place of model.py's, each with the balancer and, to see what they do by themselves, without:

    linear       s = softmax(W h)
    mlp          router.py without EDA: r_l = W_down h_l + b_down
    mlp + eda    router.py as it is

and the last two once more in 12 thin layers, where EDA has more depth to average over. 400 steps (100 in 12 layers) of
768 tokens, so that 0.95 is the line within reach; no decay of the learning rate, as at the start of a long run. Of the
entropy, every 10 steps: its lowest value, mean, first step at the line (else the run's length); at the end val loss.

Refuted by: a linear router whose entropy falls no lower, or is no lower on average, than that of MLP + EDA.

Legend:  N experts   h (B, S, E) normed x   s (B, S, N)
"""
import statistics

import torch
import torch.nn.functional as F
from torch import nn

import router
from evidence.claims import by_seed, run_claim, replaced, table, trained, verdict, with_seeds
from layers import upcast
from model import ZayaConfig, sizes

STEPS, DEEP_STEPS, EVERY, EVEN = 400, 100, 10, 0.95


class Linear(nn.Module):
    """What most mixtures of experts have: one matrix. forward: as Router's, but it has no state to hand up."""

    def __init__(self, config, layer):
        super().__init__()
        self.n_expert = config.n_expert
        self.out_proj = nn.Linear(config.n_embd, self.n_expert, bias=False)     # W
        self.register_buffer('balancing_bias', torch.zeros(self.n_expert))
        self.register_buffer('load', torch.zeros(self.n_expert, dtype=torch.int64), persistent=False)

    def forward(self, x, r_below=None):
        probs = upcast(self.out_proj(x)).softmax(-1)                              # s (B, S, N), float32
        expert, weight = router.choose(probs, self.balancing_bias)
        if self.training:
            self.load += F.one_hot(expert.flatten(), self.n_expert).sum(0)
        return expert, weight, None


class NoEDA(router.Router):
    """The MLP, but every layer decides as the first does: from its own input alone."""
    def __init__(self, config, layer):
        super().__init__(config, 0)


ROUTERS = {'linear': Linear, 'mlp': NoEDA, 'mlp + eda': router.Router}
SETTINGS = [f'{name}, {rule}' for rule in ('pid', 'none') for name in ROUTERS]
DEEP = ['mlp, pid', 'mlp + eda, pid']                           # of 12 layers, a table of its own


def small(n_layer=4, width=64, context=96):
    return ZayaConfig(n_layer=n_layer, n_embd=width, n_head=4, n_kv_head=1, head_dim=width // 8, n_expert=8,
                      expert_dim=width, router_dim=width // 2, context=context)


QUICK = small(1, 32, 16)


def recipe(steps, seed):
    """What all runs share, as settings of train.py."""
    return dict(seed=seed, max_steps=steps, batch_size=8, lr=6e-3, warmup_steps=20, decay_fraction=0.0, dtype='float32')


def figures(log, model_config):
    """Of a run's log: what the table keeps of it."""
    (steps, entropy), n, tokens = log['entropy'], sizes(model_config), log['tokens'][1]
    seconds = sum((b - a) / speed for a, b, speed in zip(tokens, tokens[1:], log['tokens_per_s'][1]))
    return {'val_loss': log['val_loss'][1][-1], 'lowest': min(entropy), 'parameters': n['total'],
            'active': n['active'], 'tokens': int(tokens[-1]), 'seconds': round(seconds),
            **{f'entropy_{step:.0f}': value for step, value in zip(steps, entropy)}}


def even_at(steps, entropy):
    """The first step with an even load; the last step of the run if there is none."""
    return next((step for step, value in zip(steps, entropy) if value >= EVEN), steps[-1])


def measure(setting, seed, folder, model_config, steps):
    form, rule = setting.split(', ')
    with replaced('model', Router=ROUTERS[form]):
        return figures(trained(f'{folder}/{setting} {seed}', model_config, balancer=rule, log_every=EVERY,
                               **recipe(steps, seed)), model_config)


def curve(row):
    """(steps, entropies) of a row."""
    return zip(*[(int(key[8:]), float(value)) for key, value in row.items() if key.startswith('entropy_') and value])


def derived(rows):
    """The rows, with two figures more, of their entropies."""
    return [{'mean': statistics.fmean(entropy), 'even_at': even_at(steps, entropy)} | row
            for row in rows for steps, entropy in [curve(row)]]


def report(*tables):
    """Print one table of both."""
    print('\n| router, balancer | lowest entropy (seeds) | mean (seeds) | 0.95 at step (seeds) | val loss (seeds) |')
    print('| --- | --- | --- | --- | --- |')
    for rows, settings, label in zip(tables, (SETTINGS, DEEP), ('', ', 12 layers')):
        for setting in settings:
            cells = [with_seeds(by_seed(rows, setting, column), form) for column, form in (
                ('lowest', '.2f'), ('mean', '.3f'), ('even_at', '.0f'), ('val_loss', '.3f'))]
            print(f'| {setting}{label} | {" | ".join(cells)} |')


def judge(rows, deep):
    """Print the verdicts."""
    get = lambda form, column, rule='pid': by_seed(rows, f'{form}, {rule}', column)
    for form in 'linear', 'mlp':
        for rule in 'pid', 'none':
            for column, words in (('lowest', 'falls lower'), ('mean', 'is less even on average')):
                verdict(f'balancer {rule}: {form} {words} than mlp + eda', get(form, column, rule),
                        get('mlp + eda', column, rule))
        for column in 'even_at', 'val_loss':
            verdict(f'balancer pid, {column}: mlp + eda below {form}', get('mlp + eda', column), get(form, column))
    verdict('12 layers: mlp is less even on average than mlp + eda', *(by_seed(deep, name, 'mean') for name in DEEP))
    verdict('12 layers, val loss: mlp + eda below mlp', *(by_seed(deep, name, 'val_loss') for name in DEEP[::-1]))


def main(config):
    tables = []
    for name, settings, *rest in ('router', SETTINGS, small(), STEPS), ('router_deep', DEEP, small(12), DEEP_STEPS):
        rest = (f'{config.out}/quick_{name}', QUICK, 10) if config.quick else (f'{config.out}/{name}', *rest)
        tables += [derived(table(name, config, settings, lambda setting, seed: measure(setting, seed, *rest)))]
    report(*tables)
    judge(*tables)


def entropies(axis, rows, setting, **style):
    """The load entropy over the steps: the mean over the seeds, and all that lies between them."""
    rows = [row for row in rows if row['setting'] == setting]
    steps = [key for key in rows[0] if key.startswith('entropy_') and rows[0][key]]
    x, y = [int(key[8:]) for key in steps], [[float(row[key]) for row in rows] for key in steps]
    axis.plot(x, list(map(statistics.fmean, y)), **style)
    axis.fill_between(x, list(map(min, y)), list(map(max, y)), color=style['color'], alpha=0.15, linewidth=0)


def draw(plt, rows):
    """By itself every router collapses; with the balancer none does."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
    for form, color in ('linear', 'tab:orange'), ('mlp', 'tab:green'), ('mlp + eda', 'tab:blue'):
        for rule, style in ('pid', '-'), ('none', '--'):
            entropies(axis, rows, f'{form}, {rule}', color=color, linestyle=style,
                      label=f'{form}, {"balancer" if rule == "pid" else "none"}')
    axis.set(xlabel='step', ylabel='load entropy, 1: even', ylim=(0, 1.02))
    figure.legend(loc='outside upper center', ncols=3, frameon=False)
    return figure


if __name__ == '__main__':
    run_claim('router', main, draw)
