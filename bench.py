"""How fast is it? Side by side with the ZAYA of transformers: `python bench.py` (how it scales: evidence/scaling.py).

Both models have the SAME random weights, and must first agree on the logits. Then each work is done by both in turn,
A B A B ..., in one process: whatever else the machine does, it does to both. The table gives medians, and

    ratio = their seconds / our seconds                         above 1: ours is faster

which is the figure that counts. The peer is transformers' ZayaForCausalLM with sdpa attention and the faster of its
experts implementations, measured first. 'best' is each side's faster way: plain or compiled; in decoding the peer's
other way is its static cache, not compiled, since its model is marked as one that does not compile in one piece.

Memory is the peak over what was held before the work began: on a GPU by its allocator, on a CPU by a fresh process.

Legend:  B rows   S tokens of a row
"""
import math
import multiprocessing
import platform
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import configurator
from runtime.pretrained import save_pretrained
from model import Zaya, ZayaConfig, sizes
from optim import make_optimizers
from router import Balancer, load_entropy
from sample import generate
from runtime.device import name_and_peak, pick_device, pick_dtype, products_in


@dataclass
class BenchConfig:
    device: str = 'auto'
    dtype: str = 'auto'             # of 'best' training; 'auto' is bfloat16 where it is faster, else float32
    repeats: int = 5
    quick: bool = False             # a tiny model, two repeats, no torch.compile: only to see that it works
    seed: int = 0

    def __post_init__(self):
        configurator.check_ranges(self, repeats=(1, None), seed=(0, None), dtype=('auto', 'float32', 'bfloat16'))


SMALL = replace(ZayaConfig(), vocab_size=512, context=1024, skip_expert=True)
MEDIUM = ZayaConfig(vocab_size=50_304, context=1024, n_layer=16, n_embd=1024, n_head=8, n_kv_head=2, head_dim=64,
                    n_expert=16, expert_dim=1024, router_dim=128, skip_expert=True)     # about nanoGPT's GPT-2, active
TINY = ZayaConfig(vocab_size=64, context=64, n_layer=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=8, n_expert=4,
                  expert_dim=16, router_dim=8, skip_expert=True)


# ---- the two models ----

