"""How fast is it? Side by side with transformers: `python bench.py`; how it scales: `python bench.py --scale=True`.

Both models get the SAME random weights, through save_pretrained and from_pretrained, and must first agree on the logits. Then
each work is done by both in turn, A B A B ..., in one process: whatever else the machine does, it does to both. The table
gives medians, and ratio = their time / ours, which is the figure that counts.

The peer is transformers' ZayaForCausalLM with sdpa attention and the faster of its experts implementations (measured first).
'best' is each side's faster of plain and torch.compile, for training in the types of --dtype. In decoding the peer's other way
is its static cache, not compiled: its model is marked as one that does not compile in one piece.

Memory is the peak over what the process held before the work began: on a GPU that of its allocator; on a CPU that of the
process, each work in a fresh one.
"""
import math
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import configurator
import decode
from cache import Cache
from cca import CCA, rope, rope_table
from checkpoint import save_pretrained
from configurator import pick_device
from model import Zaya, ZayaConfig, sizes
from optim import make_optimizers
from router import Balancer, load_entropy
from sample import generate
from train import PEAK_FLOPS


@dataclass
class BenchConfig:
    device: str = 'auto'
    dtype: str = 'auto'             # of 'best': 'auto' is bfloat16 on cuda, float32 elsewhere
    repeats: int = 5
    quick: bool = False             # a tiny model, two repeats, no torch.compile: only to see that it works
    scale: bool = False             # tokens/s and memory against context, experts, depth and batch, instead of the peer
    seed: int = 0

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f'repeats is {self.repeats}, it must be at least 1')
        if self.dtype not in ('auto', 'float32', 'bfloat16'):
            raise ValueError(f"dtype is {self.dtype!r}, use 'auto', 'float32' or 'bfloat16'")


SMALL = replace(ZayaConfig.small(), vocab_size=512, context=1024, skip_expert=True)
MEDIUM = replace(ZayaConfig.medium(), skip_expert=True)
TINY = ZayaConfig(vocab_size=64, context=64, n_layer=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=8, n_expert=4, expert_dim=16,
                  router_dim=8, skip_expert=True)


# ---- the two models ----

@torch.no_grad()
def balance(model):
    """Random routers take one expert or two for all tokens; trained ones use all experts alike. So let the balancer work for a while,
    and for longer if there are many experts."""
    balancer, S = Balancer(model.routers, lr=1e-2), min(64, model.config.context)
    for step in range(200):
        model(torch.randint(1, model.config.vocab_size, (4, S), device=model.device))
        if load_entropy(balancer.step()).min() > 0.9 and step >= 60:
            break


@torch.no_grad()
def make_pair(config, device, seed, experts=None):
    """The same random weights in a Zaya and in a transformers model: (ours, theirs). Raises ValueError if their logits differ."""
    try:
        import transformers
    except ImportError:
        raise ValueError('the comparison needs transformers: pip install transformers safetensors') from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    ours = Zaya(config).to(device)
    for name, p in ours.named_parameters():                     # no ones and zeros, which would hide differences
        if p.ndim < 2:
            p.add_(torch.randn_like(p), alpha=0.05)
    balance(ours)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        theirs = transformers.ZayaForCausalLM.from_pretrained(
            folder, attn_implementation='sdpa', **({'experts_implementation': experts} if experts else {})).to(device)
    idx = torch.randint(1, config.vocab_size, (2, 32), device=device)
    error = (ours.eval()(idx)[0] - theirs.eval()(idx).logits).abs().max().item()
    if not error < 1e-3:
        raise ValueError(f'the two models do not agree: their logits differ by {error:.1e}')
    return ours, theirs


def fastest_experts(config, device, seed):
    """The name of the peer's fastest experts implementation for a forward over 16 x 256 tokens, and its default's name."""
    seconds = {}
    for name in 'eager', 'grouped_mm':                          # the third, 'batched_mm', copies weights for every token
        _, theirs = make_pair(config, device, seed, name)
        idx = torch.randint(1, config.vocab_size, (16, config.context // 4), device=device)
        seconds[name], = alternate([lambda: theirs(idx)], device, 3)
    default = make_pair(config, device, seed)[1].config._experts_implementation
    return min(seconds, key=seconds.get), default


# ---- the works: each makes, for one model, a function to time ----

def training(config, device, model, batch, S, optimizer='AdamW', compiled=False, dtype='float32'):
    """One training step: forward, loss, backward, optimizer."""
    model.train()
    x, y = torch.randint(1, config.vocab_size, (2, batch, S), device=device)
    if isinstance(model, Zaya):
        for layer in model.layers if compiled else ():
            layer.compile()
        loss_of = lambda: model(x, y)[1]
    else:
        forward = torch.compile(model) if compiled else model
        loss_of = lambda: forward(x, labels=x, use_cache=False).loss
    # A learning rate that leaves the random weights as they are: each step is the same work.
    if isinstance(model, Zaya) and optimizer == 'own':
        optimizers = make_optimizers(model, 1e-7)               # Muon and AdamW; the Trainer of transformers has AdamW
    else:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-7, fused=True)]

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == 'bfloat16'):
            loss = loss_of()
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    return step


