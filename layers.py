"""The parts every layer uses: float32 upcasts, RMSNorm, residual scaling.

    RMSNorm(x)  = x / sqrt(mean(x^2) + eps) * w                 w: learned; the mean is over the last dim
    scale(x, f) = (x + b_r) * a_r + (f + b_f) * a_f             a_r, b_r, a_f, b_f (E): learned

Residual scaling (ZAYA1-8B report, arXiv 2605.05365, eq. 6) replaces the plain residual connection x + f, where x is the
residual stream and f the output of a sublayer (attention or experts). It is initialized to x + f: a = 1, b = 0. The
learned scales can damp the stream and each sublayer's output, to keep the residual norm bounded over 40 layers.

Legend:  E residual width   ... any leading dims
"""
import contextlib

import torch
from torch import nn


def upcast(x):
    """Return x in float32, for the operations that need it (report, IV-D); float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.compiler.assume_constant_result
def matmul_precision():
    """Return torch's precision of float32 matmuls, a constant for torch.compile."""
    return torch.get_float32_matmul_precision()


def bf16_matmuls():
    """Return whether float32 matmuls may run in bf16 (set by matmuls_in, runtime/device.py)."""
    return matmul_precision() != 'highest'


@contextlib.contextmanager
def float32_matmuls():
    """Compute float32 matmuls in full precision, whatever matmuls_in has set."""
    before = matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class RMSNorm(nn.Module):
    """RMSNorm over the last dim, computed in float32, returned in the weight's dtype. x (..., E) -> (..., E)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))             # w
        self.eps = eps

    def forward(self, x):
        x = upcast(x)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]         # (..., 1)
        return (x * torch.rsqrt(mean_square + self.eps) * upcast(self.weight)).to(self.weight.dtype)


class ResidualScaling(nn.Module):
    """Add a sublayer's output to the residual stream, scaled. x (..., E) float32, f (..., E) -> (..., E) float32."""

    def __init__(self, dim):
        super().__init__()
        self.residual_scale = nn.Parameter(torch.ones(dim))     # a_r
        self.residual_bias = nn.Parameter(torch.zeros(dim))     # b_r
        self.branch_scale = nn.Parameter(torch.ones(dim))       # a_f
        self.branch_bias = nn.Parameter(torch.zeros(dim))       # b_f

    def forward(self, x, f):
        # Expanded to (b_r a_r + b_f a_f) + x a_r + f a_f: the term in parentheses is the same for all tokens.
        constant = self.residual_bias * self.residual_scale + self.branch_bias * self.branch_scale     # (E)
        return torch.addcmul(torch.addcmul(constant, x, self.residual_scale), upcast(f), self.branch_scale)