def random_tokens(model, B, S, seed=0):
    """Draw tokens (B, S), the same ones for both models."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, (B, S), generator=g).to(model.device)


@torch.no_grad()
def zaya(config, device, seed):
    """Make a Zaya with random weights whose experts are all busy, as in a trained model. Random routers alone send all
    tokens to one expert or two, so let the balancer work for at most 200 steps."""
    torch.manual_seed(seed)
    model = Zaya(config).to(device)
    for p in model.parameters():
        if p.ndim < 2:                                          # no ones and zeros, which would hide differences
            p.add_(torch.randn_like(p), alpha=0.05)
    balancer = Balancer(model.routers, lr=1e-2)
    for step in range(200):
        model(random_tokens(model, 4, min(64, config.context), step))
        if load_entropy(balancer.step()).min() > 0.9 and step >= 60:
            break
    return model


@torch.no_grad()
def make_pair(config, device, seed, experts=None):
    """Put the same weights into a Zaya and a transformers model -> (ours, theirs). experts: the peer's implementation
    of them, None for its default. Raises ValueError if the logits differ, or without transformers."""
    try:
        import transformers
    except ImportError:
        raise ValueError('the comparison needs transformers: pip install transformers safetensors') from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ours = zaya(config, device, seed)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        theirs = transformers.ZayaForCausalLM.from_pretrained(folder, attn_implementation='sdpa').to(device)
    theirs.set_experts_implementation(experts or theirs.config._experts_implementation)
    tokens = random_tokens(ours, 2, 32)
    error = (ours.eval()(tokens)[0] - theirs.eval()(tokens).logits).abs().max().item()
    if not error < 1e-3:
        raise ValueError(f'the two models do not agree: their logits differ by {error:.1e}')
    return ours, theirs


def one_of_pair(which, *arguments):
    return make_pair(*arguments)[which]


# ---- the works: each makes, for one model, a function to time ----

def training(model, B, S, optimizer='AdamW', dtype=torch.float32, compiled=False):
    """One training step, whose learning rate is so small that it leaves the weights as they are: all steps are the same
    work. optimizer 'own': Muon and AdamW for ours. compiled: our layers are, from now on."""
    tokens = random_tokens(model.train(), B, S)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-7, fused=True)]          # as transformers' Trainer has it
    if isinstance(model, Zaya):
        targets = tokens.roll(-1, 1)
        loss_of = lambda: model(tokens, targets)[1]
        optimizers = make_optimizers(model, 1e-7) if optimizer == 'own' else optimizers
        for layer in model.layers if compiled else ():
            layer.compile()                                     # one program, written for the first, serves all of them
    else:
        forward = torch.compile(model) if compiled else model
        loss_of = lambda: forward(tokens, labels=tokens, use_cache=False).loss

    def products():
        if isinstance(model, Zaya):
            return products_in(dtype, tokens.device)
        return torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32)

    @torch.enable_grad()
    def step():
        with products():
            loss = loss_of()
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        torch.set_float32_matmul_precision('highest')           # for whoever comes next
    return step


def prefill(model, B, S):
    """A prompt into an empty cache, and the logits of its last token."""
    tokens = random_tokens(model.eval(), B, S)
    if isinstance(model, Zaya):
        return lambda: model(tokens, cache=model.make_cache(B, S), last_only=True)
    return lambda: model(tokens, use_cache=True, logits_to_keep=1)


def decoding(model, B, S, new, static=False):
    """`new` tokens after a prompt, greedily, by each side's generate. static: constant shapes, and ours compiled."""
    tokens = random_tokens(model.eval(), B, S)
    if isinstance(model, Zaya):
        return lambda: generate(model, tokens.tolist(), new, temperature=0, compiled=static)
    return lambda: model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new, min_new_tokens=new,
        eos_token_id=model.config.vocab_size - 1, pad_token_id=0,
        cache_implementation='static' if static else None, disable_compile=True)


# ---- measuring ----

@torch.no_grad()                                                # a training step switches gradients on itself
def timed(work, device):
    """Return the seconds of one call."""
    began = time.perf_counter()
    work()
    if device.type != 'cpu':
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def alternate(works, device, repeats, warm_up=2):
    """Return the median seconds of each work, warmed up, in turns."""
    times = [[timed(work, device) for work in works] for _ in range(warm_up + repeats)][warm_up:]
    return [statistics.median(column) for column in zip(*times)]


def peak_memory(device, make_model, make_work, arguments):
    """Return the MiB that a work needs at most beyond what was there before it; nan where that cannot be read."""
    work = make_work(make_model(), *arguments)
    if device.type == 'cuda':
        peak, forget = lambda: torch.cuda.max_memory_allocated() / 2 ** 20, torch.cuda.reset_peak_memory_stats
    else:                                                       # Linux tells it, and forgets the peak so far at a '5'
        peak = lambda: int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1]) / 1024
        forget = lambda: Path('/proc/self/clear_refs').write_text('5')
    try:
        forget()
        before = peak()
        timed(work, device)
        return peak() - before
    except OSError:
        return math.nan


def memory(device, make_model, make_work, arguments):
    """Return peak_memory, on a CPU measured in a fresh process."""
    if device.type == 'cuda':
        return peak_memory(device, make_model, make_work, arguments)
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(peak_memory, (device, make_model, make_work, arguments))


def set_up(arguments, settings_class):
    """Read the command line, and print what the figures are measured on -> settings, device, dtype."""
    settings, = configurator.read(arguments, settings_class)
    device = pick_device(settings.device)
    if settings.quick:
        settings.repeats = 2
    cpu = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    name = (re.findall(r'model name\s*: (.*)', cpu) or [platform.processor() or platform.machine()])[0]
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{name}, {torch.get_num_threads()} threads'
    print(f'{name}, torch {torch.__version__}, Python {platform.python_version()}')
    return settings, device, pick_dtype(settings.dtype, device)


