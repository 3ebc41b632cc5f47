"""Quantization: the weights of a released model in 8 or 4 bits, to read and to keep half or a quarter as many bytes.

For a single token a model does nothing but read its weights, so its speed is that of memory: bytes a weight decide. A
weight w becomes a code c, a whole number of few bits, and neighbours along the input share a scale s and an offset z:

    8 bits   w ~ s c               c = -127 .. 127, one s for each row of a matrix, which is all inputs of an output
    4 bits   w ~ s (c - 8) + z     c = 0 .. 15, s and z in bf16 for each 32 inputs of an output: 5 bits a weight

Round to nearest: c = 0 is the group's smallest weight, c = 15 the largest, in between c is rounded. But a single large
weight makes s large, and all its neighbours coarse. So narrower spans are tried as well, which clip the largest, and
the one with the least squared error of its group is kept.

What is quantized are the large matrices: each expert (96 % of all weights), the projections of attention, and the
embedding, which is also the head. Router, convolutions, norms, temperature, residual scaling stay as they are: they are
0.6 % of the weights; a router's choice and the temperature of attention are what all else depends on; and CCA's norm
and the stream itself amplify small errors (report, IV-D).

    y = x W^T          as it is defined: dequantize, multiply
                       on a CPU for few rows: operators of torch that read the codes (`Matrix.forward`)

`python quantize.py FOLDER OUT --bits=4` reads a released folder tensor by tensor and writes another, which sample.py
and rsa.py take like any. Legend: out, in: of a matrix; G groups of a row; N experts; T tokens; E, F: see model.py.
"""
import re
import runpy

import torch
import torch.nn.functional as F
from torch import nn

from model import swiglu

GROUP = 32                      # inputs that share s and z, in 4 bits
SPANS = [1 - 0.05 * i for i in range(6)]
QUANTIZED = re.compile(r'.*(self_attn\..*_proj(_current|_delayed)?\.weight|mlp\.experts\.\w+|embed_tokens\.weight)')


@torch.no_grad()
def quantize(W, bits, spans=SPANS):
    """W (out, in) float -> a dict of codes (out, in) int8 and scale (out, 1) float32 for 8 bits; of codes (out, in / 2)
    uint8, two in a byte, scale and offset (out, G) bf16 for 4 bits. Raise ValueError if `in` is no multiple of 32."""
    W = W.float()
    if bits == 8:
        scale = W.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        return {'codes': (W / scale).round().to(torch.int8), 'scale': scale}
    if W.shape[-1] % GROUP:
        raise ValueError(f'4 bits need an input width that is a multiple of {GROUP}, this is {W.shape[-1]}')
    w = W.unflatten(-1, (-1, GROUP))                                            # (out, G, 32)
    low, high, best = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True), None
    for span in spans:
        s = ((high - low) * span / 15).clamp_min(1e-12).bfloat16().float()      # (out, G, 1), as it will be stored
        z = ((high + low - (high - low) * span) / 2 + 8 * s).bfloat16().float()
        c = ((w - z) / s).round_().add_(8).clamp_(0, 15)
        new = (s * (c - 8) + z - w).square_().sum(-1, keepdim=True), c, s, z    # the first is the error
        best = new if best is None else [torch.where(new[0] < best[0], a, b) for a, b in zip(new, best)]
    _, c, s, z = best
    c = c.to(torch.uint8).flatten(-2)
    return {'codes': c[:, ::2] | c[:, 1::2] << 4, 'scale': s[..., 0].bfloat16(), 'offset': z[..., 0].bfloat16()}


def dequantize(codes, scale, offset=None):
    """-> W (..., in) float32: what codes mean, by definition. ...: (out), or the dims of tokens."""
    if offset is None:
        return codes * scale
    c = unpack(codes).unflatten(-1, (-1, GROUP)).float() - 8                    # (..., G, 32)
    return torch.addcmul(offset[..., None].float(), c, scale[..., None].float()).flatten(-2)


