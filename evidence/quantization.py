"""Measure what int8 and int4 weights cost: validation loss of the demo model, RSA accuracy of the loops model.

    python train.py config/demo.py && python train.py config/loops.py && python -m evidence.quantization

The large matrices are quantized and dequantized (quantize.py), and the model then runs in float32. int4 is measured
twice: with the range of each group's weights, and with the range of least squared error. bf16 is the precision of the
released weights. 'with int8 inputs' runs kernels/int4.cpp, which also rounds the inputs of the products. The output is
CSV.
"""
import copy
import functools
import statistics
import sys
from dataclasses import dataclass, replace

import torch
from torch import nn

import configurator
import decode
from data.loader import open_dataset
from evaluate import measure
from quantize import dequantize, quantize, quantized
from rsa import RSASettings, load_policy
from runtime import checkpoint, pretrained
from tasks.loops import task


@dataclass
class QuantizationConfig:
    demo: str = 'runs/demo'
    loops: str = 'runs/loops'
    batches: int = 20               # of validation text
    problems: int = 100             # of 25 to 32 steps

    def __post_init__(self):
        configurator.check_ranges(self, batches=(1, None), problems=(1, None))


@torch.no_grad()
def with_changed_matrices(model, change):
    """Return a copy of a Zaya in which each large matrix W is replaced by change(W)."""
    model = copy.deepcopy(model)
    for layer in model.layers:
        linears = [module for module in layer.attn.children() if isinstance(module, nn.Linear)]
        for W in [linear.weight for linear in linears] + [*layer.moe.experts.gate_up, *layer.moe.experts.down]:
            W.copy_(change(W))
    model.embedding.weight.copy_(change(model.embedding.weight))
    return model


CHANGES = {
    'float32': lambda W: W,
    'bf16': lambda W: W.bfloat16(),
    'int8': lambda W: dequantize(**quantize(W, 8)),
    'int4, nearest': lambda W: dequantize(**quantize(W, 4, spans=[1.0], refits=0)),
    'int4': lambda W: dequantize(**quantize(W, 4)),
}


MODELS = {name: functools.partial(with_changed_matrices, change=change) for name, change in CHANGES.items()} | {
    f'int{bits}, with int8 inputs': functools.partial(quantized, bits=bits) for bits in (8, 4)}


@torch.no_grad()
def main(config):
    demo, _ = pretrained.load(config.demo)
    settings = checkpoint.load_checkpoint(config.demo)['config']
    loader, _ = open_dataset(settings['dataset'], 'val', settings['batch_size'], demo.config.context, settings['seed'])
    policy = load_policy(config.loops, torch.device('cpu'))
    problems = task.test_problems('hard', config.problems)
    rsa = RSASettings(rounds=task.rounds_needed(task.LENGTHS['hard'][1], 41), budget=41, tail=10)
    print('weights,val_loss,more_than_float32,rsa_mean,ci95')
    first = None
    for name, make in MODELS.items():
        model = make(demo)
        loss = statistics.fmean(model(*loader.batch(index))[1].item() for index in range(config.batches))
        first = first or loss
        model = make(policy.model)
        row = measure(replace(policy, model=model, step=decode.folded(model)), problems, rsa, name=name)
        print(f'{name!r},{loss:.4f},{loss - first:+.4f},{100 * row.mean:.1f},{100 * row.half:.1f}', flush=True)


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.quantization'):
        main(*configurator.read(sys.argv[1:], QuantizationConfig))
