"""Quantization: the weights of a released model as int8 or int4, in half or a third of the bytes of bf16.

Decoding a single sequence is memory-bandwidth bound: time is proportional to the bytes of the weights. A weight w
becomes an integer code c; weights of a group, neighbors along the input dim, share a scale s and an offset z:

    8 bits   w ~ s c               c = -127 .. 127, one s per output (matrix row)
    4 bits   w ~ s (c - 8) + z     c = 0 .. 15, s and z in bf16 per group of 32 inputs: 5 bits per weight

Round to nearest maps a group's smallest weight to c = 0 and its largest to c = 15. An outlier then makes s large and
the other 31 weights coarse, so narrower ranges, which clip outliers, are tried as well. Given the codes, the best s and
z are a linear regression of w on c - 8, after which other codes may be nearer: this is repeated. Each group keeps what
has the least squared error.

The large matrices are quantized: experts (96 % of the parameters), attention projections, and the embedding, which is
also the output head. Router, convolutions, norms, temperature and residual scaling (0.6 %) keep their dtype: everything
depends on the routing and the attention temperature, and CCA's norm and the residual stream amplify small errors
(report, IV-D).

    y = x W^T          by definition: dequantize, then multiply
                       on a CPU: kernels/int4.cpp, which also rounds x to int8; where it cannot be built or is slower,
                       torch's int8 and int4 operators

Codes and scales are stored in the order in which the kernel reads them (`interleave`), so a memory-mapped file needs
no conversion. `python quantize.py FOLDER OUT --bits=4` reads a released folder tensor by tensor and writes one that
sample.py and rsa.py read like any other.

Legend: out, in: dims of a matrix; G groups per output; R = out / 8, rounded up; N experts; T tokens; E, F: model.py.
"""
import copy
import functools
import re
import runpy
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from kernels import int4
from model import swiglu

GROUP = 32                      # inputs that share s and z, with 4 bits
BLOCK = {8: 256, 4: 160}        # bytes of 8 outputs x 32 inputs
SPANS, REFITS = (1.0, 0.9, 0.8), 2              # ranges to try, as fractions of the group's; regressions of each
QUANTIZED = re.compile(r'.*(self_attn\..*_proj(_current|_delayed)?\.weight|mlp\.experts\.\w+|embed_tokens\.weight)')


# ---- codes ----

@torch.no_grad()
def quantize(W, bits, spans=SPANS, refits=REFITS):
    """Quantize W (out, in). Return a dict. 8 bits: codes (out, in) int8, scale (out, 1) float32. 4 bits: codes
    (out, in) uint8, scale and offset (out, G) bf16. Raise ValueError if `in` is no multiple of 32 then."""
    W = W.float()
    if bits == 8:
        scale = W.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        return {'codes': (W / scale).round().to(torch.int8), 'scale': scale}
    if W.shape[-1] % GROUP:
        raise ValueError(f'4 bits need an input width that is a multiple of {GROUP}, this is {W.shape[-1]}')
    w = W.unflatten(-1, (-1, GROUP))                                            # (out, G, 32)
    low, high, best = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True), None
    mean = w.mean(-1, keepdim=True)                                             # (out, G, 1)
    for span in spans:
        s = (high - low) * span / 15                                            # (out, G, 1)
        z = (high + low - (high - low) * span) / 2 + 8 * s
        for _ in range(1 + refits):
            s, z = s.clamp_min(1e-12).bfloat16().float(), z.bfloat16().float()  # rounded as stored
            c = ((w - z) / s).round_().clamp_(-8, 7)                            # c - 8 of the formula
            new = (s * c + z - w).square_().sum(-1, keepdim=True), c, s, z      # error first
            best = new if best is None else [torch.where(new[0] < best[0], a, b) for a, b in zip(new, best)]
            c_mean = c.mean(-1, keepdim=True)
            s = ((c - c_mean) * (w - mean)).sum(-1, keepdim=True) / (c - c_mean).square_().sum(-1, keepdim=True)
            s = s.nan_to_num_(0.0)                                              # all codes equal: 0 / 0
            z = mean - s * c_mean
    _, c, s, z = best
    return {'codes': (c + 8).to(torch.uint8).flatten(-2), 'scale': s[..., 0].bfloat16(), 'offset': z[..., 0].bfloat16()}


