"""CCA's preparation of queries and keys as one GPU kernel (cca.hip), an optional accelerator of cca.py.

    q, k = cca_mix(qk, past, w1, b1, w2, b2, T, cos, sin, start)

is steps 2 to 5 of cca.py, which stays the definition of what is right: the same arguments, the same results. In place of
a dozen passes over memory there is one, forward; three, backward. See README.md beside this file.

The operators nanozaya::cca_forward and cca_backward are defined here, for torch.compile and autograd; binding.cpp
implements them, once build.load() has built and loaded it.

Legend as in cca.py:  B batch   S sequence   Hq, Hk query / KV heads   d head dim   C = (Hq + Hk) d   n pairs that RoPE rotates
"""
import functools
import sys

import torch

HEAD_DIMS = 64, 128
DTYPES = torch.float32, torch.bfloat16, torch.float16

library = torch.library.Library('nanozaya', 'DEF')
arguments = ('Tensor qk, Tensor? past, Tensor conv_depthwise_weight, Tensor conv_depthwise_bias, Tensor conv_grouped_weight, '
             'Tensor conv_grouped_bias, Tensor temperature, Tensor cos, Tensor sin, Tensor? start=None, int tile=0')
library.define(f'cca_forward({arguments}) -> (Tensor q, Tensor k)')
library.define(f'cca_backward(Tensor dq, Tensor dk, {arguments}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)')