def unpack(codes):
    """(..., in / 2) bytes -> (..., in) uint8."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)


class Matrix(nn.Module):
    """A quantized matrix. forward: x (..., in) -> x W^T (..., out), in x's dtype."""

    def __init__(self, bits, out, width):
        super().__init__()
        self.bits, self.dtype, self.packed = bits, torch.float32, None
        kinds = {8: [('codes', torch.int8, width), ('scale', torch.float32, 1)],
                 4: [('codes', torch.uint8, width // 2), ('scale', torch.bfloat16, width // GROUP),
                     ('offset', torch.bfloat16, width // GROUP)]}
        for name, dtype, n in kinds[bits]:
            self.register_buffer(name, torch.empty(out, n, dtype=dtype))
        if bits == 8:
            self.register_buffer('offset', None)

    @property
    def weight(self):
        """(out, in), dequantized at every call: for many rows."""
        return dequantize(self.codes, self.scale, self.offset).to(self.dtype)

    def forward(self, x):
        return self.product(x)

    def product(self, x):
        if self.packed is None:
            return F.linear(x, self.weight.to(x.dtype))
        if x.dtype != self.dtype:                               # the head's float32 rows: in bf16, high and low bits
            high = x.to(self.dtype)
            return self.product(high).to(x.dtype) + self.product((x - high).to(self.dtype))
        rows = x.flatten(0, -2)
        if self.bits == 8:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.scale[:, 0].to(x.dtype))
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales.to(x.dtype))
        return y.view(*x.shape[:-1], -1)

    def pack(self, dtype, keep):
        """On a CPU, lay the codes out as torch's operators read them. dtype: of the model. keep: the codes as well, for
        `weight`."""
        self.dtype = dtype
        if self.codes.device.type == 'cpu' and (self.bits == 8 or len(self.codes) % 32 == 0):
            self.packed = self.codes
            if self.bits == 4:
                self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(self.codes).int(), 1)
                self.scales = torch.stack([self.scale, self.offset], -1).transpose(0, 1).contiguous()      # (G, out, 2)
                if not keep:
                    self.codes = self.scale = self.offset = None

    @staticmethod
    def lay_together(matrices):
        """Put what they have packed into two tensors, of which each has its part."""
        for name in 'packed', 'scales':
            for matrix, part in zip(matrices, torch.stack([getattr(matrix, name) for matrix in matrices])):
                setattr(matrix, name, part)

    @staticmethod
    def joined(matrices):
        """One Matrix of several with the same input, one under the other."""
        parts = [[getattr(m, name) for m in matrices] for name in ('codes', 'scale', 'offset')]
        bits, width = matrices[0].bits, matrices[0].codes.shape[1] * 8 // matrices[0].bits
        joined = Matrix(bits, sum(len(m.codes) for m in matrices), width)
        joined.codes, joined.scale, joined.offset = (None if part[0] is None else torch.cat(part) for part in parts)
        joined.pack(matrices[0].dtype, keep=False)              # for few rows only
        return joined


class Embedding(Matrix):
    """forward: tokens (...) int64 -> rows (..., E) float32. product: as the output head."""

    def forward(self, tokens):
        return dequantize(*(None if t is None else t[tokens] for t in (self.codes, self.scale, self.offset)))


class Experts(nn.Module):
    """model.Experts, each matrix quantized."""

    def __init__(self, bits, config):
        super().__init__()
        N, E, F_ = config.n_expert, config.n_embd, config.expert_dim
        self.gate_up = nn.ModuleList(Matrix(bits, 2 * F_, E) for _ in range(N))
        self.down = nn.ModuleList(Matrix(bits, E, F_) for _ in range(N))

    def forward(self, x, expert, weight):
        """x (T, E), expert (T) int64, weight (T) float32 -> (T, E)."""
        y = torch.zeros_like(x)
        for e in expert.unique().tolist():
            if e < len(self.down):                              # the rest is 'skip'
                rows = (expert == e).nonzero()[:, 0]
                y[rows] = self.down[e](swiglu(self.gate_up[e](x[rows])))
        return y * weight[:, None].to(x.dtype)


def replace(model, bits):
    """Put quantized matrices, still empty, in the place of a Zaya's own."""
    config = model.config
    for layer in model.layers:
        for name in 'q_proj', 'k_proj', 'v_proj', 'v_proj_delayed', 'o_proj':
            linear = getattr(layer.attn, name)
            setattr(layer.attn, name, Matrix(bits, linear.out_features, linear.in_features))
        layer.moe.experts = Experts(bits, config)
    model.embedding = Embedding(bits, config.vocab_size, config.n_embd)
    model.head = lambda x: model.embedding.product(model.norm(x).float())


def pack(model):
    """Make a model ready whose quantized matrices have been filled."""
    for module in model.modules():
        if isinstance(module, Experts):
            for matrices in module.gate_up, module.down:
                for matrix in matrices:
                    matrix.pack(model.dtype, keep=False)
                if matrices[0].codes is None:                   # small tensors would leave large holes in memory
                    Matrix.lay_together(matrices)
        elif isinstance(module, Matrix) and module.packed is None:
            module.pack(model.dtype, keep=True)


if __name__ == '__main__':      # the command: it imports this file, and so cannot be imported by it
    runpy.run_module('runtime.quantize_folder', run_name='__main__')
