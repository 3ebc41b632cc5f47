"""The bricks of every layer: float32 where small errors would grow, RMSNorm, residual scaling.

    RMSNorm(x)  = x / sqrt(|x|^2 / E + eps) * w                 w: E learned numbers; |x|^2 / E is the mean of x^2
    scale(x, f) = (x + b_r) * a_r + (f + b_f) * a_f             a_r, b_r, a_f, b_f: E learned numbers each

Residual scaling (ZAYA1-8B report, arXiv 2605.05365, eq. 6) stands where other models add x + f: x is the residual
stream, f what a sublayer says to it. With a = 1 and b = 0 it is x + f. Learned, it lets each sublayer damp what came
before it, or turn itself down: over 40 layers this keeps the size of the stream in hand.

Legend:  E residual width   ... any dims before it
"""
import torch
from torch import nn


def upcast(x):
    """Return x in float32, the least precision of the delicate steps (report, IV-D); float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.compiler.assume_constant_result
def bf16_inside():
    """Whether products of float32 tensors may round their factors to bf16 (products_in)."""
    return torch.get_float32_matmul_precision() != 'highest'


class RMSNorm(nn.Module):
    """Norm over the last dim: computed in float32, returned in the weight's dtype. x (..., E) -> (..., E)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))             # w
        self.eps = eps

    def forward(self, x):
        x = upcast(x)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]         # (..., 1)
        return (x * torch.rsqrt(mean_square + self.eps) * upcast(self.weight)).to(self.weight.dtype)


class ResidualScaling(nn.Module):
    """Add a sublayer's output to the stream. x (..., E) float32, f (..., E) any float -> (..., E) float32."""

    def __init__(self, dim):
        super().__init__()
        self.residual_scale = nn.Parameter(torch.ones(dim))     # a_r
        self.residual_bias = nn.Parameter(torch.zeros(dim))     # b_r
        self.branch_scale = nn.Parameter(torch.ones(dim))       # a_f
        self.branch_bias = nn.Parameter(torch.zeros(dim))       # b_f

    def forward(self, x, f):
        # Multiplied out, (b_r a_r + b_f a_f) + x a_r + f a_f: what is in brackets is one vector for all tokens.
        constant = self.residual_bias * self.residual_scale + self.branch_bias * self.branch_scale     # (E)
        return torch.addcmul(torch.addcmul(constant, x, self.residual_scale), upcast(f), self.branch_scale)