@torch.library.register_fake('nanozaya::cca_forward', lib=library)
def _(qk, past, w1, b1, w2, b2, temperature, cos, sin, start=None, tile=0):
    if any(t is not None and t.device != qk.device for t in (past, w1, b1, w2, b2, temperature, cos, sin, start)):
        raise ValueError(f"cca_mix: all tensors must be on qk's device, {qk.device}")
    (B, S, C), d, Hk = qk.shape, w2.shape[1], temperature.shape[0]
    return qk.new_empty(B, C // d - Hk, S, d), qk.new_empty(B, Hk, S, d)


@torch.library.register_fake('nanozaya::cca_backward', lib=library)
def _(dq, dk, qk, past, w1, b1, w2, b2, temperature, cos, sin, start=None, tile=0):
    gradient = lambda t: torch.empty_like(t, dtype=torch.float32, memory_format=torch.contiguous_format)
    B, S, C = qk.shape
    return (qk.new_empty(B, S, C), qk.new_empty(0 if past is None else B, 2, C), *map(gradient, (w1, b1, w2, b2, temperature)))


def remember(ctx, inputs, output):
    *tensors, ctx.tile = inputs
    ctx.save_for_backward(*tensors)


def gradients(ctx, dq, dk):
    inputs = ctx.saved_tensors
    found = torch.ops.nanozaya.cca_backward(dq, dk, *inputs, ctx.tile)
    found = [None if t is None or not needed else g.to(t.dtype) for t, g, needed in zip(inputs, found, ctx.needs_input_grad)]
    return *found, None, None, None, None                       # cos, sin, start, tile


torch.library.register_autograd('nanozaya::cca_forward', gradients, setup_context=remember, lib=library)


@torch.compiler.assume_constant_result                          # torch.compile: call it while tracing, do not look inside
def load(device):
    from kernels import build                                   # here, so that `python -m kernels.build` imports it once
    build.load(device)


def cca_mix(qk, past, conv_depthwise_weight, conv_depthwise_bias, conv_grouped_weight, conv_grouped_bias, temperature, cos, sin,
            start=None):
    """Convolutions, QK-mean, norm with temperature and RoPE: steps 2 to 5 of cca.py, differentiable.

    qk (B, S, C)      [q~; k~], float32, bfloat16 or float16; rows contiguous, equally spaced, at multiples of 16 bytes
    past (B, 2, C)    the two columns of [q~; k~] before these (Cache.conv), in qk's dtype; None at the start of a sequence
    conv_depthwise_weight (C, 1, 2), conv_depthwise_bias (C), conv_grouped_weight (C, d, 2), conv_grouped_bias (C),
    temperature (Hk)  the parameters, any float dtype; d is 64 or 128
    cos, sin (B or 1, S, n)     of rope_table: any positions; n a multiple of 8
    start (B, S) bool           True where a document begins, for packed windows; None: nowhere

    Returns q (B, Hq, S, d) and k (B, Hk, S, d) in qk's dtype; all sums are in float32. The result, and that of backward, is
    the same bits every time. Raises RuntimeError if the kernel cannot be built, ValueError or TypeError for arguments that
    do not fit.
    """
    load(qk.device.type)
    return torch.ops.nanozaya.cca_forward(qk, past, conv_depthwise_weight, conv_depthwise_bias, conv_grouped_weight,
                                          conv_grouped_bias, temperature, cos, sin, start)


@torch.compiler.assume_constant_result
def usable(kernel, device, dtype, head_dim, n):
    """Whether cca.py should call cca_mix. kernel: 'torch' never; 'auto' on a GPU where it can be built, and says so in one
    line if it cannot; 'hip' always, and raises ValueError if it cannot. device: of torch.device.type."""
    if kernel == 'torch' or kernel == 'auto' and device != 'cuda':
        return False                                            # on a CPU the kernel is for checking, and slow
    reason = trouble(device, dtype, head_dim, n)
    if reason and kernel == 'hip':
        raise ValueError(f'kernel is hip, but {str(reason).splitlines()[0]} (`python -m kernels.build` shows all)')
    if reason:
        say_once(f'CCA runs without its kernel: {str(reason).splitlines()[0]}')
    return not reason


@functools.cache
def trouble(device, dtype, head_dim, n):
    """Why cca_mix cannot be called, an exception, or None."""
    try:
        if dtype not in DTYPES or head_dim not in HEAD_DIMS or n % 8:
            raise ValueError(f'the kernel takes {", ".join(map(str, DTYPES))}, head_dim {" or ".join(map(str, HEAD_DIMS))} '
                             f'and a multiple of 16 rotated dims, not {dtype}, {head_dim} and {2 * n}')
        load(device)
        if device == 'cuda' and (error := difference(device, dtype, head_dim, n)) > 0.02:
            raise RuntimeError(f'on this GPU its results are {error:.0%} off those of cca.mix; it is not used')
    except (RuntimeError, ValueError) as error:
        return error


def difference(device, dtype, d, n):
    """The largest relative error of cca_mix's results and gradients against cca.mix, in float32, on a small random input."""
    from cca import mix, rope_table
    (B, S, Hq, Hk), g = (2, 70, 2, 1), torch.Generator().manual_seed(0)
    C, results = (Hq + Hk) * d, []
    shapes = (B, S, C), (B, 2, C), (C, 1, 2), (C,), (C, d, 2), (C,), (Hk,)
    values = [torch.randn(shape, generator=g).to(dtype).to(device) for shape in shapes]
    table = rope_table(torch.arange(S, device=device)[None], 2 * n, 10_000.0)
    for f, to in (cca_mix, dtype), (mix, torch.float32):
        with torch.enable_grad():
            leaves = [t.to(to).detach().requires_grad_() for t in values]
            q, k = f(*leaves, *table)
            found = q, k, *torch.autograd.grad((q.float() ** 3).sum() + (k.float() ** 3).sum(), leaves)
        results.append([t.detach().float() for t in found])
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results))


@functools.cache
def say_once(line):
    print(line, file=sys.stderr)


def use(model, kernel, dtype):
    """Put cca_mix in the place of cca.mix in all layers of a Zaya, where `usable` says so. dtype: of the activations."""
    if kernel not in ('torch', 'hip', 'auto'):
        raise ValueError(f'kernel is {kernel!r}, it must be one of torch, hip, auto')
    if usable(kernel, model.device.type, dtype, model.config.head_dim, model.config.rope_dim // 2):
        for layer in model.layers:
            layer.attn.mix = cca_mix
