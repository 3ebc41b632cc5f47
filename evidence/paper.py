"""What the full size takes, on paper: `python -m evidence.paper`. Every figure is worked out by a function below.

    memory      bytes of a process, when W of them train with --shard=True --recompute=True     (runtime/distributed.py)
    training    hours to train on T tokens = FLOPs a token x T / (W x peak x MFU)                 (model.sizes)
    thinking    hours of AIME'25 under Markovian RSA, from bytes that a decoding step reads       (report, VI)

What memory works out for parameters, gradients and optimizers is measured for a small model by

    torchrun --nproc_per_node=2 -m evidence.paper

Data sheets: H100 SXM 989 TFLOP/s dense bf16, 3.35 TB/s, 80 GB; MI300X 1,307 TFLOP/s, 5.3 TB/s, 192 GB. MFU, model FLOPs
utilisation, is what a run reaches of the peak: 7 % was measured (RESULTS.md, On a GPU); 40 % is what well-tuned
trainers of large dense models report (PaLM, arXiv 2204.02311: 46 %), and is here to compare.

Legend:  W processes, one a GPU   E width   V vocabulary   L layers   N experts
"""
import math
import os
import sys
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

import configurator
from runtime.distributed import orthogonalize_shards, local_part
from model import Block, Zaya, ZayaConfig, sizes
from optim import make_optimizers, orthogonalize
from train import TrainConfig, build

GPUS = {'H100': (989e12, 3.35e12, 80e9), 'MI300X': (1307e12, 5.3e12, 192e9)}            # FLOP/s, bytes/s, bytes
MEASURED, HOPED = 0.07, 0.40                                                             # MFU
PHASES = (12e12, 4096, '12T tokens at 4K'), (1.2e12, 32_768, '1.2T at 32K'), (660e9, 131_072, '660B SFT at 131K'), \
    (1e9, 32_768, 'an SFT of 1B tokens at 32K')


def meta(config):
    with torch.device('meta'):
        return Zaya(config)


def memory(config, W, tokens=0):
    """Bytes of one process of W with `tokens` in a micro-batch -> {what: bytes}. All but the last two are 1 / W of what
    one process would hold: float32 weights, gradients, and momenta (Muon one, AdamW two a weight)."""
    model = meta(config)
    muon, adamw = ([p for group in o.param_groups for p in group['params']] for o in make_optimizers(model, 1.0))
    matrices, others = (sum(p.numel() for p in params) for params in (muon, adamw))
    layer = model.layers[0]
    experts = sum(p.numel() for p in layer.moe.experts.parameters())
    rest = sum(p.numel() for p in layer.parameters()) - experts
    embedding = config.vocab_size * config.n_embd
    held = {'parameters': 4 * (matrices + others) / W, 'gradients': 4 * (matrices + others) / W,
            'optimizers': (4 * matrices + 8 * others) / W}
    if not tokens:
        return held
    # Whole at a time, at the least: the embedding, its gradient and that times the loss's, float32; of two layers, the
    # next being fetched meanwhile, the experts in bf16 and the rest in float32; one layer's gradient, and the experts'
    # once more in float32, to be added up. Kept: a float32 row of each layer's input and router state, and what one
    # layer, computed again, keeps for its backward.
    whole = 3 * 4 * embedding + 3 * (2 * experts + 4 * rest) + 4 * experts
    kept = tokens * (4 * config.n_layer * (config.n_embd + config.router_dim) + kept_by_a_layer(config))
    return held | {'gathered': whole, 'activations': kept}


def kept_by_a_layer(config):
    """Bytes a token that autograd keeps of one layer, counted: what it saves of 256 tokens, less that of 128. On a CPU,
    in float32; in bf16 it is less."""
    layer, counts = Block(config, 0), []
    for S in 128, 256:
        saved = {}                                              # by where it lies: views of one tensor count once

        def keep(t):
            saved[t.untyped_storage().data_ptr()] = t
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            angles = torch.zeros(1, S, config.rope_dim // 2)
            layer(torch.zeros(1, S, config.n_embd, requires_grad=True), None, angles, angles)
        counts.append(sum(t.untyped_storage().nbytes() for t in saved.values()))
    return (counts[1] - counts[0]) / 128


def traffic(config, W):
    """Bytes that one process receives: for each micro-batch, weights for forward and backward, and gradients; once a
    step, Muon's rows, there and back."""
    model, part = meta(config), (W - 1) / W
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for layer in model.layers for p in layer.moe.experts.parameters())
    matrices = sum(p.numel() for p in make_optimizers(model, 1.0)[0].param_groups[0]['params']) - experts
    embedding = config.vocab_size * config.n_embd               # gathered once: it stays until the step is over
    return {'weights': part * (2 * (2 * experts + 4 * (total - experts)) - 4 * embedding),
            'gradients': part * 4 * total, 'muon': part * 2 * 4 * matrices / W}


def training(tokens, context, W, peak, mfu):
    """Hours to train the 8B model on so many tokens. mfu: without --recompute, which adds a third to the FLOPs."""
    return tokens * sizes(replace(ZayaConfig.zaya1_8b(), context=context))['train_flops'] / (W * peak * mfu) / 3600


