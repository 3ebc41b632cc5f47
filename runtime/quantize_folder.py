"""`python quantize.py FOLDER OUT --bits=4`: copy a released folder with its large matrices quantized (quantize.py)."""
import sys
from dataclasses import dataclass

import torch

import configurator
from quantize import QUANTIZED, interleave, quantize
from runtime.pretrained import copy_folder


@dataclass
class QuantizeConfig:
    bits: int = 4                   # 4 or 8

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise ValueError(f'bits is {self.bits}, it must be 4 or 8')


def quantized_tensors(name, tensor, bits):
    """Yield the (name, tensor) pairs that replace a tensor of FOLDER in OUT, under their released names."""
    if not QUANTIZED.fullmatch(name):
        yield name, tensor
        return
    blocks, scales = [], []                                     # per expert, or of the only matrix
    for W in tensor.flatten(0, -3) if tensor.ndim > 2 else [tensor]:
        pieces = [quantize(piece, bits) for piece in W.split(256)]              # each fits into a CPU's cache
        blocks.append(torch.cat([interleave(**piece) for piece in pieces]))
        scales.append(torch.cat([piece['scale'][:, 0] for piece in pieces]))
    for part, values in ('blocks', blocks), ('scale', scales):
        if part == 'blocks' or bits == 8:
            yield f'{name.removesuffix(".weight")}.{part}', torch.stack(values) if tensor.ndim > 2 else values[0]


def quantize_folder(folder, out, bits):
    """Write OUT, completely or not at all. Raise ValueError as copy_folder does, and for a matrix that cannot be
    quantized."""
    copy_folder(folder, out, lambda name, tensor: quantized_tensors(name, tensor, bits),
                {'nanozaya_quantization': {'bits': bits, 'format': 2}}, share={8: 0.51, 4: 0.33}[bits])


if __name__ == '__main__':
    with configurator.one_line_errors('quantize.py'):
        folders, config = configurator.read_with_files(sys.argv[1:], QuantizeConfig)
        if len(folders) != 2:
            raise ValueError('name a released folder and the folder to write: python quantize.py FOLDER OUT --bits=4')
        quantize_folder(*folders, config.bits)