def prefill(config, device, model, batch, S):
    """A prompt into an empty cache, and the logits of its last token."""
    model.eval()
    idx = torch.randint(1, config.vocab_size, (batch, S), device=device)
    if isinstance(model, Zaya):
        return lambda: model(idx, cache=model.make_cache(batch, S), last_only=True)
    return lambda: model(idx, use_cache=True, logits_to_keep=1)


def decoding(config, device, model, batch, prompt, new, static=False):
    """`new` tokens after a short prompt, greedily, by each side's own generate. static: with a cache of constant shapes, for which
    ours is compiled."""
    model.eval()
    idx = torch.randint(1, config.vocab_size, (batch, prompt), device=device)
    if isinstance(model, Zaya):
        return lambda: generate(model, idx.tolist(), new, temperature=0, compiled=static)
    return lambda: model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, min_new_tokens=new,
                                  cache_implementation='static' if static else None, disable_compile=True,
                                  do_sample=False, eos_token_id=config.vocab_size - 1, pad_token_id=0)


# ---- measuring ----

def timed(work, device):
    """Seconds of one call. Only training steps need gradients."""
    with torch.set_grad_enabled(work.__name__ == 'step'):
        began = time.perf_counter()
        work()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter() - began


def alternate(works, device, repeats, warm_up=2):
    """Median seconds of each work, warmed up, in turns."""
    times = [[timed(work, device) for work in works] for _ in range(warm_up + repeats)][warm_up:]
    return [statistics.median(column) for column in zip(*times)]


def peak_memory(device, make_model, make_work, arguments):
    """MiB that a work needs at most beyond what was there before it. On a CPU the process should be a fresh one."""
    config, model = make_model()
    work = make_work(config, device, model, *arguments)
    if device.type == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        timed(work, device)
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    try:
        with open('/proc/self/clear_refs', 'w') as file:        # 5: forget the peak so far
            file.write('5')
        before = status('VmHWM')
        timed(work, device)
        return status('VmHWM') - before
    except OSError:                                             # no Linux
        return math.nan


def status(key):
    """A line of Linux's account of this process, in MiB."""
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key + ':'))


