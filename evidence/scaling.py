"""Measure how speed and memory grow with one size at a time: `python -m evidence.scaling`.

Claim. A token visits one expert, so its cost does not grow with the number of experts (ZAYA1-8B report, arXiv
2605.05365, II).

Test. A training step and a decoding step of the small model, with one size changed at a time. A time that grows with
the number of experts would refute the claim. What CCA saves per layer: evidence/kv_cache.py.

A plot is saved if matplotlib is installed.

Legend:  B sequences   S tokens per sequence
"""
import os
import sys
from dataclasses import dataclass, replace
from functools import partial

import torch
from tqdm import tqdm

import configurator
import decode
from bench import SMALL, TINY, BenchConfig, alternate, memory, random_tokens, set_up, training, zaya

FIGURES = 'training, tokens/s', 'peak memory per step, MiB', 'decode, ms per step'


@dataclass
class ScalingConfig(BenchConfig):
    plot: str = 'runs/scaling.png'  # the plot's file; '': no plot


def sizes_to_try(quick):
    """Return [(name, value, config, B, S)]: B and S are those of a training step."""
    base = TINY if quick else replace(SMALL, context=8192)
    S, T = (16, 32) if quick else (256, 4096)                   # tokens per sequence and per training step
    contexts, experts, depths, batches = ((16, 32), (4, 8), (1, 2), (1, 2)) if quick else \
        ((256, 512, 1024, 2048, 4096, 8192), (4, 8, 16, 32, 64), (3, 6, 12, 24), (1, 4, 16, 64))
    return [*(('context', s, base, T // s or 1, s) for s in contexts),
            *(('experts', n, replace(base, n_expert=n), T // S, S) for n in experts),
            *(('layers', n, replace(base, n_layer=n), T // S, S) for n in depths),
            *(('batch', b, base, b, S) for b in batches)]


@torch.no_grad()
def decoding_steps(model, B, S):
    """Return a function that decodes the last 8 of S positions for B sequences, and the KV cache's size in MiB."""
    model.eval()
    cache, step, tokens = model.make_cache(B, S), decode.folded(model), random_tokens(model, B, S)
    model(tokens[:, 8:], cache=cache, last_only=True)

    def eight():
        cache.lengths = [S - 8] * B
        for _ in range(8):
            step(cache, tokens[:, 0])
    return eight, sum(t.nbytes for t in cache.k + cache.v) / 2 ** 20


def scaling(device, settings):
    """Print the table of the small model and return [(name, value, *FIGURES)]. Decoding is that of one sequence unless
    the batch size varies."""
    print('| size | | training, tokens/s | peak memory per step | decode, ms per step | KV cache |')
    print('| --- ' * 6 + '|')
    results = []
    for name, value, config, B, S in tqdm(sizes_to_try(settings.quick), leave=False):
        model = zaya(config, device, settings.seed)
        seconds, = alternate([training(model, B, S)], device, settings.repeats)
        mib = memory(device, partial(zaya, config, device, settings.seed), training, (B, S))
        eight, cache_mib = decoding_steps(model, B if name == 'batch' else 1, S)
        ms = alternate([eight], device, settings.repeats)[0] / 8 * 1e3
        results.append((name, value, B * S / seconds, mib, ms))
        tqdm.write(f'| {name} | {value} | {B * S / seconds:,.0f} | {mib:,.0f} MiB | {ms:.2f} | {cache_mib:.2f} MiB |')
    return results


def plot(results, path):
    """Plot the results of `scaling`: one column of axes per size, one row per figure."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(14, 9), layout='constrained')
    axes = figure.subplots(3, 4, sharex='col')
    for column, name in enumerate(dict.fromkeys(row[0] for row in results)):
        _, x, *ys = zip(*(row for row in results if row[0] == name))
        for axis, y, label in zip(axes[:, column], ys, FIGURES):
            axis.plot(x, y, 'o-')
            axis.set(xscale='log', xticks=x, xticklabels=x, ylim=(0, 1.1 * max(y) or 1), ylabel='' if column else label)
            axis.minorticks_off()
        axes[-1, column].set_xlabel(name)
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f'\nplot: {path}')


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.scaling'):
        settings, device, _ = set_up(sys.argv[1:], ScalingConfig)
        results = scaling(device, settings)
        try:
            if settings.plot:
                plot(results, settings.plot)
        except ImportError:
            print('\n(no plot: pip install matplotlib)')
