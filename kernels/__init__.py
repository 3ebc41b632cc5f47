"""CCA's preparation of queries and keys as one GPU kernel (cca.hip), an optional accelerator of cca.py.

    q, k = cca_mix(qk, past, w1, b1, w2, b2, T, cos, sin, start)        the kernel
    use(model, 'auto', dtype)                                           put it into a model's layers, if it can run here

cca_mix takes the arguments of cca.mix and gives the same results: steps 2 to 5 of cca.py, where mix stays the
definition of what is right. In place of a dozen passes over memory there is one, forward; three, backward. See
README.md beside this file.

The operators nanozaya::cca_forward and cca_backward are defined here, for torch.compile and autograd; binding.cpp
implements them, once build.load() has built and loaded it.

Legend as in cca.py:  B batch   S sequence   Hq, Hk query / KV heads   d head dim   C = (Hq + Hk) d channels
                      n pairs of dims that RoPE rotates
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


def remember(ctx, inputs, output):
    *tensors, ctx.tile = inputs
    ctx.save_for_backward(*tensors)


def gradients(ctx, dq, dk):
    inputs = ctx.saved_tensors
    found = zip(inputs, torch.ops.nanozaya.cca_backward(dq, dk, *inputs, ctx.tile), ctx.needs_input_grad)
    found = [None if t is None or not needed else g.to(t.dtype) for t, g, needed in found]
    return *found, None, None, None, None                       # cos, sin, start, tile


torch.library.register_autograd('nanozaya::cca_forward', gradients, setup_context=remember, lib=library)


@torch.compiler.assume_constant_result                        # torch.compile: call it while tracing, do not look inside
def load(device):
    """Make cca_mix work for tensors on `device`, 'cuda' or 'cpu', building it at first use. Raises RuntimeError if that
    fails, with the reason."""
    from kernels import build                                  # here, so that `python -m kernels.build` imports it once
    build.load(device)


def cca_mix(qk, past, conv_depthwise_weight, conv_depthwise_bias, conv_grouped_weight, conv_grouped_bias, temperature,
            cos, sin, start=None, tile=CHOOSE):
    """Convolutions, QK-mean, norm with temperature and RoPE: steps 2 to 5 of cca.py, differentiable.

    qk (B, S, C)      [q~; k~], float32, bfloat16 or float16; rows contiguous, equally spaced, at multiples of 16 bytes
    past (B, 2, C)    the two columns of [q~; k~] before these (Cache.qk), in qk's dtype; None: a sequence starts here
    conv_depthwise_weight (C, 1, 2), conv_depthwise_bias (C), conv_grouped_weight (C, d, 2), conv_grouped_bias (C),
    temperature (Hk)  the parameters, any float dtype; d is 64 or 128
    cos, sin (B or 1, S, n)     of rope_table: any positions; n a multiple of 8
    start (B, S) bool           True where a document begins, for packed windows; None: nowhere
    tile              tokens for a block of threads: SMALL_TILE, LARGE_TILE, or CHOOSE by the number of tokens

    Return q (B, Hq, S, d) and k (B, Hk, S, d) in qk's dtype; all sums are in float32. The results, forward and
    backward, are the same bits every time. Raises RuntimeError if the kernel cannot be built, ValueError or TypeError
    for arguments that do not fit.
    """
    load(qk.device.type)
    return torch.ops.nanozaya.cca_forward(qk, past, conv_depthwise_weight, conv_depthwise_bias, conv_grouped_weight,
                                          conv_grouped_bias, temperature, cos, sin, start, tile)


# ---- putting it into a model ----

def use(model, kernel, dtype):
    """Put cca_mix in the place of cca.mix in all layers of `model` (Zaya), which is on its device already.

    kernel: 'torch' leaves the model as it is. 'hip' puts cca_mix there, and raises ValueError if it cannot be built or
    is wrong. 'auto' does so on a GPU where it can be built and is right; where not, it says why in one line on stderr.
    dtype: that of the activations (torch.bfloat16 under autocast). Raises ValueError for any other kernel."""
    if kernel not in KERNELS:
        raise ValueError(f'kernel is {kernel!r}, it must be one of {", ".join(KERNELS)}')
    device = model.device.type
    if kernel == 'torch' or kernel == 'auto' and device != 'cuda':
        return                                                  # on a CPU the kernel is for checking, and slow
    reason = trouble(device, dtype, model.config.head_dim, model.config.rope_dim // 2)
    if reason and kernel == 'hip':
        raise ValueError(f'kernel is hip, but {reason} (`python -m kernels.build` shows all)')
    if reason:
        return say_once(f'CCA runs without its kernel: {reason}')
    for layer in model.layers:
        layer.attn.mix = cca_mix


say_once = functools.cache(lambda line: print(line, file=sys.stderr))


@functools.cache
def trouble(device, dtype, d, n):
    """Return why cca_mix cannot be used, in one line, or None. device: 'cuda' or 'cpu'. On a GPU it is compared."""
    try:
        if dtype not in DTYPES or d not in HEAD_DIMS or n % 8:
            raise ValueError(f'the kernel takes {", ".join(map(str, DTYPES))}, head_dim '
                             f'{" or ".join(map(str, HEAD_DIMS))} and a multiple of 16 rotated dims, '
                             f'not {dtype}, {d} and {2 * n}')
        load(device)
        if device == 'cuda' and not (worst := difference(device, dtype, d, n)) <= 0.02:         # NaN is wrong, too
            raise RuntimeError(f'on this GPU its results are {worst:.0%} off those of cca.mix; it is not used')
    except (RuntimeError, ValueError) as error:
        return str(error).partition('\n')[0]


# ---- is it right? ----

def difference(device, dtype, d, n, sizes=((2, 70), (2, 550), (2, 8250))):
    """Return the largest relative error of cca_mix on random inputs, over all its variants: each tile, at each size
    (B, S); with nothing before the tokens, with a cached past, and packed with several documents.

    The sizes lead to the three choices that the kernel makes by itself, see FEW_ROWS and ENOUGH_BLOCKS in cca.hip:
    small tiles; large ones, a head each; large ones, a KV group each."""
    g = torch.Generator(device).manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=g, device=device).to(dtype)
    Hq, Hk = 4, 2
    C, errors = (Hq + Hk) * d, []
    parameters = random(C, 1, 2), random(C), random(C, d, 2) / d ** 0.5, random(C), random(Hk)
    for B, S in sizes:
        table = rope_table(torch.arange(S, device=device)[None], 2 * n, 10_000.0)
        packed = torch.rand(B, S, generator=g, device=device) < 0.1             # True where a document begins
        for past, start in (None, None), (random(B, 2, C), None), (None, packed):
            inputs = random(B, S, C), past, *parameters, *table, start
            errors += [error(inputs, tile) for tile in TILES]
    return torch.tensor(errors).max().item()                    # NaN if any is


@torch.enable_grad()
def error(inputs, tile=CHOOSE, exact=torch.float32):
    """Return the largest relative error of cca_mix, in its results and the gradients of all tensors but cos and sin,
    against cca.mix computed in the dtype `exact`. inputs: the arguments of mix, all in one dtype but cos and sin."""
    dtype, results, gradients = inputs[0].dtype, [], None
    for f, precision in (mix, exact), (functools.partial(cca_mix, tile=tile), dtype):
        leaves = [None if t is None else t.detach().to(precision).requires_grad_() for t in inputs[:7]]
        outputs = f(*leaves, *inputs[7:])
        # Cubes, because their product with the result is positive: the temperature's sum over all tokens cannot cancel.
        gradients = gradients or [(x.detach() ** 3).to(dtype) for x in outputs]
        wanted = [t for t in leaves if t is not None]
        results.append([*outputs, *torch.autograd.grad(outputs, wanted, [g.to(precision) for g in gradients])])
    return torch.stack([(b.to(exact) - a).norm() / a.norm() for a, b in zip(*results)]).max().item()