def machine(device):
    """What the figures were measured on."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        with open('/proc/cpuinfo') as file:
            name = next(line.split(': ')[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f'{name}, {torch.get_num_threads()} threads'


def memory(device, make_model, make_work, arguments):
    """peak_memory, in a process of its own where that is needed."""
    if device.type == 'cuda':
        return peak_memory(device, make_model, make_work, arguments)
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(peak_memory, (device, make_model, make_work, arguments))


def one_of_pair(config, device, seed, experts, ours):
    return config, make_pair(config, device, seed, experts)[not ours]


def zaya(config, device, seed):
    torch.manual_seed(seed)
    model = Zaya(config).to(device)
    balance(model)
    return config, model


# ---- the tables ----

def side_by_side(device, dtype, settings):
    """Against transformers."""
    config, batch, S, long, prompt, new = (TINY, 2, 16, 32, 4, 8) if settings.quick else (SMALL, 16, 256, 1024, 32, 128)
    experts, default = fastest_experts(config, device, settings.seed)
    print(f"peer: transformers' ZayaForCausalLM, sdpa, experts {experts!r} (the faster here; its default is {default!r})\n")
    print('| work | shape | ours, tokens/s | transformers | ratio | peak memory, ours | transformers |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    for name, shape, n, make_work, *arguments in (
            ('training step, AdamW', f'{batch} x {S}', batch * S, training, batch, S),
            ('training step, own optimizers', f'{batch} x {S}', batch * S, training, batch, S, 'own'),
            ('prefill', f'1 x {long}', long, prefill, 1, long),
            ('prefill', f'{batch} x {S}', batch * S, prefill, batch, S),
            ('decode', f'1 x {prompt} + {new}', new, decoding, 1, prompt, new),
            ('decode', f'{batch} x {prompt} + {new}', batch * new, decoding, batch, prompt, new)):
        pair = make_pair(config, device, settings.seed, experts)
        ours, theirs = alternate([make_work(config, device, model, *arguments) for model in pair], device, settings.repeats)
        mib = [memory(device, partial(one_of_pair, config, device, settings.seed, experts, is_ours), make_work, arguments)
               for is_ours in (True, False)]
        print(f'| {name} | {shape} | {n / ours:,.0f} | {n / theirs:,.0f} | {theirs / ours:.2f} | {mib[0]:,.0f} MiB '
              f'| {mib[1]:,.0f} MiB |', flush=True)
    if settings.quick:
        return
    for rows in 1, batch:
        pair = make_pair(config, device, settings.seed, experts)
        times = alternate([decoding(config, device, model, rows, prompt, new, static) for static in (False, True) for model in pair],
                          device, settings.repeats)
        ours, theirs = min(times[::2]), min(times[1::2])
        print(f'| decode, best of plain and static (ours compiled) | {rows} x {prompt} + {new} | {rows * new / ours:,.0f} '
              f'| {rows * new / theirs:,.0f} | {theirs / ours:.2f} | | |', flush=True)
        print('  plain: ours {:.3f} s, theirs {:.3f} s; static: ours {:.3f} s, theirs {:.3f} s'.format(*times), file=sys.stderr)
    for config, batch, S in ((SMALL, 16, 256), (MEDIUM, 32, 1024)) if device.type == 'cuda' else ((SMALL, 16, 256),):
        times = []
        for compiled in (False, True):
            pair = make_pair(config, device, settings.seed, experts)
            works = [training(config, device, model, batch, S, 'AdamW', compiled, dtype) for model in pair]
            times.append(alternate(works, device, settings.repeats))
        (ours, theirs), n = (min(column) for column in zip(*times)), batch * S
        gpu = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
        peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu and dtype == 'bfloat16'), None)
        mfu = f', MFU {n / ours * sizes(replace(config, context=S))["train_flops"] / peak:.0%}' if peak else ''
        print(f'| training step, AdamW, best of plain and compiled in {dtype}, width {config.n_embd}{mfu} | {batch} x {S} '
              f'| {n / ours:,.0f} | {n / theirs:,.0f} | {theirs / ours:.2f} | | |', flush=True)
        print('  plain: ours {:.3f} s, theirs {:.3f} s; compiled: ours {:.3f} s, theirs {:.3f} s'.format(*times[0], *times[1]),
              file=sys.stderr)


class MHA(nn.Module):
    """What CCA replaces: multi-head attention of the same width, every head with a key and a value of its own."""

    def __init__(self, config):
        super().__init__()
        E, self.head_dim = config.n_embd, config.head_dim
        self.qkv, self.out = nn.Linear(E, 3 * E, bias=False), nn.Linear(E, E, bias=False)

    def forward(self, x, cos, sin, cache=None):
        """x (B, S, E) -> (B, S, E). cache: k and v (B, H, P, d), whose last position is that of x's one token."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2)                          # (B, S, H, d) each
        turn = lambda t: rope(t.float().permute(2, 0, 1, 3), cos, sin).permute(1, 2, 0, 3).to(v.dtype)     # heads first
        q, k, v = (t.transpose(1, 2) for t in (turn(q), turn(k), v))
        if cache is not None:
            for store, new in zip(cache, (k, v)):
                store[:, :, -1:] = new
            k, v = cache
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return self.out(y.transpose(1, 2).flatten(-2))


@torch.no_grad()
def attention_layer(device, dtype, settings):
    """CCA against multi-head attention: one layer of the 8B shape, a prompt of 16K tokens, and one token at 32K context."""
    config = replace(TINY if settings.quick else ZayaConfig.zaya1_8b(), n_layer=1)
    S, P = (32, 48) if settings.quick else (16_384, 32_768)
    dtype, E, heads = getattr(torch, dtype), config.n_embd, config.n_embd // config.head_dim
    cca, mha = CCA(config, 0), MHA(config)
    for p in [*cca.parameters(), *mha.parameters()]:
        nn.init.normal_(p, std=0.02)
    cca, mha, x = (t.to(device, dtype) for t in (cca, mha, torch.randn(1, S, E)))
    table = lambda *positions: rope_table(torch.arange(*positions, device=device)[None], config.rope_dim, config.rope_base)
    whole, last = table(S), table(P - 1, P)
    cca_cache = Cache(config, 1, P, device, dtype)
    mha_cache = [torch.randn(1, heads, P, config.head_dim, device=device).to(dtype) for _ in range(2)]

    def decode_cca():
        cca_cache.lengths = [P - 1]
        _, mask = cca_cache.begin(1)
        cca(x[:, :1], *last, mask, None, cca_cache)
    print('\n| one attention layer, 8B shape | CCA | multi-head attention | ratio | KV cache, CCA | multi-head |')
    print('| --- | --- | --- | --- | --- | --- |')
    for name, tokens, ours, theirs in (('prefill', S, lambda: cca(x, *whole), lambda: mha(x, *whole)),
                                       ('decode', P, decode_cca, lambda: mha(x[:, :1], *last, mha_cache))):
        a, b = alternate([ours, theirs], device, settings.repeats, 1 if device.type == 'cpu' else 2)     # half a minute each
        mib = [2 * width * tokens * x.element_size() / 2 ** 20 for width in (config.n_kv_head * config.head_dim, E)]
        print(f'| {name}, {tokens:,} tokens, {dtype} | {a * 1e3:,.2f} ms | {b * 1e3:,.2f} ms | {b / a:.2f} '
              f'| {mib[0]:,.1f} MiB | {mib[1]:,.1f} MiB |', flush=True)