# ---- the table ----

def print_row(name, shape, tokens, ours, theirs, mib='|'):
    """Print a line of the table. tokens: of one call. ours, theirs: its seconds."""
    rates = f'{tokens / ours:,.0f} | {tokens / theirs:,.0f} | {theirs / ours:.2f}'
    print(f'| {name} | {shape} | {rates} | {mib} |', flush=True)


def side_by_side(device, dtype, settings):
    """Print the table: what each side does by default, with its memory; then each at its best, training in dtype."""
    config, B, S, long, prompt, new = (TINY, 2, 16, 32, 4, 8) if settings.quick else (SMALL, 16, 256, 1024, 32, 128)
    pair, seconds = make_pair(config, device, settings.seed), {}
    default = pair[1].config._experts_implementation
    for experts in 'eager', 'grouped_mm':                      # the third, 'batched_mm', copies weights for every token
        pair[1].set_experts_implementation(experts)
        seconds[experts], = alternate([prefill(pair[1], 16, config.context // 4)], device, 3)
    experts = min(seconds, key=seconds.get)
    pair[1].set_experts_implementation(experts)
    print(f"peer: transformers' ZayaForCausalLM, sdpa, experts {experts!r} (the faster; its default: {default!r})\n")
    print('| work | shape | ours, tokens/s | transformers | ratio | peak memory, ours | transformers |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    for name, shape, n, make_work, *arguments in (
            ('training step, AdamW', f'{B} x {S}', B * S, training, B, S),
            ('training step, own optimizers', f'{B} x {S}', B * S, training, B, S, 'own'),
            ('prefill', f'1 x {long}', long, prefill, 1, long),
            ('prefill', f'{B} x {S}', B * S, prefill, B, S),
            ('decode', f'1 x {prompt} + {new}', new, decoding, 1, prompt, new),
            ('decode', f'{B} x {prompt} + {new}', B * new, decoding, B, prompt, new)):
        times = alternate([make_work(model, *arguments) for model in pair], device, settings.repeats)
        mib = [memory(device, partial(one_of_pair, which, config, device, settings.seed, experts), make_work, arguments)
               for which in (0, 1)]
        print_row(name, shape, n, *times, f'{mib[0]:,.0f} MiB | {mib[1]:,.0f} MiB')
    gpu, peak = device.type == 'cuda', name_and_peak(device, dtype)[1] or math.inf
    best = [(SMALL, decoding, 1, prompt, new), (SMALL, decoding, B, prompt, new),
            (SMALL, training, B, S, 'AdamW'), (MEDIUM, training, 32, 1024, 'AdamW')]
    for config, make_work, B, S, *rest in [] if settings.quick else best if gpu else best[:-1]:
        if config is not pair[0].config:
            pair = make_pair(config, device, settings.seed, experts)
        types = [[]] if make_work is decoding else [[d] for d in dict.fromkeys([torch.float32, dtype])]
        ways = [[*which, fast] for fast in (False, True) for which in types]    # compiled layers stay compiled
        times = [alternate([make_work(model, B, S, *rest, *way) for model in pair], device, settings.repeats)
                 for way in ways]
        ours, theirs = map(min, zip(*times))
        if make_work is decoding:
            print_row('decode, best of plain and static (ours compiled)', f'{B} x {S} + {new}', B * new, ours, theirs)
        else:
            mfu = B * S / ours * sizes(replace(config, context=S))['train_flops'] / peak
            names = ' and '.join(str(d)[6:] for d, in types)
            print_row(f'training step, AdamW, best of plain and compiled, {names}, width {config.n_embd}'
                      + f', MFU {mfu:.0%}' * (mfu > 0), f'{B} x {S}', B * S, ours, theirs)
        for way, (a, b) in zip(ways, times):
            print(f'  {way}: ours {a:.3f} s, theirs {b:.3f} s', file=sys.stderr)


if __name__ == '__main__':
    with configurator.one_line_errors('bench.py'):
        settings, device, dtype = set_up(sys.argv[1:], BenchConfig)
        side_by_side(device, dtype, settings)
