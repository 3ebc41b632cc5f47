"""Estimate what the full size takes: `python -m evidence.paper`. Every figure is computed by a function below.

    memory           bytes per process when W train with --shard=True --recompute=True          (runtime/distributed.py)
    training_hours   hours to train on T tokens = FLOPs per token x T / (W x peak x MFU)          (model.sizes)
    rsa_hours        hours of AIME'25 under Markovian RSA, from the bytes that decoding reads     (report, VI)

For a small model, the figures of `memory` for parameters, gradients and optimizers are compared with measured ones by

    torchrun --nproc_per_node=2 -m evidence.paper

Data sheets: H100 SXM 989 TFLOP/s dense bf16, 3.35 TB/s, 80 GB; MI300X 1,307 TFLOP/s, 5.3 TB/s, 192 GB. MFU, model FLOPs
utilization, is the fraction of the peak that a run reaches: 7 % was measured (RESULTS.md, On a GPU). For comparison,
40 % is typical of well-tuned trainers of large dense models (PaLM, arXiv 2204.02311: 46 %).

Legend:  W processes, one per GPU   E width   V vocabulary   L layers   N experts
"""
import math
import os
import sys
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

import configurator
from model import Block, Zaya, ZayaConfig, sizes
from optim import make_optimizers, orthogonalize
from runtime.distributed import local_part, orthogonalize_shards
from train import TrainConfig, build

GPUS = {'H100': (989e12, 3.35e12, 80e9), 'MI300X': (1307e12, 5.3e12, 192e9)}            # FLOP/s, bytes/s, bytes
MEASURED, TUNED = 0.07, 0.40                                                             # MFU
PHASES = (12e12, 4096, '12T tokens at 4K'), (1.2e12, 32_768, '1.2T at 32K'), (660e9, 131_072, '660B SFT at 131K'), \
    (1e9, 32_768, 'an SFT of 1B tokens at 32K')


def counts(config):
    """Return the number of parameters that each optimizer updates, of a layer's experts and of the rest of a layer."""
    with torch.device('meta'):
        model = Zaya(config)
    count = lambda parameters: sum(p.numel() for p in parameters)
    muon, adamw = (count(p for group in o.param_groups for p in group['params']) for o in make_optimizers(model, 1.0))
    layer = model.layers[0]
    experts = count(layer.moe.experts.parameters())
    return muon, adamw, experts, count(layer.parameters()) - experts


def memory(config, W, tokens=0):
    """Return {kind: bytes} of one of W processes, with `tokens` per micro-batch. Parameters, gradients and momenta (one
    per weight for Muon, two for AdamW) are sharded, in float32: each process holds 1 / W of them."""
    muon, adamw, experts, rest = counts(config)
    held = {'parameters': 4 * (muon + adamw) / W, 'gradients': 4 * (muon + adamw) / W,
            'optimizers': (4 * muon + 8 * adamw) / W}
    if not tokens:
        return held
    # Gathered at the same time, at least: the embedding, its gradient and the loss's term of that gradient, in float32;
    # two layers (one is prefetched) and one gradient, with experts in bf16 and the rest in float32; the gradient of the
    # experts in float32, for the reduction. Activations: float32 inputs and router states of all layers, and what one
    # recomputed layer saves for its backward.
    gathered = 3 * 4 * config.vocab_size * config.n_embd + 3 * (2 * experts + 4 * rest) + 4 * experts
    kept = tokens * (4 * config.n_layer * (config.n_embd + config.router_dim) + saved_by_layer(config))
    return held | {'gathered': gathered, 'activations': kept}