def scaling(device, settings):
    """How our own speed and memory move with one size at a time, and a plot of it. Decoding is that of one row, but for the
    batch's rows, at the end of a sequence of that length."""
    base = TINY if settings.quick else replace(SMALL, context=8192)
    S0, T = (16, 32) if settings.quick else (256, 4096)         # tokens of a sequence and of a training step
    contexts, experts, depths, batches = (((16, 32), (4, 8), (1, 2), (1, 2)) if settings.quick else
        ((256, 512, 1024, 2048, 4096, 8192), (4, 8, 16, 32, 64), (3, 6, 12, 24), (1, 4, 16, 64)))
    rows = ([('context', S, base, S, T // S or 1) for S in contexts]
            + [('experts', N, replace(base, n_expert=N), S0, T // S0) for N in experts]
            + [('layers', L, replace(base, n_layer=L), S0, T // S0) for L in depths]
            + [('batch', B, base, S0, B) for B in batches])
    print('| size | | training, tokens/s | peak memory of a step | decode, ms a step | KV cache |')
    print('| --- | --- | --- | --- | --- | --- |')
    results = []
    for name, value, config, S, batch in tqdm(rows, leave=False):
        model = zaya(config, device, settings.seed)[1]
        seconds, = alternate([training(config, device, model, batch, S)], device, settings.repeats)
        mib = memory(device, partial(zaya, config, device, settings.seed), training, (batch, S))
        model.eval()
        with torch.no_grad():
            B = value if name == 'batch' else 1
            cache, step = model.make_cache(B, S), decode.folded(model)
            idx = torch.randint(config.vocab_size, (B, S), device=device)
            model(idx[:, 8:], cache=cache, last_only=True)
            token = idx[:, 0]

            def eight():
                cache.lengths = [S - 8] * B
                for _ in range(8):
                    step(cache, token)
            ms = alternate([eight], device, settings.repeats)[0] / 8 * 1e3
        results.append((name, value, batch * S / seconds, mib, ms))
        tqdm.write(f'| {name} | {value} | {batch * S / seconds:,.0f} | {mib:,.0f} MiB | {ms:.2f} '
                   f'| {sum(t.nbytes for t in cache.k) * 2 / 2 ** 20:.2f} MiB |')
    try:
        import matplotlib
    except ImportError:
        print('\n(no plot: pip install matplotlib)')
        return
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(3, 4, figsize=(14, 9), sharex='col', layout='constrained')
    for column, name in enumerate(dict.fromkeys(row[0] for row in results)):
        _, x, *ys = zip(*(row for row in results if row[0] == name))
        for ax, y, label in zip(axes[:, column], ys, ('training, tokens/s', 'peak memory of a step, MiB', 'decode, ms a step')):
            ax.plot(x, y, 'o-')
            ax.set(xscale='log', xticks=x, xticklabels=x, ylim=(0, 1.1 * max(y) or 1), ylabel=label if column == 0 else '')
            ax.minorticks_off()
        axes[-1, column].set_xlabel(name)
    figure.savefig('bench_scale.png', dpi=100)
    print('\nplot: bench_scale.png')


if __name__ == '__main__':
    with configurator.one_line_errors('bench.py'):
        settings, = configurator.read(sys.argv[1:], BenchConfig)
        device = pick_device(settings.device)
        dtype = {'auto': 'bfloat16' if device.type == 'cuda' else 'float32'}.get(settings.dtype, settings.dtype)
        if settings.quick:
            settings.repeats = 2
        print(f'{machine(device)}, torch {torch.__version__}, Python {platform.python_version()}')
        if settings.scale:
            scaling(device, settings)
        else:
            side_by_side(device, dtype, settings)
            attention_layer(device, dtype, settings)
