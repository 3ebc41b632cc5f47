"""How speed and memory grow with one size at a time, and what CCA saves a layer: `python -m evidence.scaling`.

Claims. (1) A token visits one expert, so its cost does not grow with the number of experts (ZAYA1-8B report, arXiv
2605.05365, II). (2) Attention in the latent is cheaper than multi-head attention of the same width, and its KV cache 8
times smaller (CCA paper, arXiv 2510.04476: a fused layer is 1.3 to 1.4 times as fast at 16K tokens on an H100).

Test. (1) A training step and a decoding step of the small model, with one size changed at a time. (2) One attention
layer of the 8B shape beside a multi-head one: a prompt of 16K tokens, and one token at 32K context. Both are called
plainly for the prompt; the one token goes through the step that generation uses (decode.folded), of a model with one
layer and next to no experts. A time that grows with the experts, or a ratio below 1, would refute the claims.

A plot is drawn if matplotlib is there.

Legend:  B batch   S sequence   P cached positions   E width   H heads   d head dim
"""
import os
import sys
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import configurator
import decode
from bench import SMALL, TINY, BenchConfig, alternate, begin, memory, random_tokens, training, zaya
from cca import CCA, rope, rope_table
from model import Zaya, ZayaConfig


def sizes_to_try(quick):
    """Yield (name, value, config, B, S of a training step)."""
    base = TINY if quick else replace(SMALL, context=8192)
    S, T = (16, 32) if quick else (256, 4096)                   # tokens of a sequence and of a training step
    contexts, experts, depths, batches = ((16, 32), (4, 8), (1, 2), (1, 2)) if quick else \
        ((256, 512, 1024, 2048, 4096, 8192), (4, 8, 16, 32, 64), (3, 6, 12, 24), (1, 4, 16, 64))
    yield from (('context', s, base, T // s or 1, s) for s in contexts)
    yield from (('experts', n, replace(base, n_expert=n), T // S, S) for n in experts)
    yield from (('layers', n, replace(base, n_layer=n), T // S, S) for n in depths)
    yield from (('batch', b, base, b, S) for b in batches)


@torch.no_grad()
def decoding_step(model, B, S):
    """A function that decodes eight tokens at the end of S cached ones, for B rows -> it, and the KV cache's MiB."""
    model.eval()
    cache, step, tokens = model.make_cache(B, S), decode.folded(model), random_tokens(model, B, S)
    model(tokens[:, 8:], cache=cache, last_only=True)

    def eight():
        cache.lengths = [S - 8] * B
        for _ in range(8):
            step(cache, tokens[:, 0])
    return eight, sum(t.nbytes for t in cache.k + cache.v) / 2 ** 20


def scaling(device, settings):
    """Print the table of the small model. Decoding is that of one row, but for the batch's rows."""
    print('| size | | training, tokens/s | peak memory of a step | decode, ms a step | KV cache |')
    print('| --- | --- | --- | --- | --- | --- |')
    results = []
    for name, value, config, B, S in tqdm(list(sizes_to_try(settings.quick)), leave=False):
        model = zaya(config, device, settings.seed)
        seconds, = alternate([training(model, B, S)], device, settings.repeats)
        mib = memory(device, partial(zaya, config, device, settings.seed), training, (B, S))
        eight, cache_mib = decoding_step(model, value if name == 'batch' else 1, S)
        ms = alternate([eight], device, settings.repeats)[0] / 8 * 1e3
        results.append((name, value, B * S / seconds, mib, ms))
        tqdm.write(f'| {name} | {value} | {B * S / seconds:,.0f} | {mib:,.0f} MiB | {ms:.2f} | {cache_mib:.2f} MiB |')
    return results


def plot(results, path):
    """Draw the table of `scaling`: a column for each size, a row for each figure."""
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(3, 4, figsize=(14, 9), sharex='col', layout='constrained')
    for column, name in enumerate(dict.fromkeys(row[0] for row in results)):
        _, x, *ys = zip(*(row for row in results if row[0] == name))
        labels = 'training, tokens/s', 'peak memory of a step, MiB', 'decode, ms a step'
        for axis, y, label in zip(axes[:, column], ys, labels):
            axis.plot(x, y, 'o-')
            axis.set(xscale='log', xticks=x, xticklabels=x, ylim=(0, 1.1 * max(y) or 1), ylabel='' if column else label)
            axis.minorticks_off()
        axes[-1, column].set_xlabel(name)
    figure.savefig(path, dpi=100)


class MHA(nn.Module):
    """What CCA replaces: multi-head attention of the same width, every head with a key and a value of its own."""

    def __init__(self, config):
        super().__init__()
        E, self.head_dim = config.n_embd, config.head_dim
        self.qkv, self.out = nn.Linear(E, 3 * E, bias=False), nn.Linear(E, E, bias=False)

    def forward(self, x, cos, sin, cache=None):
        """x (B, S, E) -> (B, S, E). cache: k and v (B, H, P, d), whose last position is that of x's one token."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 3, 0, 1, 4)             # (H, B, S, d)
        q, k = (rope(t.float(), cos, sin).to(v.dtype) for t in (q, k))
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))                                               # (B, H, S, d)
        if cache is not None:
            for store, new in zip(cache, (k, v)):
                store[:, :, -1:] = new
            k, v = cache
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return self.out(y.transpose(1, 2).flatten(-2))


@torch.no_grad()
def attention_layer(device, dtype, settings):
    """Print the table of CCA against multi-head attention, one layer of the 8B shape in dtype."""
    config = replace(TINY if settings.quick else ZayaConfig.zaya1_8b(), n_layer=1)
    S, P = (32, 48) if settings.quick else (16_384, 32_768)
    E, cca, mha = config.n_embd, CCA(config, 0), MHA(config)
    for p in [*cca.parameters(), *mha.parameters()]:
        nn.init.normal_(p, std=0.02)
    cca, mha, x = (t.to(device, dtype) for t in (cca, mha, torch.randn(1, S, E)))
    positions = torch.arange(P, device=device)[None]
    table = lambda part: rope_table(positions[:, part], config.rope_dim, config.rope_base)
    whole, last = table(slice(S)), table(slice(P - 1, P))
    mha_cache = [torch.randn(1, E // config.head_dim, P, config.head_dim, device=device).to(dtype) for _ in range(2)]

    model = Zaya(replace(config, vocab_size=2, n_expert=2, expert_dim=8, router_dim=8)).to(device, dtype).eval()
    step, cache, token = decode.folded(model), model.make_cache(1, P), torch.tensor([0], device=device)

    def decode_cca():
        cache.lengths = [P - 1]
        step(cache, token)
    print(f'\n| one attention layer, 8B shape, {str(dtype)[6:]} | CCA | multi-head | ratio | KV cache | multi-head |')
    print('| --- | --- | --- | --- | --- | --- |')
    for name, tokens, ours, theirs in (('prefill', S, lambda: cca(x, *whole), lambda: mha(x, *whole)),
                                       ('decode', P, decode_cca, lambda: mha(x[:, :1], *last, mha_cache))):
        a, b = alternate([ours, theirs], device, settings.repeats, warm_up=1)                          # seconds a call
        mib = [2 * width * tokens * x.element_size() / 2 ** 20 for width in (config.n_kv_head * config.head_dim, E)]
        print(f'| {name}, {tokens:,} tokens | {a * 1e3:,.2f} ms | {b * 1e3:,.2f} ms | {b / a:.2f} '
              f'| {mib[0]:,.1f} MiB | {mib[1]:,.1f} MiB |', flush=True)


@dataclass
class ScalingConfig(BenchConfig):   # dtype: of the attention layer
    plot: str = 'runs/scaling.png'  # where to draw; '': nowhere


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.scaling'):
        settings, device, dtype = begin(sys.argv[1:], ScalingConfig)
        results = scaling(device, settings)
        attention_layer(device, dtype, settings)
        if settings.plot:
            try:
                os.makedirs(os.path.dirname(settings.plot) or '.', exist_ok=True)
                plot(results, settings.plot)
                print(f'\nplot: {settings.plot}')
            except ImportError:
                print('\n(no plot: pip install matplotlib)')
