"""Measure speed and memory of a model of ZAYA1-8B's size on a CPU, in bf16, int8 and int4.

    python -m evidence.full_size --folder=FOLDER        FOLDER takes 17.7 GB of disk, FOLDER-int8 9 GB, FOLDER-int4 6 GB

writes random weights in the released layout and size (once), quantizes them (once), and measures each precision in a
fresh process: loading time, resident memory, prefill of 512 tokens, and decoding for 1 and 16 sequences, after an empty
context and after 8K tokens (the cached values are arbitrary: they do not affect speed). --peer=True also measures
`transformers` in bf16, alternating with ours in one process. The generated text is meaningless and is not looked at.
The bandwidth bound of decoding is the memory bandwidth divided by the bytes that a step must read. The bandwidth is
that of summing a GiB with all threads, measured alternately with the work.

Legend:  B sequences   S tokens per sequence
"""
import inspect
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import configurator                             # before torch: it sets how threads wait
import torch

import decode
from bench import alternate
from model import Zaya, ZayaConfig
from runtime import pretrained
from runtime.quantize_folder import quantize_folder

CPU = torch.device('cpu')


@dataclass
class FullSizeConfig:
    folder: str = 'runs/full_size'
    bits: int = 0                   # measure one precision: 16, 8 or 4; 0: all, each in its own process
    peer: bool = False              # transformers as well, in bf16
    steps: int = 8                  # decoding steps timed
    layers: int = 40                # fewer save disk and time
    tiny: bool = False              # a tiny model: a smoke test

    def __post_init__(self):
        configurator.check_ranges(self, steps=(1, None), bits=(0, 16), layers=(1, 40))


TINY = ZayaConfig(vocab_size=512, context=16_384, n_layer=2, n_embd=128, n_head=4, n_kv_head=2, head_dim=32, n_expert=4,
                  expert_dim=128, router_dim=32, skip_expert=True)


