"""The matrix products of the output head, whose results are float32 (report, arXiv 2605.05365, IV-D), on GPUs and from
bf16 weights. On a CPU with float32 weights model.py uses torch.mm.

A float32 product of a GPU is a fifteenth as fast as one in bf16. So a factor is split into two bf16 parts, and of the
four products of parts, which have float32 results, three are added up:

    a = a_h + a_l + e,     a_h = bf16(a),   a_l = bf16(a - a_h),   |e| <= 2^-18 |a|
    a b = a_h b_h + a_h b_l + a_l b_h + error,    |error| <= 3 * 2^-18 |a| |b|, elementwise, summed over k

The RMS error against float64, relative to the RMS of a b (k = 1024, normally distributed elements), is 4.4e-6; that of
float32 is 2.5e-7, of TF32 2.9e-4, of one bf16 product 2.4e-3. The gradients of a loss then have an error of 1e-5, with
bf16 logits 1e-2 (tests/test_head.py).

Legend:  m, k, n sizes of a product, (m, k) (k, n) -> (m, n)   T tokens   E residual width   V vocabulary
"""
import functools

import torch
import torch.nn.functional as F


def accumulate(out, a, b):
    """Add a b to out (m, n) float32, in place. a (m, k), b (k, n) bf16. Raise RuntimeError where torch cannot: on CPUs,
    under ROCm (2.9)."""
    torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


@functools.cache
def usable(device):
    """Return whether a torch.device has bf16 units and `accumulate` works there. The first call waits for a result."""
    if device.type != 'cuda' or not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    a, out = torch.ones(16, 16, device=device, dtype=torch.bfloat16), torch.ones(16, 16, device=device)
    try:
        accumulate(out, a, a)
    except (RuntimeError, TypeError):
        return False
    return out.eq(17).all().item()


def parts(x):
    """Return the two parts (2, m, n) bf16 of x (m, n) float32, the high one first; or x itself, (1, m, n), if bf16."""
    high = x.bfloat16()
    return high[None] if x.dtype == torch.bfloat16 else torch.stack([high, (x - high).bfloat16()])


def addmm_(out, a, b):
    """Add a b to out (m, n) float32, in place, and return it. a (1 or 2, m, k), b (1 or 2, k, n): from `parts`."""
    for i, j in (1, 0), (0, 1), (0, 0):                         # the small products first
        if i < len(a) and j < len(b):
            accumulate(out, a[i], b[j])
    return out


def mm(a, b, out=None):
    """Return a b, (m, n) float32, written to `out` if given. a, b: from `parts`."""
    out = torch.empty(a.shape[1], b.shape[2], device=a.device) if out is None else out
    return addmm_(out.zero_(), a, b)


def products(x, V, bf16):
    """Return parts, mm, addmm_ for the loss of x (T, E), and its piece size in tokens: those of this file if `bf16` is
    true and they are usable, else no parts and torch's own. 2 MiB of logits per piece are fastest on a CPU; GPUs get up
    to 256 MiB, for fewer and larger products."""
    size = max(512, 2 ** 19 // V) if x.device.type == 'cpu' else max(1, 2 ** 26 // V)
    if bf16 and x.dtype == torch.float32 and usable(x.device):
        return parts, mm, addmm_, size
    return lambda x: x, torch.mm, torch.Tensor.addmm_, size


def linear(x, W):
    """Return x W^T in float32. x (..., E) float32, W (V, E) of another dtype -> (..., V). Unless compiled, no float32
    copy of all of W is made: a bf16 W is multiplied by the two parts of x if these are usable and no gradient is
    needed, else W is upcast in pieces, of 4 MiB on CPUs, 512 MiB on GPUs."""
    if torch.compiler.is_compiling():
        return F.linear(x, W.to(x.dtype))
    if W.dtype == torch.bfloat16 and x.dtype == torch.float32 and usable(x.device) and not torch.is_grad_enabled():
        return mm(parts(x.reshape(-1, x.shape[-1])), W.mT[None]).view(*x.shape[:-1], len(W))
    entries = 2 ** (20 if x.device.type == 'cpu' else 27) // W.shape[1]         # vocabulary entries per piece
    return torch.cat([F.linear(x, piece.to(x.dtype)) for piece in W.split(max(1, entries))], -1)
