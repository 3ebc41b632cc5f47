"""Quantization: the weights of a released model as int8 or int4, in half or a third of the bytes of bf16.

Decoding a single sequence is memory-bandwidth bound: time is proportional to the bytes of the weights. A weight w
becomes an integer code c; weights of a group, neighbors along the input dim, share a scale s and an offset z:

    8 bits   w ~ s c               c = -127 .. 127, one s per output (matrix row)
    4 bits   w ~ s (c - 8) + z     c = 0 .. 15, s and z in bf16 per group of 32 inputs: 5 bits per weight

Round to nearest maps a group's smallest weight to c = 0 and its largest to c = 15. An outlier then makes s large and
the other 31 weights coarse, so narrower ranges, which clip outliers, are tried as well, and each group keeps the range
with the least squared error.

The large matrices are quantized: experts (96 % of the parameters), attention projections, and the embedding, which is
also the output head. Router, convolutions, norms, temperature and residual scaling (0.6 %) keep their dtype: everything
depends on the routing and the attention temperature, and CCA's norm and the residual stream amplify small errors
(report, IV-D).

    y = x W^T          by definition: dequantize, then multiply
                       on a CPU, for few tokens: torch's int8 and int4 kernels, which read the codes (`Matrix.forward`)

`python quantize.py FOLDER OUT --bits=4` reads a released folder tensor by tensor and writes one that sample.py and
rsa.py read like any other. Legend: out, in: dims of a matrix; G groups per output; N experts; T tokens; E, F: model.py.
"""
import re
import runpy

import torch
import torch.nn.functional as F
from torch import nn

from model import swiglu

GROUP = 32                      # inputs that share s and z, with 4 bits
SPANS = [1 - 0.05 * i for i in range(6)]        # ranges to try, as fractions of the group's
QUANTIZED = re.compile(r'.*(self_attn\..*_proj(_current|_delayed)?\.weight|mlp\.experts\.\w+|embed_tokens\.weight)')


@torch.no_grad()
def quantize(W, bits, spans=SPANS):
    """Quantize W (out, in). Return a dict. 8 bits: codes (out, in) int8, scale (out, 1) float32. 4 bits: codes
    (out, in / 2) uint8, two per byte, scale and offset (out, G) bf16. Raise ValueError if `in` is no multiple of 32."""
    W = W.float()
    if bits == 8:
        scale = W.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        return {'codes': (W / scale).round().to(torch.int8), 'scale': scale}
    if W.shape[-1] % GROUP:
        raise ValueError(f'4 bits need an input width that is a multiple of {GROUP}, this is {W.shape[-1]}')
    w = W.unflatten(-1, (-1, GROUP))                                            # (out, G, 32)
    low, high, best = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True), None
    for span in spans:
        s = ((high - low) * span / 15).clamp_min(1e-12).bfloat16().float()      # (out, G, 1), rounded as stored
        z = ((high + low - (high - low) * span) / 2 + 8 * s).bfloat16().float()
        c = ((w - z) / s).round_().add_(8).clamp_(0, 15)
        new = (s * (c - 8) + z - w).square_().sum(-1, keepdim=True), c, s, z    # error first
        best = new if best is None else [torch.where(new[0] < best[0], a, b) for a, b in zip(new, best)]
    _, c, s, z = best
    c = c.to(torch.uint8).flatten(-2)
    return {'codes': c[:, ::2] | c[:, 1::2] << 4, 'scale': s[..., 0].bfloat16(), 'offset': z[..., 0].bfloat16()}


def dequantize(codes, scale, offset=None):
    """Return W (..., in) float32, by definition. ...: (out), or the dims of the tokens whose embeddings are read."""
    if offset is None:
        return codes * scale
    c = unpack(codes).unflatten(-1, (-1, GROUP)).float() - 8                    # (..., G, 32)
    return torch.addcmul(offset[..., None].float(), c, scale[..., None].float()).flatten(-2)