def write_random(folder, config):
    """Write a checkpoint of random bf16 weights, one file per layer. All experts are equally likely."""
    save_file = configurator.package('safetensors.torch').save_file
    with torch.device('meta'):
        shapes = {name: t.shape for name, t in Zaya(config).state_dict().items()}
    torch.manual_seed(0)
    noise, weight_map = torch.randn(2 ** 22), {}

    def random(name, shape):
        if name.endswith('balancing_bias'):
            return torch.tensor([0.0] * config.n_expert + [-1.0])               # 'skip' is never chosen
        n = shape.numel()
        t = noise.roll(int(torch.randint(2 ** 22, ()))).bfloat16().repeat(-(-n // len(noise)))[:n].view(shape)
        if len(shape) > 1:
            return t * (shape[-1] ** -0.5 if 'router' in name else 0.02)
        return t * 0.1 + any(word in name for word in ('scale', 'norm', 'temperature'))

    layer_of = lambda name: name.split('.')[1] if name.startswith('layers.') else ''
    for number, (_, names) in enumerate(itertools.groupby(shapes, layer_of)):
        tensors = {pretrained.released_name(name): random(name, shapes[name]).contiguous() for name in names}
        file = f'model-{number:05}.safetensors'
        save_file(tensors, os.path.join(folder, file), metadata={'format': 'pt'})
        weight_map |= dict.fromkeys(tensors, file)
    settings = pretrained.config_to_json(config) | {'dtype': 'bfloat16', 'eos_token_id': 1}
    index = {'metadata': {}, 'weight_map': weight_map}
    for name, content in ('model.safetensors.index.json', index), ('config.json', settings):
        Path(folder, name).write_text(json.dumps(content))


def bytes_per_step(config, bits, B, context):
    """Return the bytes that a decoding step must read: the active weights, the output head and the KV cache."""
    E, N, L = config.n_embd, config.n_expert, config.n_layer
    expert, d = 3 * E * config.expert_dim, config.head_dim
    attention = E * d * (2 * config.n_head + 2 * config.n_kv_head)
    experts = N * (1 - (1 - 1 / N) ** B)                        # expected number that B tokens visit, evenly routed
    weight = {16: 2, 8: 1, 4: 5 / 8}[bits]
    cache = B * context * L * 2 * config.n_kv_head * d * 2
    return weight * (L * (experts * expert + attention) + config.vocab_size * E) + cache


def cache_of(reference, output):
    """Return the cache of an output of `transformers` as the argument of the next call, which is `cache` from 5.24 on
    and `past_key_values` before."""
    name = 'cache' if 'cache' in inspect.signature(reference.forward).parameters else 'past_key_values'
    return {name: output[name]}


@torch.no_grad()
def measure(folder, config, bits, peer, steps):
    """Print the table lines of one precision."""
    start = time.perf_counter()
    model = pretrained.from_pretrained(folder)
    step = decode.folded(model)
    loaded = time.perf_counter() - start
    for t in [*model.parameters(), *model.buffers()]:           # touch each 4 KiB page once: from disk into memory
        t.flatten().view(torch.uint8)[::4096].sum()
    resident = int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')     # with mapped files
    theirs = peer and configurator.package('transformers').ZayaForCausalLM.from_pretrained(
        folder, attn_implementation='sdpa', dtype=torch.bfloat16)
    ones, bandwidths, name = torch.ones(2 ** 28), [], {16: 'bf16', 8: 'int8', 4: 'int4'}[bits]

    def report(work, tokens, works, repeats, read=None):        # read: bytes
        *times, sum_time = alternate([*works, ones.sum], CPU, repeats, warm_up=1)
        bandwidths.append(ones.nbytes / sum_time)
        rates = [f'{tokens / t:.1f}' for t in times] + [''] * (2 - len(times))
        bound = read and bandwidths[-1] / read                  # steps/s
        bounds = [f'{tokens * bound:.1f}', f'{1 / times[0] / bound:.0%}'] if bound else ['', '']
        print(f'| {name} | {work} | {" | ".join(rates + bounds)} |', flush=True)

    prompt = torch.randint(2, config.vocab_size, (1, 512))
    works = [lambda: model(prompt, cache=model.make_cache(1, 512), last_only=True),
             lambda: theirs(prompt, use_cache=True, logits_to_keep=1)]
    report('prefill 512', 512, works[:2 if theirs else 1], 2)
    for context, B in itertools.product((0, 8192), (1, 16)):
        cache = model.make_cache(B, context + 8 * steps + 8)
        cache.lengths = [context] * B
        works = [lambda: step(cache, torch.randint(2, config.vocab_size, (B,)))]
        if theirs and not context:
            past = cache_of(theirs, theirs(torch.randint(2, config.vocab_size, (B, 1)), use_cache=True))
            works.append(lambda: theirs(torch.randint(2, config.vocab_size, (B, 1)), use_cache=True, **past))
        report(f'decode {B} after {context:,}', B, works, steps, bytes_per_step(config, bits, B, context))
    print(f'{name}: loaded in {loaded:.1f} s; {resident / 2**30:.1f} GiB resident, without a cache; memory bandwidth '
          f'{min(bandwidths) / 2**30:.1f} to {max(bandwidths) / 2**30:.1f} GiB/s', file=sys.stderr)


def main(config):
    sizes = TINY if config.tiny else replace(ZayaConfig.zaya1_8b(), n_layer=config.layers)
    folder = {bits: config.folder.rstrip('/') + {16: '', 8: '-int8', 4: '-int4'}[bits] for bits in (16, 8, 4)}
    if not os.path.exists(os.path.join(folder[16], 'config.json')):
        os.makedirs(folder[16], exist_ok=True)
        write_random(folder[16], sizes)
    if config.bits:
        if config.bits != 16 and not os.path.exists(folder[config.bits]):
            quantize_folder(folder[16], folder[config.bits], config.bits)
        return measure(folder[config.bits], sizes, config.bits, config.peer and config.bits == 16, config.steps)
    print('| weights | work | ours, tokens/s | transformers | bandwidth bound, tokens/s | reached |')
    print('| --- ' * 6 + '|', flush=True)
    for bits in 16, 8, 4:
        if subprocess.run([sys.executable, '-m', 'evidence.full_size', *sys.argv[1:], f'--bits={bits}']).returncode:
            raise ValueError(f'measuring {bits} bits failed, for the reason above')


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.full_size'):
        main(*configurator.read(sys.argv[1:], FullSizeConfig))
