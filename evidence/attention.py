"""Is CCA as good as the attention it is cheaper than? `python -m evidence.attention [--seeds=N] [--quick=True]`.

Claim. At equal parameters and equal cache, attention in the latent with grouped heads (CCGQA, which is ZAYA1's and
cca.py's) is better than GQA and MLA, and about as good as full multi-head attention, at less cost (CCA paper, arXiv
2510.04476). Published: loss of 1B dense models, CCGQA 2.286, MHA 2.297, GQA 2.297, CCA 2.307, MLA 2.321.

Test. Two dense layers of width 128 (one expert, so that no router blurs the picture) learn Python's standard library in
512 tokens (`python -m data.stdlib.prepare --out=runs/stdlib512 --vocab_size=512`). All have equally many parameters,
which the SwiGLU's width evens out within 1 %, and but for MHA the same cache, 32 numbers a token and layer:

    MHA     8 heads of 16, each with its own key and value: nothing is compressed, 256 numbers
    GQA     8 query heads of 16 on one key and one value
    MLA     8 heads of 16 whose keys and values come up from one latent of 24 numbers and a rotated key of 8
    CCA     queries compressed as much as keys and values: 2 heads of 8 for each of them
    CCGQA   4 query heads of 16 on one key and one value

Each takes the learning rate of a grid that is best with seed 0; then they are compared over seeds. CCGQA above GQA, MLA
or MHA would refute.
"""
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from cca import CCA
from evidence.baselines import GQA, MLA
from evidence.claims import by_seed, run_claim, replaced, table, trained, verdict, with_seeds
from model import Zaya, ZayaConfig

RATES = 2.5e-3, 5e-3, 1e-2, 2e-2
BASE = ZayaConfig(vocab_size=512, context=256, n_layer=2, n_embd=128, n_head=4, n_kv_head=1, head_dim=16, n_expert=1,
                  expert_dim=256, router_dim=8)
SETTINGS = dict(dataset='runs/stdlib512', batch_size=8, warmup_steps=30, eval_batches=40, dtype='float32')


def count(config, module):
    with replaced('model', CCA=module), torch.device('meta'):
        return sum(p.numel() for p in Zaya(config).parameters())


def matched(module, **heads):
    """(module, config): the base with these heads, and with the SwiGLU's width that gives the base's parameters."""
    config = replace(BASE, **heads)
    each = BASE.n_layer * 3 * BASE.n_embd * 8                   # parameters of eight more dims
    eights = round((count(BASE, CCA) - count(config, module)) / each)
    return module, replace(config, expert_dim=BASE.expert_dim + 8 * eights)


MODELS = {'MHA': matched(GQA, n_head=8, n_kv_head=8), 'GQA': matched(GQA, n_head=8), 'MLA': matched(MLA, n_head=8),
          'CCA': matched(CCA, n_head=2, n_kv_head=2, head_dim=8), 'CCGQA': matched(CCA)}


def run(config, script, setting, seed, module, sizes, lr, steps=300):
    """One run of a table: a model of these sizes with `module` in CCA's place. Return its figures."""
    began, length = time.perf_counter(), {'max_steps': 2, 'eval_batches': 1} if config.quick else {'max_steps': steps}
    folder = Path(config.folder(script), setting.replace(' ', '_'), str(seed))
    with replaced('model', CCA=module):
        log = trained(folder, sizes, lr=lr, min_lr=lr / 10, seed=seed, **SETTINGS | length)
    attention = sum(p.numel() for p in module(sizes, 0).parameters())
    return {'val_loss': log['val_loss'][1][-1], 'parameters': count(sizes, module),
            'cache': 2 * sizes.n_kv_head * sizes.head_dim,      # numbers a token and layer
            'attention_flops': 2 * attention + 2 * sizes.n_head * sizes.head_dim * sizes.context,  # of a layer, forward
            'tokens': int(log['tokens'][1][-1]), 'seconds': time.perf_counter() - began}


def best(rows):
    """{name: its setting 'NAME at LR' with the lowest loss of seed 0}."""
    loss = {row['setting']: float(row['val_loss']) for row in rows if row['seed'] == '0'}
    return {name: min((s for s in loss if s.split()[0] == name), key=loss.get) for name in MODELS}


def measure(config, setting, seed):
    name, _, lr = setting.split()
    return run(config, 'attention', setting, seed, *MODELS[name], float(lr))


def main(config):
    grid = [f'{name} at {lr:g}' for lr in RATES for name in MODELS]
    chosen = best(table('attention', config, grid, partial(measure, config), seeds=[0]))
    rows = table('attention', config, list(chosen.values()), partial(measure, config))
    losses = {name: by_seed(rows, setting, 'val_loss') for name, setting in chosen.items()}
    print('| attention | parameters | cache, numbers | attention, FLOPs a token | learning rate | val loss (seeds) |')
    print('| --- | --- | --- | --- | --- | --- |')
    for name, setting in chosen.items():
        row = next(row for row in rows if row['setting'] == setting)
        print(f'| {name} | {int(row["parameters"]):,} | {row["cache"]} | {int(row["attention_flops"]):,} '
              f'| {setting.split()[-1]} | {with_seeds(losses[name], ".4f")} |')
    for other in 'GQA', 'MLA', 'MHA', 'CCA':
        verdict(f'CCGQA below {other}', losses['CCGQA'], losses[other])


def draw(plt, rows):
    """At equal parameters: the loss of each kind of attention, a dot a seed."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
    for x, (name, setting) in enumerate(best(rows).items()):
        losses = by_seed(rows, setting, 'val_loss')
        axis.plot([x] * len(losses), losses, 'o', color='tab:blue' if name == 'CCGQA' else 'tab:gray', markersize=5)
        axis.plot([x - 0.2, x + 0.2], [statistics.fmean(losses)] * 2, color='black')
    labels = [f'{name}\ncache {2 * sizes.n_kv_head * sizes.head_dim}' for name, (_, sizes) in MODELS.items()]
    axis.set(xticks=range(len(MODELS)), xticklabels=labels, ylabel='loss on held-out files, nats a token')
    return figure


if __name__ == '__main__':
    run_claim('attention', main, draw)
