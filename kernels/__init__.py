"""A fused GPU kernel for steps 2 to 5 of CCA (cca.hip), an optional replacement of cca.mix.

    q, k = cca_mix(qk, past, w1, b1, w2, b2, T, cos, sin, start)        the kernel
    use(model, 'auto', dtype)                                           use it in a model's layers, if it can run here

cca_mix has the arguments and results of cca.mix, which remains the reference. It makes one pass over memory in forward
and three in backward, where PyTorch makes a dozen. See kernels/README.md.

This file defines the operators nanozaya::cca_forward and cca_backward, for torch.compile and autograd; binding.cpp
implements them, and build.load() builds and loads it.

Legend as in cca.py:  B batch   S sequence   Hq, Hk query / KV heads   d head dim   C = (Hq + Hk) d channels
                      n rotated pairs of dims
"""
import functools
import sys

import torch

from cca import mix, rope_table

KERNELS = 'auto', 'hip', 'torch'
HEAD_DIMS = 64, 128
DTYPES = torch.float32, torch.bfloat16, torch.float16
TILES = CHOOSE, SMALL_TILE, LARGE_TILE = 0, 1, 2                # as in cca.h

library = torch.library.Library('nanozaya', 'DEF')
arguments = ('Tensor qk, Tensor? past, Tensor conv_depthwise_weight, Tensor conv_depthwise_bias, '
             'Tensor conv_grouped_weight, Tensor conv_grouped_bias, Tensor temperature, Tensor cos, Tensor sin, '
             'Tensor? start=None, int tile=0')
library.define(f'cca_forward({arguments}) -> (Tensor q, Tensor k)')
library.define(f'cca_backward(Tensor dq, Tensor dk, {arguments}) -> ({", ".join(["Tensor"] * 7)})')


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
    dpast = qk.new_empty(0 if past is None else B, 2, C)
    return qk.new_empty(B, S, C), dpast, *map(gradient, (w1, b1, w2, b2, temperature))


def save_inputs(ctx, inputs, output):
    *tensors, ctx.tile = inputs
    ctx.save_for_backward(*tensors)


def gradients(ctx, dq, dk):
    inputs = ctx.saved_tensors
    found = zip(inputs, torch.ops.nanozaya.cca_backward(dq, dk, *inputs, ctx.tile), ctx.needs_input_grad)
    found = [None if t is None or not needed else g.to(t.dtype) for t, g, needed in found]
    return *found, None, None, None, None                       # cos, sin, start, tile


torch.library.register_autograd('nanozaya::cca_forward', gradients, setup_context=save_inputs, lib=library)


@torch.compiler.assume_constant_result                          # torch.compile calls it instead of tracing it
def load(device):
    """Make cca_mix work for tensors on `device`, building it at first use. Raise RuntimeError with the reason if that
    fails."""
    from kernels import build                                   # here, for `python -m kernels.build` to import it once
    build.load(device)


def cca_mix(qk, past, conv_depthwise_weight, conv_depthwise_bias, conv_grouped_weight, conv_grouped_bias, temperature,
            cos, sin, start=None, tile=CHOOSE):
    """Return q (B, Hq, S, d) and k (B, Hk, S, d) after steps 2 to 5 of cca.py: convolutions, QK-mean, norm with
    temperature, RoPE.

    qk (B, S, C)      [q~; k~], float32, bfloat16 or float16; token strides are equal and multiples of 16 bytes
    past (B, 2, C)    [q~; k~] of the two tokens before these (Cache.qk), in qk's dtype; None: the sequence starts here
    conv_depthwise_weight (C, 1, 2), conv_depthwise_bias (C), conv_grouped_weight (C, d, 2), conv_grouped_bias (C),
    temperature (Hk)  the parameters, any float dtype; d is 64 or 128
    cos, sin (B or 1, S, n)     from rope_table, for any positions; n is a multiple of 8
    start (B, S) bool           True where a document starts, for packed windows; None: nowhere
    tile              tokens per thread block: SMALL_TILE, LARGE_TILE, or CHOOSE by the number of tokens

    The results have qk's dtype, sums are in float32, and forward and backward are deterministic. Raise RuntimeError if
    the kernel cannot be built, ValueError or TypeError for invalid arguments.
    """
    load(qk.device.type)
    return torch.ops.nanozaya.cca_forward(qk, past, conv_depthwise_weight, conv_depthwise_bias, conv_grouped_weight,
                                          conv_grouped_bias, temperature, cos, sin, start, tile)


