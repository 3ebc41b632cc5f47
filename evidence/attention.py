"""Compare CCA with other attention at equal parameters: `python -m evidence.attention [--seeds=N] [--quick=True]`.

Claim. At equal parameters and equal cache, CCA with grouped heads (CCGQA: ZAYA1's, and cca.py's) is better than GQA and
MLA and about as good as multi-head attention (arXiv 2510.04476). Published losses of 1B dense models: CCGQA 2.286, MHA
and GQA 2.297, CCA 2.307, MLA 2.321. A loss of CCGQA above that of GQA, MLA or MHA would refute the claim.

Test. Two dense layers of width 128 (one expert, so that routing plays no part) are trained on Python's standard library
with 512 tokens (`python -m data.stdlib.prepare --out=runs/stdlib512 --vocab_size=512`). The SwiGLU's width equalizes
the parameters within 1 %. Each kind uses the learning rate of a grid that is best with seed 0.
"""
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from cca import CCA
from evidence.baselines import GQA, MLA
from evidence.claims import (by_seed, compare, fill_table, print_settings, print_verdicts, replaced, run_claim,
                             train_run)
from model import Zaya, ZayaConfig

RATES = 2.5e-3, 5e-3, 1e-2, 2e-2
BASE = ZayaConfig(vocab_size=512, context=256, n_layer=2, n_embd=128, n_head=4, n_kv_head=1, head_dim=16, n_expert=1,
                  expert_dim=256, router_dim=8)
SETTINGS = dict(dataset='runs/stdlib512', batch_size=8, warmup_steps=30, eval_batches=40, dtype='float32')


def count_parameters(config, module):
    with replaced('model', CCA=module), torch.device('meta'):
        return sum(p.numel() for p in Zaya(config).parameters())


def match_parameters(module, **heads):
    """Return (module, config): BASE with these heads, and the SwiGLU width that gives BASE's parameter count."""
    config = replace(BASE, **heads)
    each = BASE.n_layer * 3 * BASE.n_embd * 8                   # parameters per 8 dimensions of width
    eights = round((count_parameters(BASE, CCA) - count_parameters(config, module)) / each)
    return module, replace(config, expert_dim=BASE.expert_dim + 8 * eights)


MODELS = {                                                      # all but MHA cache 32 elements per token and layer
    'MHA': match_parameters(GQA, n_head=8, n_kv_head=8),        # 8 heads of 16, each with its own key and value: 256
    'GQA': match_parameters(GQA, n_head=8),                     # 8 query heads of 16 share one key and one value
    'MLA': match_parameters(MLA, n_head=8),                     # 8 heads of 16; a latent of 24 and a rotated key of 8
    'CCA': match_parameters(CCA, n_head=2, n_kv_head=2, head_dim=8),            # 2 heads of 8 each for q, k and v
    'CCGQA': match_parameters(CCA)}                             # 4 query heads of 16 share one key and one value


def run(config, script, setting, seed, module, sizes, lr, steps=300):
    """Train a model of these sizes with `module` in place of CCA. Return its measurements."""
    start, length = time.perf_counter(), {'max_steps': 2, 'eval_batches': 1} if config.quick else {'max_steps': steps}
    folder = Path(config.folder(script), setting.replace(' ', '_'), str(seed))
    with replaced('model', CCA=module):
        log = train_run(folder, sizes, lr=lr, min_lr=lr / 10, seed=seed, **SETTINGS | length)
    attention = sum(p.numel() for p in module(sizes, 0).parameters())
    return {'val_loss': log['val_loss'][1][-1], 'parameters': count_parameters(sizes, module),
            'cache': 2 * sizes.n_kv_head * sizes.head_dim,      # elements per token and layer
            'attention_flops': 2 * attention + 2 * sizes.n_head * sizes.head_dim * sizes.context,  # of a layer, forward
            'tokens': int(log['tokens'][1][-1]), 'seconds': time.perf_counter() - start}


def best(rows):
    """Return {name: its setting 'NAME at LR' with the lowest loss of seed 0}."""
    loss = {row['setting']: float(row['val_loss']) for row in rows if row['seed'] == '0'}
    return {name: min((s for s in loss if s.split()[0] == name), key=loss.get) for name in MODELS}


def main(config):
    def measure(setting, seed):
        name, _, lr = setting.split()
        return run(config, 'attention', setting, seed, *MODELS[name], float(lr))
    grid = [f'{name} at {lr:g}' for lr in RATES for name in MODELS]
    chosen = best(fill_table('attention', config, grid, measure, seeds=[0]))
    rows = fill_table('attention', config, list(chosen.values()), measure)
    rows = [row | {'setting': name, 'lr': setting.split()[-1]} for name, setting in chosen.items()
            for row in rows if row['setting'] == setting]
    print_settings(rows, chosen, parameters=('parameters', ',.0f'), cache=('cache, elements per token', '.0f'),
                   attention_flops=('attention FLOPs per token', ',.0f'), lr=('learning rate', 'g'),
                   val_loss=('val loss, nats per token', '.3f'))
    print_verdicts(compare(rows, 'val_loss', 'nats', *(('CCGQA', other) for other in ('GQA', 'MLA', 'MHA', 'CCA'))))


def draw(figure, rows):
    """Plot the loss of each kind of attention at equal parameters, one dot per seed."""
    axis = figure.subplots()
    for x, (name, setting) in enumerate(best(rows).items()):
        losses = by_seed(rows, setting, 'val_loss')
        axis.plot([x] * len(losses), losses, 'o', color='tab:blue' if name == 'CCGQA' else 'tab:gray', markersize=5)
        axis.plot([x - 0.2, x + 0.2], [statistics.fmean(losses)] * 2, color='black')
    labels = [f'{name}\ncache {2 * sizes.n_kv_head * sizes.head_dim}' for name, (_, sizes) in MODELS.items()]
    axis.set(xticks=range(len(MODELS)), xticklabels=labels, ylabel='validation loss, nats per token')


if __name__ == '__main__':
    run_claim('attention', main, draw)
