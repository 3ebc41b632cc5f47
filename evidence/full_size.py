"""How fast is a model of ZAYA1-8B's size on this machine, and how much memory does it take? In bf16, int8 and int4.

    python -m evidence.full_size --folder=FOLDER        needs 17.7 GB of disk for FOLDER, 9 GB and 6 GB beside it

writes random weights in exactly the released layout and size (once), quantizes them (once), and measures each in a
fresh process: the time to load, the resident memory, prefill of 512 tokens, and decoding one token a row, after an
empty and after an 8K context (made up: what is in a cache does not change its speed). With --peer=True `transformers`
does the same in bf16, in turns with ours, in one process. What the text would be is not looked at: random weights have
nothing to say. The floor is what memory allows: the bytes that a step must read, at the machine's speed of reading.

Legend:  B rows   S tokens
"""
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import torch

from runtime import pretrained
import configurator
import decode
from bench import alternate
from model import Zaya, ZayaConfig
from runtime.quantize_folder import quantize_folder


@dataclass
class FullSizeConfig:
    folder: str = 'runs/full_size'
    bits: int = 0                   # measure one only: 16, 8 or 4; 0: all, each in a process of its own
    peer: bool = False              # transformers as well, in bf16
    steps: int = 8                  # of decoding, timed
    layers: int = 40                # fewer of that size, where the disk or the time is short
    tiny: bool = False              # a tiny model, to see that it works

    def __post_init__(self):
        configurator.check_ranges(self, steps=(1, None), bits=(0, 16), layers=(1, 40))


TINY = ZayaConfig(vocab_size=512, context=16_384, n_layer=2, n_embd=128, n_head=4, n_kv_head=2, head_dim=32, n_expert=4,
                  expert_dim=128, router_dim=32, skip_expert=True)


def write_random(folder, config):
    """Write a checkpoint of random bf16 weights, one shard a layer; the balancing biases make all experts equally
    likely as they are."""
    save_file = configurator.package('safetensors.torch').save_file
    with torch.device('meta'):
        shapes = {name: t.shape for name, t in Zaya(config).state_dict().items()}
    torch.manual_seed(0)
    noise, weight_map = torch.randn(2 ** 22), {}

    def random(name, shape):
        if name.endswith('balancing_bias'):
            return torch.tensor([0.0] * config.n_expert + [-1.0])               # 'skip' never wins
        n = shape.numel()
        t = noise.roll(int(torch.randint(2 ** 22, ()))).bfloat16().repeat(-(-n // len(noise)))[:n].view(shape)
        if len(shape) > 1:
            return t * (shape[-1] ** -0.5 if 'router' in name else 0.02)
        return t * 0.1 + any(word in name for word in ('scale', 'norm', 'temperature'))

    place = lambda name: name.split('.')[1] if name.startswith('layers.') else ''
    for number, (_, names) in enumerate(itertools.groupby(shapes, place)):
        tensors = {pretrained.released_name(name): random(name, shapes[name]).contiguous() for name in names}
        file = f'model-{number:05}.safetensors'
        save_file(tensors, os.path.join(folder, file), metadata={'format': 'pt'})
        weight_map |= dict.fromkeys(tensors, file)
    settings = pretrained.config_to_json(config) | {'dtype': 'bfloat16', 'eos_token_id': 1}
    index = {'metadata': {}, 'weight_map': weight_map}
    for name, content in ('model.safetensors.index.json', index), ('config.json', settings):
        with open(os.path.join(folder, name), 'w') as file:
            json.dump(content, file)


def resident():
    """GiB of this process in memory, mapped files included."""
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2 ** 30


def memory_speed():
    """Bytes a second at which the machine reads, from a sum over 1 GiB."""
    t, times = torch.ones(2 ** 28), []
    for _ in range(4):
        began = time.perf_counter()
        t.sum()
        times.append(time.perf_counter() - began)
    return t.nbytes / min(times)


def bytes_a_step(config, bits, B, context):
    """What one decoding step must read at least: the active weights, the head, the cache."""
    E, N, L = config.n_embd, config.n_expert, config.n_layer
    expert, d = 3 * E * config.expert_dim, config.head_dim
    attention = E * d * (2 * config.n_head + 2 * config.n_kv_head)
    experts = N * (1 - (1 - 1 / N) ** B)                        # that B rows use, if all are equally likely
    weight = {16: 2, 8: 1, 4: 5 / 8}[bits]
    cache = B * context * L * 2 * config.n_kv_head * d * 2
    return weight * (L * (experts * expert + attention) + config.vocab_size * E) + cache


@torch.no_grad()
def measure(folder, config, bits, peer, steps):
    """Print the rows of one model."""
    began = time.perf_counter()
    model = pretrained.from_pretrained(folder)
    step = decode.folded(model)
    loaded = time.perf_counter() - began
    for t in [*model.parameters(), *model.buffers()]:           # from the disk into memory, once: each page of 4 KiB
        t.flatten().view(torch.uint8)[::4096].sum()
    memory = resident()
    theirs = None
    if peer:
        import transformers
        theirs = transformers.ZayaForCausalLM.from_pretrained(folder, attn_implementation='sdpa', dtype=torch.bfloat16)
    speed, name = memory_speed(), {16: 'bf16', 8: 'int8', 4: 'int4'}[bits]
    prompt = torch.randint(2, config.vocab_size, (1, 512))
    works = [lambda: model(prompt, cache=model.make_cache(1, 512), last_only=True)]
    if theirs:
        works.append(lambda: theirs(prompt, use_cache=True, logits_to_keep=1))
    times = alternate(works, torch.device('cpu'), 2, warm_up=1)
    print(f'| {name} | prefill 512 | ' + ' | '.join(f'{512 / t:.1f}' for t in times) + ' |' * (2 - len(times))
          + ' | | |', flush=True)
    for context in 0, 8192:
        for B in 1, 16:
            cache = model.make_cache(B, context + 8 * steps + 8)
            cache.lengths = [context] * B
            works = [lambda: step(cache, torch.randint(2, config.vocab_size, (B,)))]
            if theirs and not context:
                state = [theirs(torch.randint(2, config.vocab_size, (B, 1)), use_cache=True).past_key_values]
                works.append(lambda: theirs(torch.randint(2, config.vocab_size, (B, 1)), past_key_values=state[0],
                                            use_cache=True))
            times = alternate(works, torch.device('cpu'), steps, warm_up=1)
            floor = speed / bytes_a_step(config, bits, B, context)
            print(f'| {name} | decode {B} after {context:,} | ' + ' | '.join(f'{B / t:.1f}' for t in times)
                  + ' |' * (2 - len(times)) + f' | {B * floor:.1f} | {1 / times[0] / floor:.0%} |', flush=True)
    print(f'{name}: loaded in {loaded:.1f} s; {memory:.1f} GiB resident, without a cache; memory reads '
          f'{speed / 2**30:.1f} GiB/s', file=sys.stderr)


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
    print('| weights | work | ours, tokens/s | transformers | floor of memory, tokens/s | reached |')
    print('| --- | --- | --- | --- | --- | --- |', flush=True)
    for bits in 16, 8, 4:
        if subprocess.run([sys.executable, '-m', 'evidence.full_size', *sys.argv[1:], f'--bits={bits}']).returncode:
            raise ValueError(f'measuring {bits} bits failed, for the reason above')


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.full_size'):
        main(*configurator.read(sys.argv[1:], FullSizeConfig))