def saved_by_layer(config):
    """Return the bytes per token that autograd saves in one layer, measured as the difference between 256 tokens and
    128. On a CPU, in float32; bf16 needs less."""
    layer, counts = Block(config, 0), []
    for S in 128, 256:
        saved = {}                                              # by address, so that views of a tensor count once

        def save(t):
            saved[t.untyped_storage().data_ptr()] = t
            return t
        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            angles = torch.zeros(1, S, config.rope_dim // 2)
            layer(torch.zeros(1, S, config.n_embd, requires_grad=True), None, angles, angles)
        counts.append(sum(t.untyped_storage().nbytes() for t in saved.values()))
    return (counts[1] - counts[0]) / 128


def traffic(config, W):
    """Return {kind: bytes} that one process receives: weights (for forward and backward) and gradients per micro-batch,
    and Muon's matrices, in both directions, per step."""
    muon, adamw, experts, _ = counts(config)
    experts, total, part = config.n_layer * experts, muon + adamw, (W - 1) / W
    embedding = config.vocab_size * config.n_embd               # gathered once per step
    return {'weights': part * (2 * (2 * experts + 4 * (total - experts)) - 4 * embedding),
            'gradients': part * 4 * total, 'muon': part * 2 * 4 * (muon - experts) / W}


def training_hours(tokens, context, W, peak, mfu):
    """Return the hours that W GPUs train the 8B model. mfu: without --recompute, which adds a third to the FLOPs."""
    return tokens * sizes(replace(ZayaConfig.zaya1_8b(), context=context))['train_flops'] / (W * peak * mfu) / 3600


def rsa_hours(tokens, rollouts, bandwidth, gpus=1, problems=30, length=24_000, bits=16):
    """Return the hours that AIME'25 takes at `tokens` generated per problem if decoding is memory-bandwidth bound. Each
    step of a GPU reads the experts that its `rollouts` visit (routed evenly), all other weights, and the KV caches, of
    `length` tokens on average. A problem is not split over GPUs."""
    config = ZayaConfig.zaya1_8b()
    n, embedding = sizes(config), config.vocab_size * config.n_embd
    experts = 3 * config.n_embd * config.expert_dim * config.n_layer                     # one in each layer
    visited = config.n_expert * (1 - (1 - 1 / config.n_expert) ** rollouts)
    weights = (n['active'] - experts + embedding + visited * experts) * bits / 8
    steps_per_second = bandwidth / (weights + rollouts * length * n['kv_bytes'])
    return problems / min(gpus, problems) * tokens / (rollouts * steps_per_second) / 3600


def rollouts_that_fit(capacity, length=40_000, most=480):
    """Return how many rollouts fit next to the bf16 weights with KV caches of full length. most: 16 for each of 30
    problems."""
    n = sizes(ZayaConfig.zaya1_8b())
    return int(min(most, (0.9 * capacity - 2 * n['total']) // (length * n['kv_bytes'])))


def duration(hours):
    """Return hours as text, in the largest unit that gives at least 2."""
    units = ('years', 24 * 365.25), ('days', 24), ('hours', 1), ('minutes', 1 / 60), ('seconds', 1 / 3600)
    name, unit = next((pair for pair in units if hours >= 2 * pair[1]), units[-1])
    return f'{hours / unit:,.0f} {name}'


def print_row(*cells):
    print(f'| {" | ".join(cells)} |')


def print_estimates():
    config, GB = ZayaConfig.zaya1_8b(), 1e9
    print('| processes | parameters | gradients | optimizers | gathered | activations | sum, GB |')
    print('| --- ' * 7 + '|')
    for W in 1, 8, 16:
        held = memory(config, W, tokens=16_384).values()
        print_row(str(W), *(f'{value / GB:,.1f}' for value in [*held, sum(held)]))
    print(f'\na layer saves {saved_by_layer(config) / 1024:,.0f} KiB per token; one of 8 processes receives, in GB: '
          + ', '.join(f'{name} {value / GB:.1f}' for name, value in traffic(config, 8).items()))
    print('\n| training, H100 | FLOPs | 1 | 8 | 1,024 | 1,024 at 40 % |')
    print('| --- ' * 6 + '|')
    peak, _, _ = GPUS['H100']
    for tokens, context, name in PHASES:
        print_row(name, f'{training_hours(tokens, context, 1, 1 / 3600, 1):.1e}',
                  *(duration(training_hours(tokens, context, W, peak, mfu))
                    for W, mfu in ((1, MEASURED), (8, MEASURED), (1024, MEASURED), (1024, TUNED))))
    print("\n| AIME'25, 30 problems | rollouts at once per GPU | 1 | 8 | 1,024 |")
    print('| --- ' * 5 + '|')
    for tokens in 440e3, 740e3:
        for name, (_, bandwidth, capacity) in GPUS.items():
            fit = rollouts_that_fit(capacity)
            print_row(f'{tokens / 1e3:.0f}K tokens each, {name}, bf16', str(fit),
                      *(duration(rsa_hours(tokens, min(fit, 16 * math.ceil(30 / gpus)), bandwidth, gpus))
                        for gpus in (1, 8, 1024)))
        print(f'| {tokens / 1e3:.0f}K, a laptop of 100 GB/s, int4 | 16 | '
              f'{duration(rsa_hours(tokens, 16, 1e11, bits=4.5))} | | |')


def measure(config=ZayaConfig(n_layer=4, n_embd=128, n_expert=4, expert_dim=128)):
    """Under torchrun: return the bytes of parameters, gradients and momenta in this process after one step, and the
    result of `memory`."""
    model = build(TrainConfig(shard=True, device='cpu', dtype='float32'), config, torch.device('cpu'))
    optimizers = make_optimizers(model, 1e-3)
    optimizers[0].orthogonalize = partial(orthogonalize_shards, orthogonalize)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    model(tokens, tokens)[1].backward()
    held = {'parameters': model.parameters(), 'gradients': [p.grad for p in model.parameters()]}
    for optimizer in optimizers:
        optimizer.step()
    held['optimizers'] = [t for o in optimizers for state in o.state.values() for t in state.values() if t.ndim]
    return ({kind: sum(local_part(t).nbytes for t in tensors) for kind, tensors in held.items()},
            memory(config, dist.get_world_size()))


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.paper'):
        configurator.read(sys.argv[1:])                         # it has no settings
        if 'RANK' in os.environ:
            dist.init_process_group('gloo')
            measured, computed = measure()
            print_row(str(dist.get_world_size()), str(dist.get_rank()),
                      *(f'{measured[kind]:,} | {computed[kind]:,.0f}' for kind in measured))
            dist.destroy_process_group()
        else:
            print_estimates()
