"""Compare speed and memory with the ZAYA of transformers: `python bench.py` (how both scale: evidence/scaling.py).
`python bench.py --speedrun=True` measures the time of whole training runs instead, from the start of the process.

Both models have the SAME random weights, and nothing is timed unless their logits agree. Each workload alternates
between the two, A B A B ..., in one process, so that other load on the machine slows both. The table reports medians:

    ratio = seconds of transformers / our seconds               above 1: ours is faster

The peer is transformers' ZayaForCausalLM with sdpa attention and the faster of its experts implementations, which is
measured first. 'best' takes each side's fastest variant: plain or compiled. In decoding, the peer's second variant is
its static cache, not compiled, because its model is marked as not compilable in one graph.

Memory is the peak minus what was allocated before the workload: on a GPU according to its allocator, on a CPU in a
fresh process.

Legend:  B sequences   S tokens per sequence
"""
import math
import multiprocessing
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import configurator                             # before torch: it sets how threads wait
import torch

import decode
from model import Zaya, ZayaConfig, sizes
from optim import make_optimizers
from router import Balancer, load_entropy
from runtime.device import name_and_peak, pick_device, pick_dtype, matmuls_in
from runtime.pretrained import save_pretrained
from sample import SamplingOptions, generate


@dataclass
class BenchConfig:
    device: str = 'auto'
    dtype: str = 'auto'             # of 'best' training; 'auto' is bfloat16 where it is faster, else float32
    repeats: int = 5
    speedrun: bool = False          # only the seconds of whole training runs, on the data that `make demo` prepares
    quick: bool = False             # a tiny model, two repeats, no torch.compile: a smoke test
    seed: int = 0

    def __post_init__(self):
        configurator.check_ranges(self, repeats=(1, None), seed=(0, None), dtype=('auto', 'float32', 'bfloat16'))


SMALL = replace(ZayaConfig(), vocab_size=512, context=1024, skip_expert=True)
MEDIUM = ZayaConfig(vocab_size=50_304, context=1024, n_layer=16, n_embd=1024, n_head=8, n_kv_head=2, head_dim=64,
                    n_expert=16, expert_dim=1024, router_dim=128, skip_expert=True)     # about GPT-2's size, active
TINY = ZayaConfig(vocab_size=64, context=64, n_layer=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=8, n_expert=4,
                  expert_dim=16, router_dim=8, skip_expert=True)


# ---- the two models ----

