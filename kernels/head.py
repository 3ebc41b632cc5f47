"""The matrix products of the output head, whose results are float32 (report, arXiv 2605.05365, IV-D), on GPUs, and for
bf16 weights on any device.

On an H100, float32 matmuls have a fifteenth of the throughput of bf16. So each factor is split into two bf16 parts, and
the three largest of the four partial products are accumulated in float32:

    a = a_h + a_l + e,     a_h = bf16(a),   a_l = bf16(a - a_h),   |e| <= 2^-17 |a|
    a b = a_h b_h + a_h b_l + a_l b_h + error,    |error| <= 2^-15 |a| |b|, elementwise, summed over k

The error of float32 accumulation comes on top. The RMS error against float64, relative to the RMS of a b (k = 1024,
normally distributed elements), is 4.4e-6; that of float32 is 2.5e-7, of TF32 2.9e-4, of one bf16 product 2.4e-3. The
error of the loss's gradients is 1e-5 (tests/test_head.py).

Legend:  m, k, n sizes of a product, (m, k) (k, n) -> (m, n)   T tokens   E residual width   V vocabulary
"""
import functools

import torch
import torch.nn.functional as F


def accumulate(out, a, b):
    """Add a b to out (m, n) float32, in place. a (m, k), b (k, n) bf16. Raise RuntimeError or TypeError where torch
    does not support out_dtype: on CPUs, and on ROCm (torch 2.9)."""
    torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


@functools.cache
def usable(device):
    """Return whether `accumulate` works on a torch.device, in native bf16. The first call synchronizes."""
    if device.type != 'cuda' or not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    a, out = torch.ones(16, 16, device=device, dtype=torch.bfloat16), torch.ones(16, 16, device=device)
    try:
        accumulate(out, a, a)
    except (RuntimeError, TypeError):
        return False
    return out.eq(17).all().item()


def split_bf16(x):
    """Return the two parts (2, m, n) bf16 of x (m, n) float32, the high one first; or x itself, (1, m, n), if bf16."""
    high = x.bfloat16()
    return high[None] if x.dtype == torch.bfloat16 else torch.stack([high, (x - high).bfloat16()])


def addmm_(out, a, b):
    """Add a b to out (m, n) float32, in place, and return it. a (1 or 2, m, k), b (1 or 2, k, n): from split_bf16."""
    for i, j in (1, 0), (0, 1), (0, 0):                         # the small products first
        if i < len(a) and j < len(b):
            accumulate(out, a[i], b[j])
    return out


def mm(a, b, out=None):
    """Return a b, (m, n) float32, written to `out` if given. a, b: from split_bf16."""
    out = torch.empty(a.shape[1], b.shape[2], device=a.device) if out is None else out
    return addmm_(out.zero_(), a, b)


def products(x, V, bf16):
    """Return the functions split, mm, addmm_ for the loss of x (T, E), and its chunk size in tokens: those of this file
    if `bf16` is true and they are usable, else the identity and torch's own. On a CPU 2 MiB of logits per chunk are
    fastest, but at least 512 tokens; GPUs get up to 256 MiB, for fewer and larger products."""
    size = max(512, 2 ** 19 // V) if x.device.type == 'cpu' else max(1, 2 ** 26 // V)
    if bf16 and x.dtype == torch.float32 and usable(x.device):
        return split_bf16, mm, addmm_, size
    return lambda x: x, torch.mm, torch.Tensor.addmm_, size


def linear(x, W):
    """Return x W^T in float32. x (..., E) float32, W (V, E) of another dtype -> (..., V). Unless compiled, no float32
    copy of all of W is made: a bf16 W is multiplied by the two parts of x if these are usable and gradients
    are disabled, else W is upcast in chunks, of 4 MiB on CPUs, 512 MiB on GPUs."""
    if torch.compiler.is_compiling():
        return F.linear(x, W.to(x.dtype))
    if W.dtype == torch.bfloat16 and x.dtype == torch.float32 and usable(x.device) and not torch.is_grad_enabled():
        return mm(split_bf16(x.reshape(-1, x.shape[-1])), W.mT[None]).view(*x.shape[:-1], len(W))
    entries = 2 ** (20 if x.device.type == 'cpu' else 27) // W.shape[1]         # vocabulary entries per chunk
    return torch.cat([F.linear(x, chunk.to(x.dtype)) for chunk in W.split(max(1, entries))], -1)
