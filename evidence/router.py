"""Compare routers by how evenly they load the experts: `python -m evidence.router`; the same command resumes.

Claim (ZAYA1-8B report, arXiv 2605.05365, II-A2 and Fig. 4). A linear router collapses at the start of training; an MLP
router with Exponential Depth Averaging (EDA) is balanced early. Published, a new model of 1.8B parameters: the load
entropy, H(p) / ln N averaged over layers, passes 0.99 at about step 400 with MLP + EDA; with a linear router it falls
to about 0.1 and recovers by about step 900, which shows that a balancer was active. A linear router whose entropy is
not lower, at its minimum or on average, would refute the claim.

Test. Three routers, each with the balancer (pid) and without (none); 768 tokens per step, too few to reach 0.99, so the
threshold is 0.95. The learning rate does not decay, as at the start of a long run.

Legend:  N experts   h (B, S, E) normed x   s (B, S, N)
"""
import statistics

import torch
import torch.nn.functional as F
from torch import nn

import router
from evidence.claims import compare, fill_table, print_settings, print_verdicts, replaced, run_claim, train_run
from layers import upcast
from model import ZayaConfig, sizes

STEPS, DEEP_STEPS, EVERY, EVEN = 400, 100, 10, 0.95


class Linear(nn.Module):
    """The usual router, s = softmax(W h). forward: like Router's, but without a state for the next layer."""

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
    """The MLP router without EDA: each layer's is constructed as layer 0's, which has no layer below."""

    def __init__(self, config, layer):
        super().__init__(config, 0)


ROUTERS = {'linear': Linear, 'mlp': NoEDA, 'mlp + eda': router.Router}
SETTINGS = [f'{name}, {rule}' for rule in ('pid', 'none') for name in ROUTERS]
DEEP = ['mlp, pid', 'mlp + eda, pid']                           # of 12 layers, in a separate table


def small(n_layer=4, width=64, context=96):
    return ZayaConfig(n_layer=n_layer, n_embd=width, n_head=4, n_kv_head=1, head_dim=width // 8, n_expert=8,
                      expert_dim=width, router_dim=width // 2, context=context)


QUICK = small(1, 32, 16)


def recipe(steps, seed):
    """Return the settings of train.py that all runs share."""
    return dict(seed=seed, max_steps=steps, batch_size=8, lr=6e-3, warmup_steps=20, decay_fraction=0.0, dtype='float32')


def even_at(steps, entropy):
    """Return the first step with an even load, or the last step of the run if there is none."""
    return next((step for step, value in zip(steps, entropy) if value >= EVEN), steps[-1])


def measure(setting, seed, folder, model_config, steps):
    form, rule = setting.split(', ')
    with replaced('model', Router=ROUTERS[form]):
        log = train_run(f'{folder}/{setting} {seed}', model_config, balancer=rule, log_every=EVERY,
                        **recipe(steps, seed))
    n, (steps, entropy), (_, tokens) = sizes(model_config), log['entropy'], log['tokens']
    seconds = sum((b - a) / speed for a, b, speed in zip(tokens, tokens[1:], log['tokens_per_s'][1]))
    return {'val_loss': log['val_loss'][1][-1], 'lowest': min(entropy), 'parameters': n['total'],
            'active': n['active'], 'tokens': int(tokens[-1]), 'seconds': round(seconds),
            **{f'entropy_{step:.0f}': value for step, value in zip(steps, entropy)}}


def curve(row):
    """Return (steps, entropies) of one run."""
    return zip(*[(int(key[8:]), float(value)) for key, value in row.items() if key.startswith('entropy_') and value])


def derived(rows):
    """Add to each run the mean of its entropies and the first even step."""
    return [{'mean': statistics.fmean(entropy), 'even_at': even_at(steps, entropy)} | row
            for row in rows for steps, entropy in [curve(row)]]


def main(config):
    def table(name, settings, model_config, steps):
        rest = (QUICK, 10) if config.quick else (model_config, steps)
        return derived(fill_table(name, config, settings,
                                  lambda setting, seed: measure(setting, seed, config.folder(name), *rest)))
    rows = table('router', SETTINGS, small(), STEPS)
    rows += [row | {'setting': f'{row["setting"]}, 12 layers'}
             for row in table('router_deep', DEEP, small(12), DEEP_STEPS)]
    print_settings(rows, dict.fromkeys(row['setting'] for row in rows), lowest=('lowest entropy', '.2f'),
                   mean=('mean entropy', '.3f'), even_at=('first step at 0.95', '.0f'),
                   val_loss=('val loss, nats per token', '.3f'))
    pairs = [(f'{form}, {end}', f'mlp + eda, {end}') for form, end in (
        ('linear', 'pid'), ('mlp', 'pid'), ('linear', 'none'), ('mlp', 'none'), ('mlp', 'pid, 12 layers'))]
    lower = [pair[::-1] for pair in pairs]
    print_verdicts(compare(rows, 'lowest', '', *pairs) + compare(rows, 'mean', '', *pairs)
                   + compare(rows, 'even_at', 'steps', *lower[:2])
                   + compare(rows, 'val_loss', 'nats', *lower, ('mlp + eda, none', 'mlp + eda, pid')))


def entropies(axis, rows, setting, **style):
    """Plot the load entropy over the steps: the mean over seeds, and the range between them."""
    (x, *_), per_run = zip(*(curve(row) for row in rows if row['setting'] == setting))
    y = list(zip(*per_run))                                     # one tuple of runs per step
    axis.plot(x, list(map(statistics.fmean, y)), **style)
    axis.fill_between(x, list(map(min, y)), list(map(max, y)), color=style['color'], alpha=0.15, linewidth=0)


def draw(figure, rows):
    """Plot the load entropy of each router, with the balancer and without it."""
    axis = figure.subplots()
    for form, color in ('linear', 'tab:orange'), ('mlp', 'tab:green'), ('mlp + eda', 'tab:blue'):
        for rule, style in ('pid', '-'), ('none', '--'):
            entropies(axis, rows, f'{form}, {rule}', color=color, linestyle=style,
                      label=f'{form}, {"with balancer" if rule == "pid" else "without"}')
    axis.set(xlabel='step', ylabel='load entropy (1: even)', ylim=(0, 1.02))


if __name__ == '__main__':
    run_claim('router', main, draw)