def unpack(codes):
    """Return int4 codes as (..., in) uint8, from (..., in / 2) bytes."""
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
        """Return W (out, in), dequantized at every call: for many tokens."""
        return dequantize(self.codes, self.scale, self.offset).to(self.dtype)

    def forward(self, x):
        return self.product(x)

    def product(self, x):
        if self.packed is None:
            return F.linear(x, self.weight.to(x.dtype))
        if x.dtype != self.dtype:                               # the head's float32 input: as a sum of two in bf16
            high = x.to(self.dtype)
            return self.product(high).to(x.dtype) + self.product((x - high).to(self.dtype))
        x_flat = x.flatten(0, -2)                               # (T, in)
        if self.bits == 8:
            y = torch.ops.aten._weight_int8pack_mm(x_flat, self.packed, self.scale[:, 0].to(x.dtype))
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x_flat, self.packed, GROUP, self.scales.to(x.dtype))
        return y.view(*x.shape[:-1], -1)

    def pack(self, dtype, keep):
        """On a CPU, convert the codes to the layout of torch's kernels. dtype: of the model. keep: keep the codes too,
        which `weight` needs."""
        self.dtype = dtype
        if self.codes.device.type == 'cpu' and (self.bits == 8 or len(self.codes) % 32 == 0):
            # torch's int8 kernel crashes on several tokens if the codes, as a file maps them, are not 16-byte aligned.
            self.packed = self.codes if self.codes.data_ptr() % 16 == 0 else self.codes.clone()
            if self.bits == 4:
                self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(self.codes).int(), 1)
                self.scales = torch.stack([self.scale, self.offset], -1).transpose(0, 1).contiguous()      # (G, out, 2)
                if not keep:
                    self.codes = self.scale = self.offset = None

    @staticmethod
    def joined(matrices):
        """Return one Matrix whose output concatenates those of matrices with the same input."""
        parts = [[getattr(m, name) for m in matrices] for name in ('codes', 'scale', 'offset')]
        bits, width = matrices[0].bits, matrices[0].codes.shape[1] * 8 // matrices[0].bits
        joined = Matrix(bits, sum(len(m.codes) for m in matrices), width)
        joined.codes, joined.scale, joined.offset = (None if part[0] is None else torch.cat(part) for part in parts)
        joined.pack(matrices[0].dtype, keep=False)              # only used for few tokens
        return joined


class Embedding(Matrix):
    """forward: tokens (...) int64 -> embeddings (..., E) float32. product: the output head."""

    def forward(self, tokens):
        return dequantize(*(None if t is None else t[tokens] for t in (self.codes, self.scale, self.offset)))


class Experts(nn.Module):
    """model.Experts with quantized matrices."""

    def __init__(self, bits, config):
        super().__init__()
        N, E, F_ = config.n_expert, config.n_embd, config.expert_dim
        self.gate_up = nn.ModuleList(Matrix(bits, 2 * F_, E) for _ in range(N))
        self.down = nn.ModuleList(Matrix(bits, E, F_) for _ in range(N))

    def forward(self, x, expert, weight):
        """x (T, E), expert (T) int64, weight (T) float32 -> (T, E)."""
        y = torch.zeros_like(x)
        for e in expert.unique().tolist():
            if e < len(self.down):                              # expert N is 'skip': zero
                chosen = (expert == e).nonzero()[:, 0]          # its tokens
                y[chosen] = self.down[e](swiglu(self.gate_up[e](x[chosen])))
        return y * weight[:, None].to(x.dtype)


def replace(model, bits):
    """Replace a Zaya's large matrices by quantized ones, uninitialized."""
    config = model.config
    for layer in model.layers:
        for name in 'q_proj', 'k_proj', 'v_proj', 'v_proj_delayed', 'o_proj':
            linear = getattr(layer.attn, name)
            setattr(layer.attn, name, Matrix(bits, linear.out_features, linear.in_features))
        layer.moe.experts = Experts(bits, config)
    model.embedding = Embedding(bits, config.vocab_size, config.n_embd)
    model.head = lambda x: model.embedding.product(model.norm(x).float())


def pack(model):
    """Pack the quantized matrices of a model after their codes have been loaded."""
    for module in model.modules():
        if isinstance(module, Experts):
            for matrices in module.gate_up, module.down:
                for matrix in matrices:
                    matrix.pack(model.dtype, keep=False)
                # Freeing many small tensors fragments memory: stack them, and make each a view of its stack.
                for name in ('packed', 'scales') if matrices[0].codes is None else ():
                    for matrix, part in zip(matrices, torch.stack([getattr(matrix, name) for matrix in matrices])):
                        setattr(matrix, name, part)
        elif isinstance(module, Matrix) and module.packed is None:
            module.pack(model.dtype, keep=True)


if __name__ == '__main__':      # the command's module imports this file, so this file cannot import it
    runpy.run_module('runtime.quantize_folder', run_name='__main__', alter_sys=True)