def dequantize(codes, scale, offset=None):
    """Return W (..., in) float32, by definition."""
    if offset is None:
        return codes * scale
    c = codes.unflatten(-1, (-1, GROUP)).float() - 8                            # (..., G, 32)
    return torch.addcmul(offset[..., None].float(), c, scale[..., None].float()).flatten(-2)


# ---- blocks: the layout of kernels/int4.cpp, which has a picture of it ----

def interleave(codes, scale=None, offset=None):
    """Return the blocks (R, G, 160 or 256) uint8 of a quantized matrix: codes (out, in), with 4 bits also scale and
    offset (out, G). Outputs are padded to a multiple of 8, inputs to one of 32: zero codes."""
    codes = F.pad(codes.view(torch.uint8), (0, -codes.shape[1] % GROUP, 0, -codes.shape[0] % 8))
    c = codes.unflatten(1, (-1, 8, 4)).unflatten(0, (-1, 8))                    # (R, 8, G, 8, 4): input 4 j + i
    c = c.permute(0, 2, 3, 1, 4).flatten(3)                                     # (R, G, 8, 32): byte 4 r + i
    if offset is None:
        return c.flatten(2)
    s = F.pad(torch.stack([scale, offset], -1), (0, 0, 0, 0, 0, -len(scale) % 8)).unflatten(0, (-1, 8))
    s = s.permute(0, 2, 3, 1).contiguous().view(torch.uint8)                    # (R, G, 2, 16): of r = 0, 1, ..., 7
    return torch.cat([(c[:, :, :4] | c[:, :, 4:] << 4).flatten(2), s.flatten(2)], -1)


def separate(blocks):
    """Return codes (8 R, in), scale and offset (8 R, G), the inverse of interleave; with 8 bits, scale is None."""
    R, G, _ = blocks.shape
    scale = offset = None
    if blocks.shape[-1] == BLOCK[4]:
        s = blocks[:, :, 128:].contiguous().view(torch.bfloat16).view(R, G, 2, 8).permute(2, 0, 3, 1)
        scale, offset = s.flatten(1, 2)
        blocks = torch.cat([blocks[:, :, :128] & 15, blocks[:, :, :128] >> 4], -1)
    c = blocks.view(R, G, 8, 8, 4).permute(0, 3, 1, 2, 4).reshape(8 * R, GROUP * G)
    return c if offset is not None else c.view(torch.int8), scale, offset


# ---- modules ----

class Matrix(nn.Module):
    """A quantized matrix W, or N of them (experts). forward: x (..., in) -> x W^T (..., out), in x's dtype."""

    def __init__(self, bits, out, width, *N):
        super().__init__()
        self.bits, self.out, self.width = bits, out, width
        self.dtype, self.kernel, self.packed = torch.float32, False, {}         # set by `prepare`
        shape = *N, -(-out // 8), -(-width // GROUP), BLOCK[bits]
        self.register_buffer('blocks', torch.empty(shape, dtype=torch.uint8))
        self.register_buffer('scale', torch.empty(*N, out) if bits == 8 else None)

    def codes(self, e=()):
        """Return codes, scale and offset of the matrix, or of expert e, as `quantize` does."""
        codes, scale, offset = separate(self.blocks[e])
        scale, offset = (self.scale[e][:, None], None) if self.bits == 8 else (scale[:self.out], offset[:self.out])
        return {'codes': codes[:self.out, :self.width], 'scale': scale, 'offset': offset}

    @property
    def weight(self):
        """Return W (out, in), dequantized at every call."""
        return dequantize(**self.codes()).to(self.dtype)

    def forward(self, x, expert=None):
        """expert (T) int64, with x (T, in): the matrix of each token; zero for one that does not exist."""
        if self.kernel:
            x_flat = F.pad(x.flatten(0, -2), (0, -self.width % GROUP))          # (T, 32 G)
            return int4.product(x_flat, self.blocks, self.scale, self.out, expert).view(*x.shape[:-1], self.out)
        if expert is None:
            return self.multiply(x, ())
        y = x.new_zeros(len(x), self.out)
        for e in expert.unique().tolist():
            if e < len(self.blocks):
                chosen = (expert == e).nonzero()[:, 0]                          # its tokens
                y[chosen] = self.multiply(x[chosen], e)
        return y

    def multiply(self, x, e):
        """x (..., in) -> (..., out) with the matrix of expert e, without the kernel."""
        if e not in self.packed:
            return F.linear(x, dequantize(**self.codes(e)).to(x.dtype))
        packed, scales = self.packed[e]
        x_flat, scales = x.flatten(0, -2), scales.to(x.dtype)
        if self.bits == 8:
            y = torch.ops.aten._weight_int8pack_mm(x_flat, packed, scales)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x_flat, packed, GROUP, scales)
        return y.view(*x.shape[:-1], self.out)

    def pack(self):
        """Convert the codes to the layout of torch's operators, where they have one for this shape."""
        packed = []
        for e in range(len(self.blocks)) if self.blocks.ndim == 4 else [()]:
            m = self.codes(e)
            if self.bits == 8:
                packed.append((m['codes'].contiguous(), m['scale'][:, 0].contiguous()))
            elif self.out % 32 == 0:
                packed.append((torch.ops.aten._convert_weight_to_int4pack_for_cpu(m['codes'].int(), 1),
                               torch.stack([m['scale'], m['offset']], -1).transpose(0, 1).contiguous()))
        # Freed tensors between those that stay would fragment memory: stack the latter.
        stacks = [torch.stack(tensors) for tensors in zip(*packed)]
        for i in range(len(packed)):
            self.packed[i if self.blocks.ndim == 4 else ()] = [stack[i] for stack in stacks]