# ---- use in a model ----

def use(model, kernel, dtype):
    """Replace cca.mix by cca_mix in all layers of `model` (Zaya), which must be on its final device. kernel: 'torch'
    changes nothing. 'hip' raises ValueError if cca_mix cannot be built or is wrong. 'auto' changes nothing then, and
    prints why in one line on stderr; on a CPU it does nothing. dtype: of the activations (bfloat16 under autocast)."""
    if kernel not in KERNELS:
        raise ValueError(f'kernel is {kernel!r}, it must be one of {", ".join(KERNELS)}')
    device = model.device.type
    if kernel == 'torch' or kernel == 'auto' and device != 'cuda':
        return
    reason = trouble(device, dtype, model.config.head_dim, model.config.rope_dim // 2)
    if reason and kernel == 'hip':
        raise ValueError(f'kernel is hip, but {reason} (`python -m kernels.build` prints all of it)')
    if reason:
        return warn_once(f'CCA runs without its kernel: {reason}')
    for layer in model.layers:
        layer.attn.mix = cca_mix


warn_once = functools.cache(lambda line: print(line, file=sys.stderr))


@functools.cache
def trouble(device, dtype, d, n):
    """Return why cca_mix cannot be used, in one line, or None. On a GPU, this compares it with cca.mix."""
    try:
        if dtype not in DTYPES or d not in HEAD_DIMS or n % 8:
            raise ValueError(f'the kernel takes {", ".join(map(str, DTYPES))}, head_dim '
                             f'{" or ".join(map(str, HEAD_DIMS))} and a multiple of 16 rotated dims, '
                             f'not {dtype}, {d} and {2 * n}')
        load(device)
        if device == 'cuda' and not (worst := difference(device, dtype, d, n)) <= 0.02:         # NaN fails, too
            raise RuntimeError(f'on this GPU its results are {worst:.0%} off those of cca.mix')
    except (RuntimeError, ValueError) as error:
        return str(error).partition('\n')[0]


# ---- comparison with cca.mix ----

def difference(device, dtype, d, n, sizes=((2, 70), (2, 550), (2, 8250))):
    """Return the largest relative error of cca_mix on random inputs, over all its variants: each tile at each size
    (B, S), without a past, with a cached past, and with packed documents. The sizes cover the three choices of the
    kernel (FEW_TOKENS and ENOUGH_BLOCKS in cca.hip): small tiles; large tiles, one head or one KV group per block."""
    g = torch.Generator(device).manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=g, device=device).to(dtype)
    Hq, Hk = 4, 2
    C, errors = (Hq + Hk) * d, []
    parameters = random(C, 1, 2), random(C), random(C, d, 2) / d ** 0.5, random(C), random(Hk)
    for B, S in sizes:
        table = rope_table(torch.arange(S, device=device)[None], 2 * n, 10_000.0)
        packed = torch.rand(B, S, generator=g, device=device) < 0.1             # True where a document starts
        for past, start in (None, None), (random(B, 2, C), None), (None, packed):
            inputs = random(B, S, C), past, *parameters, *table, start
            errors += [error(inputs, tile) for tile in TILES]
    return torch.tensor(errors).max().item()                    # NaN if any is


@torch.enable_grad()
def error(inputs, tile=CHOOSE, exact=torch.float32):
    """Return the largest relative error of the results of cca_mix, and of the gradients of all tensors but cos and sin,
    compared with cca.mix in the dtype `exact`. inputs: the arguments of mix, in one dtype except cos and sin."""
    dtype, results, gradients = inputs[0].dtype, [], None
    for f, precision in (mix, exact), (functools.partial(cca_mix, tile=tile), dtype):
        leaves = [None if t is None else t.detach().to(precision).requires_grad_() for t in inputs[:7]]
        outputs = f(*leaves, *inputs[7:])
        # With x^3 as the gradient of x, the terms of the temperature's gradient are positive and cannot cancel.
        gradients = gradients or [(x.detach() ** 3).to(dtype) for x in outputs]
        wanted = [t for t in leaves if t is not None]
        results.append([*outputs, *torch.autograd.grad(outputs, wanted, [g.to(precision) for g in gradients])])
    return torch.stack([(b.to(exact) - a).norm() / a.norm() for a, b in zip(*results)]).max().item()
