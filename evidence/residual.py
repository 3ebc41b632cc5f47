"""Test whether residual scaling bounds the residual stream: `python -m evidence.residual [--seeds=N] [--quick=True]`.

Claim. With four learned vectors per sublayer, x <- (x + b_r) a_r + (f + b_f) a_f instead of x + f, the residual stream
does not grow through 40 layers, at negligible cost (ZAYA1-8B report, arXiv 2605.05365, II-A and eq. 6). No figure and
no ablation is published. More growth (the RMS after the last layer divided by that after the first, at the end of
training), a larger RMS after the last layer, or a higher loss than without scaling would refute the claim.

Test. 40 thin dense layers (width 32, one expert) are trained on Python's standard library with 512 tokens, with
residual scaling and with the plain sum. The 3 % more parameters are not compensated for. The gradient norms are those
of the parameters that both kinds of layer have, after clipping, so only their shape is meaningful.
"""
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import configurator
import train
from evidence.attention import SETTINGS
from evidence.claims import compare, fill_table, print_settings, print_verdicts, replaced, run_claim, train_run
from evidence.plot import by_layer
from layers import ResidualScaling, upcast
from model import Zaya, ZayaConfig

SIZES = ZayaConfig(vocab_size=512, context=64, n_layer=40, n_embd=32, n_head=2, n_kv_head=1, head_dim=8, n_expert=1,
                   expert_dim=64, router_dim=8)
STEPS, PARTS = 100, 4                                           # measured at the start and PARTS times after it


class PlainSum(nn.Module):
    """x + f, in place of ResidualScaling."""

    def __init__(self, dim):
        super().__init__()

    def forward(self, x, f):
        return x + upcast(f)


SCALINGS = {'plain sum': PlainSum, 'residual scaling': ResidualScaling}


def log_gradient_norms(path, every):
    """Return a make_optimizers whose first optimizer appends the gradient norm of each layer to the file, at the first
    and at each `every`-th step. Clipping scales all layers by the same factor."""
    def make_optimizers(model, *args):
        optimizers, steps = original(model, *args), []
        path.unlink(missing_ok=True)

        def log(*_):
            steps.append(len(steps) + 1)
            if steps[-1] == 1 or steps[-1] % every == 0:
                norms = [torch.stack([p.grad.norm() for name, p in layer.named_parameters()
                                      if 'residual' not in name and p.grad is not None]).norm().item()
                         for layer in model.layers]
                with open(path, 'a') as file:
                    print(*(f'{norm:.4g}' for norm in norms), file=file)
        optimizers[0].register_step_pre_hook(log)
        return optimizers
    original = train.make_optimizers
    return make_optimizers


def measure(config, setting, seed):
    """Train one model. Return its measurements; rms_i and gradient_i are 40 values, one per layer, at the i-th time."""
    steps, start = 4 if config.quick else STEPS, time.perf_counter()
    folder = Path(config.folder('residual'), setting.replace(' ', '_'), str(seed))
    gradients = folder / 'gradients.txt'
    with replaced('model', ResidualScaling=SCALINGS[setting]), \
            replaced('train', make_optimizers=log_gradient_norms(gradients, steps // PARTS)):
        log = train_run(folder, SIZES, seed=seed, lr=1e-2, min_lr=1e-3, max_steps=steps, eval_every=steps // PARTS,
                      **SETTINGS | {'eval_batches': 1 if config.quick else 20})
        parameters = sum(p.numel() for p in Zaya(SIZES).parameters())
    layers = [values for _, values in by_layer(log, 'residual')]                # (layer, part)
    rms = {f'rms_{i}': ' '.join(f'{value:.4g}' for value in column) for i, column in enumerate(zip(*layers))}
    gradient = {f'gradient_{i}': line for i, line in enumerate(gradients.read_text().splitlines())}
    return {'val_loss': log['val_loss'][1][-1], 'growth': layers[-1][-1] / layers[0][-1], 'parameters': parameters,
            'tokens': int(log['tokens'][1][-1]), 'seconds': time.perf_counter() - start} | rms | gradient


def main(config):
    rows = fill_table('residual', config, list(SCALINGS), lambda setting, seed: measure(config, setting, seed))
    rows = [row | {'rms': row[f'rms_{PARTS}'].split()[-1]} for row in rows]     # after the last layer, at the end
    print_settings(rows, SCALINGS, parameters=('parameters', ',.0f'), growth=('growth', '.1f'),
                   rms=('RMS after the last layer', '.2f'), val_loss=('val loss, nats per token', '.3f'))
    print_verdicts(line for column, unit in (('growth', ''), ('rms', ''), ('val_loss', 'nats'))
                   for line in compare(rows, column, unit, ('residual scaling', 'plain sum')))


def draw(figure, rows):
    """Plot residual RMS and gradient norm per layer: at the start of training (light), halfway, at the end (dark)."""
    figure.set_figheight(3.4)
    colormaps = configurator.package('matplotlib').colormaps
    for axis, (kind, label) in zip(figure.subplots(1, 2), (('rms', 'RMS of the residual stream'),
                                                           ('gradient', 'gradient norm'))):
        for setting, colors in ('plain sum', 'Greys'), ('residual scaling', 'Blues'):
            for part in range(0, PARTS + 1, 2):
                per_seed = [map(float, row[f'{kind}_{part}'].split()) for row in rows if row['setting'] == setting]
                axis.plot([statistics.fmean(values) for values in zip(*per_seed)], linewidth=1.2,
                          color=colormaps[colors](0.35 + 0.6 * part / PARTS), label=setting if part == PARTS else None)
        axis.set(xlabel='layer', ylabel=label, yscale='log')


if __name__ == '__main__':
    run_claim('residual', main, draw)
