"""Measure what the compressed KV cache saves: `python -m evidence.kv_cache [--seeds=N] [--quick=True]`.

Claim. CCA's KV cache is 8 times smaller than that of full multi-head attention, 2 Hk d = 512 against 2 E = 4096
elements per token and layer at the 8B shape, which makes long contexts cheaper (ZAYA1-8B report, arXiv 2605.05365,
II-A; CCA paper, arXiv 2510.04476: a fused layer is 1.3 to 1.4 times as fast on a prompt of 16K tokens on an H100). A
ratio below 8, or a decoding step that is not faster at 32K, would refute the claim.

Test. One attention layer of the 8B shape in float32, CCA and multi-head attention alternating: a prompt of P tokens,
and one decoding step with P - 1 cached tokens. The step is that of generation (decode.folded), in a model of one layer
with tiny experts, whose time counts for CCA. One measurement per seed, on other random weights.

Legend:  B batch   S sequence   P cached positions   E width   H heads   Hk KV heads   d head dim
"""
import statistics
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import decode
from bench import alternate
from cca import CCA, rope, rope_table
from evidence.claims import below, by_seed, fill_table, print_table, print_verdicts, run_claim
from model import Zaya, ZayaConfig

PROMPTS, CONTEXTS = (1024, 4096, 8192), (1024, 2048, 4096, 8192, 16_384, 32_768)
CPU = torch.device('cpu')


class MHA(nn.Module):
    """Multi-head attention of the same width, which CCA replaces: each head has its own key and value."""

    def __init__(self, config):
        super().__init__()
        E, self.head_dim = config.n_embd, config.head_dim
        self.qkv, self.out = nn.Linear(E, 3 * E, bias=False), nn.Linear(E, E, bias=False)

    def forward(self, x, cos, sin, cache=None):
        """x (B, S, E) -> (B, S, E). cache: k and v (B, H, P, d), whose last position is filled from x, one token."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 3, 0, 1, 4)             # (H, B, S, d)
        q, k = (rope(t.float(), cos, sin).to(v.dtype) for t in (q, k))
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))                                               # (B, H, S, d)
        if cache is not None:
            for store, new in zip(cache, (k, v)):
                store[:, :, -1:] = new
            k, v = cache
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return self.out(y.transpose(1, 2).flatten(-2))


def cache_bytes(config, P):
    """Return float32 bytes per sequence and layer after P tokens: CCA, its constant part (the last inputs of the
    convolutions and of the value shift), multi-head attention."""
    Hq, Hk, d = config.n_head, config.n_kv_head, config.head_dim
    return 4 * P * 2 * Hk * d, 4 * (2 * (Hq + Hk) * d + Hk * d // 2), 4 * P * 2 * config.n_embd


def mha_cache(config, P):
    return [torch.randn(1, config.n_embd // config.head_dim, P, config.head_dim) for _ in range(2)]


def prompt(config, P):
    """Return two functions that process a prompt of P tokens: CCA, multi-head attention."""
    cca, mha, x = CCA(config, 0), MHA(config), torch.randn(1, P, config.n_embd)
    for p in [*cca.parameters(), *mha.parameters()]:
        nn.init.normal_(p, std=0.02)
    angles = rope_table(torch.arange(P)[None], config.rope_dim, config.rope_base)
    return lambda: cca(x, *angles), lambda: mha(x, *angles)


def step(config, P):
    """Return two functions that decode the P-th token: CCA, multi-head attention."""
    model = Zaya(replace(config, vocab_size=2, n_expert=2, expert_dim=8, router_dim=8)).eval()
    one, cache, mha, past = decode.folded(model), model.make_cache(1, P), MHA(config), mha_cache(config, P)
    for t in cache.k + cache.v:
        t.normal_()
    x, angles = torch.randn(1, 1, config.n_embd), rope_table(torch.tensor([[P - 1]]), config.rope_dim, config.rope_base)

    def with_cca():
        cache.lengths = [P - 1]
        one(cache, torch.tensor([0]))
    return with_cca, lambda: mha(x, *angles, past)


@torch.no_grad()
def measure(config, setting, seed):
    work, P = setting.split()
    torch.manual_seed(seed)
    sizes = replace(ZayaConfig() if config.quick else ZayaConfig.zaya1_8b(), n_layer=1)
    works = {'prompt': prompt, 'step': step}[work](sizes, int(P))
    ours, theirs = alternate(works, CPU, repeats=2 if work == 'prompt' else 9, warm_up=1)
    kv, constant, mha_kv = cache_bytes(sizes, int(P))
    return {'cca_ms': ours * 1e3, 'mha_ms': theirs * 1e3, 'cca_bytes': kv, 'cca_constant_bytes': constant,
            'mha_bytes': mha_kv}


def main(config):
    prompts, contexts = ((32,), (16, 32)) if config.quick else (PROMPTS, CONTEXTS)
    settings = [*(f'step {P}' for P in contexts), *(f'prompt {P}' for P in prompts)]
    rows = fill_table('kv_cache', config, settings, lambda setting, seed: measure(config, setting, seed))
    lines, verdicts = [], []
    for setting in settings:
        ours, theirs = by_seed(rows, setting, 'cca_ms'), by_seed(rows, setting, 'mha_ms')
        small, large = (by_seed(rows, setting, f'{kind}_bytes')[0] for kind in ('cca', 'mha'))
        speedup = statistics.median(b / a for a, b in zip(ours, theirs))
        lines.append([setting, f'{statistics.median(ours):,.2f}', f'{statistics.median(theirs):,.2f}', f'{speedup:.2f}',
                      f'{small / 2 ** 20:,.1f}', f'{large / 2 ** 20:,.1f}'])
        verdicts.append(below(f'{setting}: CCA faster than multi-head attention', ours, theirs, 'ms'))
    print_table(['tokens', 'CCA, ms', 'multi-head, ms', 'speed-up', 'cache of CCA, MiB', 'of multi-head, MiB'], lines)
    word = 'reproduced' if large == 8 * small else 'contradicted'
    print_verdicts([('cache 8 times smaller', f'{large / small:.2f} times', word), verdicts[len(contexts) - 1],
                    verdicts[-1]])


def draw(figure, rows):
    """Plot the time of a decoding step and the size of the cache against the context length."""
    left, right = figure.subplots(1, 2)
    for kind, label, color in ('mha', 'multi-head attention', 'tab:gray'), ('cca', 'CCA', 'tab:blue'):
        ms = [statistics.median(by_seed(rows, f'step {P}', f'{kind}_ms')) for P in CONTEXTS]
        mib = [by_seed(rows, f'step {P}', f'{kind}_bytes')[0] / 2 ** 20 for P in CONTEXTS]
        left.plot(CONTEXTS, ms, 'o-', color=color, label=label)
        right.plot(CONTEXTS, mib, 'o-', color=color)
    for axis, label in (left, 'ms per decoding step'), (right, 'cache per layer, MiB'):
        axis.set(xscale='log', yscale='log', xticks=CONTEXTS, xlabel='context, tokens', ylabel=label,
                 xticklabels=[f'{P // 1024}K' for P in CONTEXTS])
        axis.minorticks_off()


if __name__ == '__main__':
    run_claim('kv_cache', main, draw)