def thinking(tokens, rows, bandwidth, gpus=1, problems=30, length=24_000, bits=16):
    """Hours that AIME'25's problems take at `tokens` generated each, `rows` rollouts at a time a GPU, if reading memory
    were all: at every step the experts that `rows` tokens choose evenly, all other weights, and the rows' KV caches,
    `length` tokens long on average. A GPU takes whole problems."""
    config = ZayaConfig.zaya1_8b()
    n, embedding = sizes(config), config.vocab_size * config.n_embd
    experts = 3 * config.n_embd * config.expert_dim * config.n_layer                     # one in each layer
    visited = config.n_expert * (1 - (1 - 1 / config.n_expert) ** rows)
    weights = (n['active'] - experts + embedding + visited * experts) * bits / 8
    steps_a_second = bandwidth / (weights + rows * length * n['kv_bytes'])
    return problems / min(gpus, problems) * tokens / (rows * steps_a_second) / 3600


def rows_that_fit(capacity, length=40_000, most=480):
    """Rollouts whose KV caches fit beside the bf16 weights, at their longest: 16 each of 30 problems at most."""
    n = sizes(ZayaConfig.zaya1_8b())
    return int(min(most, (0.9 * capacity - 2 * n['total']) // (length * n['kv_bytes'])))


def hours(h):
    units = ('seconds', 1 / 3600), ('minutes', 1 / 60), ('hours', 1), ('days', 24), ('years', 24 * 365.25)
    name, unit = max((pair for pair in units if h >= 2 * pair[1]), key=lambda pair: pair[1], default=units[0])
    return f'{h / unit:,.0f} {name}'


def main():
    config, GB = ZayaConfig.zaya1_8b(), 1e9
    print('| processes | parameters | gradients | optimizers | gathered | activations | sum, GB |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    for W in 1, 8, 16:
        held = memory(config, W, tokens=16_384).values()
        print(f'| {W} | ' + ' | '.join(f'{value / GB:,.1f}' for value in held) + f' | {sum(held) / GB:,.1f} |')
    print(f'\na layer keeps {kept_by_a_layer(config) / 1024:,.0f} KiB a token; a process of 8 receives, in GB: '
          + ', '.join(f'{name} {value / GB:.1f}' for name, value in traffic(config, 8).items()))
    print('\n| training, H100 | FLOPs | 1 | 8 | 1,024 | 1,024 at 40 % |')
    print('| --- | --- | --- | --- | --- | --- |')
    peak, bandwidth, capacity = GPUS['H100']
    for tokens, context, name in PHASES:
        times = [hours(training(tokens, context, W, peak, MEASURED)) for W in (1, 8, 1024)]
        print(f'| {name} | {training(tokens, context, 1, 1 / 3600, 1):.1e} | ' + ' | '.join(times)
              + f' | {hours(training(tokens, context, 1024, peak, HOPED))} |')
    print("\n| AIME'25, 30 problems | rollouts at a time a GPU | 1 | 8 | 1,024 |")
    print('| --- | --- | --- | --- | --- |')
    for tokens in 440e3, 740e3:
        for name, (_, bandwidth, capacity) in GPUS.items():
            rows = rows_that_fit(capacity)
            times = [hours(thinking(tokens, min(rows, 16 * math.ceil(30 / gpus)), bandwidth, gpus))
                     for gpus in (1, 8, 1024)]
            print(f'| {tokens / 1e3:.0f}K tokens each, {name}, bf16 | {rows} | ' + ' | '.join(times) + ' |')
        print(f'| {tokens / 1e3:.0f}K, a laptop of 100 GB/s, int4 | 16 | {hours(thinking(tokens, 16, 1e11, bits=4.5))} '
              '| | |')


def measure(config=ZayaConfig(n_layer=4, n_embd=128, n_expert=4, expert_dim=128)):
    """Under torchrun: the parameters, gradients and momenta that this process holds after one step, beside `memory`."""
    settings = TrainConfig(shard=True, device='cpu', dtype='float32')
    model = build(settings, config, torch.device('cpu'))
    optimizers = make_optimizers(model, 1e-3)
    optimizers[0].orthogonalize = partial(orthogonalize_shards, orthogonalize)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    model(tokens, tokens)[1].backward()
    held = {'parameters': model.parameters(), 'gradients': (p.grad for p in model.parameters())}
    held = {name: sum(local_part(t).nbytes for t in tensors) for name, tensors in held.items()}
    for optimizer in optimizers:
        optimizer.step()
    momenta = [t for o in optimizers for state in o.state.values() for t in state.values() if t.ndim]
    held['optimizers'] = sum(local_part(t).nbytes for t in momenta)
    return held, memory(config, dist.get_world_size())


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.paper'):
        if len(sys.argv) > 1:
            raise ValueError(f'{sys.argv[1]}: takes no settings')
        if 'RANK' in os.environ:
            dist.init_process_group('gloo')
            held, computed = measure()
            print(f'| {dist.get_world_size()} | {dist.get_rank()} | ' + ' | '.join(
                f'{held[name]:,} | {computed[name]:,.0f}' for name in held) + ' |')
            dist.destroy_process_group()
        else:
            main()