class Embedding(Matrix):
    """forward: tokens (...) int64 -> embeddings (..., E) float32. head: the output head."""

    def forward(self, tokens):
        codes, scale, offset = separate(self.blocks[tokens.flatten() // 8])                     # 8 T outputs
        chosen = torch.arange(tokens.numel(), device=tokens.device) * 8 + tokens.flatten() % 8
        if self.bits == 8:
            scale, offset = self.scale[tokens.flatten()][:, None], None
            return dequantize(codes[chosen, :self.width], scale).view(*tokens.shape, -1)
        return dequantize(codes[chosen], scale[chosen], offset[chosen]).view(*tokens.shape, -1)

    def head(self, x):
        """x (..., E) float32 -> logits (..., V) float32. torch's operators want bf16 in a bf16 model: they multiply x
        as the sum of two in bf16."""
        if self.kernel or not self.packed or self.dtype == torch.float32:
            return super().forward(x)
        high = x.bfloat16()
        return super().forward(high).float() + super().forward((x - high).bfloat16())


class Experts(nn.Module):
    """model.Experts with quantized matrices."""

    def __init__(self, bits, config):
        super().__init__()
        N, E, F_ = config.n_expert, config.n_embd, config.expert_dim
        self.gate_up, self.down = Matrix(bits, 2 * F_, E, N), Matrix(bits, E, F_, N)

    def forward(self, x, expert, weight):
        """x (T, E), expert (T) int64, weight (T) float32 -> (T, E)."""
        return self.down(swiglu(self.gate_up(x, expert)), expert) * weight[:, None].to(x.dtype)


def joined(matrices):
    """Return the Matrix [W_1; W_2; ...] of matrices with the same input. Their blocks become views of its blocks, if
    their outputs fill them."""
    outs, first = [m.out for m in matrices], matrices[0]
    whole = Matrix(first.bits, sum(outs), first.width)
    if first.bits == 8:
        whole.scale = torch.cat([m.scale for m in matrices])
    if any(out % 8 for out in outs):
        parts = [m.codes() for m in matrices]
        whole.blocks = interleave(*(None if part[0] is None else torch.cat(part) for part in zip(*(
            (m['codes'], m['scale'], m['offset']) for m in parts))))
        return whole
    whole.blocks = torch.cat([m.blocks for m in matrices])
    for m, part in zip(matrices, whole.blocks.split([out // 8 for out in outs])):
        m.blocks = part
    return whole


def replace(model, bits):
    """Replace a Zaya's large matrices by quantized ones, uninitialized."""
    config = model.config
    for layer in model.layers:
        for name in 'q_proj', 'k_proj', 'v_proj', 'v_proj_delayed', 'o_proj':
            linear = getattr(layer.attn, name)
            setattr(layer.attn, name, Matrix(bits, linear.out_features, linear.in_features))
        layer.moe.experts = Experts(bits, config)
    model.embedding = Embedding(bits, config.vocab_size, config.n_embd)
    model.head = lambda x: model.embedding.head(model.norm(x).float())


@torch.no_grad()
def quantized(model, bits):
    """Return a copy of a Zaya with its large matrices quantized."""
    weights, model = model.state_dict(), copy.deepcopy(model)
    replace(model, bits)
    for name, m in model.named_modules():
        if isinstance(m, Matrix):
            W = weights.get(f'{name}.weight', weights.get(name))                # (out, in), or (N, out, in)
            made = [quantize(w, bits) for w in (W if W.ndim == 3 else [W])]
            m.blocks.copy_(torch.stack([interleave(**q) for q in made]).view_as(m.blocks))
            if bits == 8:
                m.scale.copy_(torch.stack([q['scale'][:, 0] for q in made]).view_as(m.scale))
    prepare(model, measure=False)
    return model.eval()


# ---- the choice of a product ----

def prepare(model, measure=True):
    """Choose how the quantized matrices of a model multiply, after their blocks have been loaded: on a CPU with
    kernels/int4.cpp, or with torch's operators and one line that says why; elsewhere dequantized at every call.
    measure: compare the times, which says nothing for tiny matrices. The model has no gradients after that."""
    model.requires_grad_(False)
    on_cpu, experts = model.device.type == 'cpu', model.layers[0].moe.experts
    reason = on_cpu and (why_unusable(model.embedding.bits) or measure and why_slower(experts.gate_up, model.dtype))
    if reason:
        print(f"the quantized matrices use torch's operators, which take longer to load: {reason}", file=sys.stderr)
    matrices = [model.embedding]
    for layer in model.layers:
        attn = layer.attn
        whole = joined([attn.q_proj, attn.k_proj, attn.v_proj, attn.v_proj_delayed])
        attn.project = whole.forward        # a function: the method CCA.project would hide a module
        matrices += [whole, attn.o_proj, layer.moe.experts.gate_up, layer.moe.experts.down]
    for matrix in matrices:
        matrix.dtype, matrix.kernel = model.dtype, on_cpu and not reason
        if on_cpu and reason:
            matrix.pack()


@functools.cache
def why_unusable(bits):
    """Return why kernels/int4.cpp cannot be used on this machine, or None. Its products are compared with those of the
    definition."""
    try:
        int4.load()
    except RuntimeError as error:
        return str(error)
    generator = torch.Generator().manual_seed(0)
    W, x = (torch.randn(n, 96, generator=generator) for n in (20, 7))
    m = quantize(W, bits)
    scale = m['scale'][:, 0] if bits == 8 else None
    y, exact = int4.product(x, interleave(**m), scale, 20), x @ dequantize(**m).T
    error = ((y - exact).norm() / exact.norm()).item()
    return None if error < 0.02 else f'on this CPU, the results of kernels/int4.cpp are {error:.0%} off'      # not NaN


def why_slower(experts, dtype):
    """Return None if kernels/int4.cpp multiplies one token by a matrix of these experts (a Matrix) faster than torch's
    operator, else the reason not to use it. Both read four matrices; timings alternate, and the
    minimum counts."""
    matrices = experts.blocks[:4]
    probe = Matrix(experts.bits, experts.out, experts.width, len(matrices))
    probe.blocks, probe.scale = matrices, None if experts.scale is None else experts.scale[:4]
    probe.pack()
    x, seconds = torch.ones(1, experts.width, dtype=dtype), {True: [], False: []}
    for probe.kernel in 5 * [True, False] if probe.packed else []:
        start = time.perf_counter()
        for e in range(len(matrices)):
            probe(x, torch.tensor([e]))
        seconds[probe.kernel].append(time.perf_counter() - start)
    if probe.packed and min(seconds[True]) > min(seconds[False]):
        return f'kernels/int4.cpp takes {min(seconds[True]) / min(seconds[False]):.1f} times as long here'


if __name__ == '__main__':      # the command's module imports this file, so this file cannot import it
    runpy.run_module('runtime.quantize_folder', run_name='__main__', alter_sys=True)