def random_tokens(model, B, S, seed=0):
    """Return random tokens (B, S), the same for both models."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, (B, S), generator=g).to(model.device)


@torch.no_grad()
def zaya(config, device, seed):
    """Return a Zaya with random weights and a balanced expert load, as in a trained model. Freshly initialized routers
    send nearly all tokens to one or two experts, so run the balancer for at most 200 steps."""
    torch.manual_seed(seed)
    model = Zaya(config).to(device)
    for p in model.parameters():
        if p.ndim < 2:                                          # exact ones and zeros would hide differences
            p.add_(torch.randn_like(p), alpha=0.05)
    balancer = Balancer(model.routers, lr=1e-2)
    for step in range(200):
        model(random_tokens(model, 4, min(64, config.context), step))
        if load_entropy(balancer.step()).min() > 0.9 and step >= 60:
            break
    return model


@torch.no_grad()
def make_pair(config, device, seed, experts=None):
    """Return (ours, transformers'), two models with the same weights. experts: the peer's experts implementation, None
    for its default. Raise ValueError if the logits differ or transformers is not installed."""
    transformers = configurator.package('transformers')
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


# ---- workloads: each function returns, for one model, the function to time ----

def training(model, B, S, optimizer='AdamW', dtype=torch.float32, compiled=False):
    """Return a function that takes one training step. Its learning rate is too small to change the weights, so every
    step does equal work. optimizer: 'AdamW', or 'own' for our Muon and AdamW. compiled: our layers stay compiled."""
    tokens = random_tokens(model.train(), B, S)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-7, fused=True)]          # as in transformers' Trainer
    if isinstance(model, Zaya):
        targets, precision = tokens.roll(-1, 1), lambda: matmuls_in(dtype, tokens.device)
        loss_of = lambda: model(tokens, targets)[1]
        optimizers = make_optimizers(model, 1e-7) if optimizer == 'own' else optimizers
        for layer in model.layers if compiled else ():
            layer.compile()                                     # all layers share the graph compiled for the first
    else:
        precision = lambda: torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32)
        forward = torch.compile(model) if compiled else model
        loss_of = lambda: forward(tokens, labels=tokens, use_cache=False).loss

    @torch.enable_grad()
    def step():
        with precision():
            loss = loss_of()
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        torch.set_float32_matmul_precision('highest')           # undo matmuls_in
    return step


def prefill(model, B, S):
    """Return a function that reads prompts into an empty cache and computes the logits of their last tokens."""
    tokens = random_tokens(model.eval(), B, S)
    if isinstance(model, Zaya):
        return lambda: model(tokens, cache=model.make_cache(B, S), last_only=True)
    return lambda: model(tokens, use_cache=True, logits_to_keep=1)


def decoding(model, B, S, new, static=False):
    """Return a function that decodes `new` tokens per prompt, greedily, by each side's own generate. static: constant
    shapes, and ours compiled."""
    tokens = random_tokens(model.eval(), B, S)
    if isinstance(model, Zaya):
        return lambda: generate(model, tokens.tolist(), new, SamplingOptions(temperature=0),
                                step=decode.compiled(model) if static else None)
    return lambda: model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new, min_new_tokens=new,
        eos_token_id=model.config.vocab_size - 1, pad_token_id=0,
        cache_implementation='static' if static else None, disable_compile=True)


# ---- measuring ----

@torch.no_grad()                                                # a training step enables gradients itself
def timed(work, device):
    """Return the seconds of one call."""
    start = time.perf_counter()
    work()
    if device.type != 'cpu':
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def alternate(works, device, repeats, warm_up=2):
    """Return the median seconds of each workload, measured in alternation after warm-up calls."""
    times = [[timed(work, device) for work in works] for _ in range(warm_up + repeats)][warm_up:]
    return [statistics.median(column) for column in zip(*times)]


def peak_memory(device, make_model, make_work, arguments):
    """Return the MiB that a workload allocates at its peak, nan where the system does not report it."""
    work = make_work(make_model(), *arguments)
    if device.type == 'cuda':
        peak, reset = lambda: torch.cuda.max_memory_allocated() / 2 ** 20, torch.cuda.reset_peak_memory_stats
    else:                                                       # Linux: VmHWM is the peak, writing '5' resets it
        peak = lambda: int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1]) / 1024
        reset = lambda: Path('/proc/self/clear_refs').write_text('5')
    try:
        reset()
        before = peak()
        timed(work, device)
        return peak() - before
    except OSError:
        return math.nan


def memory(device, make_model, make_work, arguments):
    """Return peak_memory, measured on a CPU in a fresh process."""
    if device.type == 'cuda':
        return peak_memory(device, make_model, make_work, arguments)
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(peak_memory, (device, make_model, make_work, arguments))


def set_up(arguments, settings_class):
    """Read the command line and print the hardware and versions. Return settings, device and dtype."""
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

def print_row(name, seconds, B, S, new=0, mib='|'):
    """Print one line of the table. seconds: of one call, (ours, transformers'). new: tokens decoded per prompt of S."""
    (ours, theirs), tokens = seconds, B * (new or S)
    rates = f'{tokens / ours:,.0f} | {tokens / theirs:,.0f} | {theirs / ours:.2f}'
    print(f'| {name} | {B} x {S}{f" + {new}" if new else ""} | {rates} | {mib} |', flush=True)


def choose_experts(theirs, device):
    """Set the peer's faster experts implementation and return its name. A third, 'batched_mm', copies the weights for
    every token."""
    seconds = {}
    for experts in 'eager', 'grouped_mm':
        theirs.set_experts_implementation(experts)
        seconds[experts], = alternate([prefill(theirs, 16, theirs.config.max_position_embeddings // 4)], device, 3)
    experts = min(seconds, key=seconds.get)
    theirs.set_experts_implementation(experts)
    return experts


def best(pair, make_work, arguments, variants, device, repeats):
    """Return each side's seconds in its fastest variant (the last arguments of make_work). Log all to stderr."""
    times = []
    for variant in variants:
        times.append(alternate([make_work(model, *arguments, *variant) for model in pair], device, repeats))
        print(f'  {variant}: ours {times[-1][0]:.3f} s, theirs {times[-1][1]:.3f} s', file=sys.stderr)
    return map(min, zip(*times))


def best_training(pair, B, S, dtype, device, repeats):
    """Print each side's fastest training step, with our model FLOPs utilization (MFU) where the peak is known."""
    config, dtypes = pair[0].config, list(dict.fromkeys([torch.float32, dtype]))
    variants = [('AdamW', d, compiled) for compiled in (False, True) for d in dtypes]   # compiled layers stay compiled
    ours, theirs = best(pair, training, (B, S), variants, device, repeats)
    peak = name_and_peak(device, dtype)[1]
    mfu = f', MFU {B * S / ours * sizes(replace(config, context=S))["train_flops"] / peak:.0%}' if peak else ''
    print_row(f'training step, AdamW, best of plain and compiled, {" and ".join(str(d)[6:] for d in dtypes)}, '
              f'width {config.n_embd}{mfu}', (ours, theirs), B, S)


def side_by_side(device, dtype, settings):
    """Print the table: each side's default with its memory, then each side's best, training in dtype."""
    config, B, S, long, prompt, new = (TINY, 2, 16, 32, 4, 8) if settings.quick else (SMALL, 16, 256, 1024, 32, 128)
    pair, repeats = make_pair(config, device, settings.seed), settings.repeats
    default = pair[1].config._experts_implementation
    experts = choose_experts(pair[1], device)
    print(f"peer: transformers' ZayaForCausalLM, sdpa, experts {experts!r} (the faster; its default: {default!r})\n")
    print('| work | shape | ours, tokens/s | transformers | ratio | peak memory, ours | transformers |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    for name, make_work, *arguments in (
            ('training step, AdamW', training, B, S), ('training step, own optimizers', training, B, S, 'own'),
            ('prefill', prefill, 1, long), ('prefill', prefill, B, S),
            ('decode', decoding, 1, prompt, new), ('decode', decoding, B, prompt, new)):
        times = alternate([make_work(model, *arguments) for model in pair], device, repeats)
        mib = [memory(device, partial(one_of_pair, which, config, device, settings.seed, experts), make_work, arguments)
               for which in (0, 1)]
        shape = arguments if make_work is decoding else arguments[:2]
        print_row(name, times, *shape, mib=f'{mib[0]:,.0f} MiB | {mib[1]:,.0f} MiB')
    if settings.quick:
        return
    for rows in 1, B:
        times = best(pair, decoding, (rows, prompt, new), [(False,), (True,)], device, repeats)
        print_row('decode, best of plain and static (ours compiled)', times, rows, prompt, new)
    best_training(pair, B, S, dtype, device, repeats)
    if device.type == 'cuda':
        best_training(make_pair(MEDIUM, device, settings.seed, experts), 32, 1024, dtype, device, repeats)


# ---- the speedrun ----

RUNS = {'ours, config/demo.py': 'train.py config/demo.py --sample_tokens=0 --dtype=float32 --max_steps=205',   # to 5.06
        'a plain GPT, AdamW': '-m evidence.speedrun --model=gpt',
        "transformers' ZAYA, AdamW": '-m evidence.speedrun --model=transformers',
        'ours, config/demo_loops.py': 'train.py config/demo_loops.py --sample_tokens=0'}


def run_program(command):
    """Run `python command`. Return its seconds, start-up included, and its output. Raise ValueError with the last line
    on stderr if it fails."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command.split()], cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f'{command}: {done.stderr.strip().splitlines()[-1]}')
    return time.perf_counter() - began, done.stdout


def speedrun(repeats=3):
    """Print the seconds of each of RUNS, measured in alternation, with its last validation loss; at the end, the
    table of evaluate.py for the last run of config/demo_loops.py. The loss of that run is of other data."""
    seconds, losses = {name: [] for name in RUNS}, {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for i, (name, command) in enumerate(RUNS.items()):
                out = f'{folder}/{i}-{repeat}'
                took, text = run_program(command + f' --out_dir={out}' * command.startswith('train.py'))
                seconds[name].append(took)
                losses[name] = re.findall(r'val loss ([0-9.]+)', text)[-1]
        print('\n| run | seconds, median | all | val loss |\n| --- | --- | --- | --- |')
        for name, each in seconds.items():
            every = ', '.join(f'{took:.0f}' for took in each)
            print(f'| {name} | {statistics.median(each):.0f} | {every} | {losses[name]} |')
        print(run_program(f'evaluate.py --split=hard --ckpt={out}')[1])


if __name__ == '__main__':
    with configurator.one_line_errors('bench.py'):
        settings, device, dtype = set_up(sys.argv[1:], BenchConfig)
        speedrun() if settings.speedrun else side_by_side(device, dtype, settings)
