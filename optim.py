"""Muon for matrices, AdamW for everything else: the optimizers of ZAYA1 (report, arXiv 2605.05365, IV-A).

The idea. A gradient matrix G = U S V^T usually has a few large singular values and many small ones, so a plain step
moves the weights in few directions. Muon steps along U V^T instead: the nearest orthogonal matrix, all directions
equally (K. Jordan, kellerjordan.github.io/posts/muon). No SVD is needed: the odd polynomial

    X <- a X + b (X X^T) X + c (X X^T)^2 X

acts on the singular values alone (each s becomes a s + b s^3 + c s^5), and a few rounds drive all of (0, 1] near 1.
An orthogonal m x n matrix has RMS 1 / sqrt(max(m, n)); AdamW's updates have RMS 0.2 or so. Multiplied by
0.2 sqrt(max(m, n)), Muon's match (arXiv 2502.16982), and both share one learning rate and weight decay.

Legend:  N experts (a stack of matrices, each orthogonalised by itself)   m, n rows and columns
"""
from collections import defaultdict

import torch

A, B, C = 3.4445, -4.7750, 2.0315      # Jordan's coefficients: steep at 0, ending between 0.7 and 1.2, not exactly at 1


def orthogonalize(G, rounds=5):
    """G (..., m, n) -> (..., m, n) with the same singular vectors and singular values near 1. bf16 on GPUs, where it
    is fast and exact enough; float32 on CPUs."""
    X = G.bfloat16() if G.is_cuda else G.float()
    tall = X.shape[-2] > X.shape[-1]
    if tall:                                                # the shorter side first: X X^T is then the smaller product
        X = X.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)      # Frobenius >= spectral norm: all s in [0, 1]
    diagonal = lambda M: M.diagonal(dim1=-2, dim2=-1)
    for _ in range(rounds):
        S = X @ X.mT
        P = C * S
        diagonal(P).add_(B)
        P = P @ S                                           # B S + C S S
        diagonal(P).add_(A)
        X = P @ X                                           # A X + B S X + C S S X
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Parameters: matrices (m, n), or stacks of them (N, m, n)."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.orthogonalize = orthogonalize      # train.py puts another in its place where matrices are in parts

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group['lr'], group['momentum']
            # Matrices of one shape, of all layers, are orthogonalised together. A layer's experts are a stack already.
            of_shape = defaultdict(list)
            for p in group['params']:
                if p.ndim == 2:
                    of_shape[p.shape].append(p)
            for params in [*of_shape.values(), *([p] for p in group['params'] if p.ndim == 3)]:
                updates = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state['momentum'] = torch.zeros_like(p)
                    average = state['momentum'].lerp_(p.grad, 1 - momentum)
                    updates.append(p.grad.lerp_(average, momentum))             # Nesterov: look one step ahead
                updates = torch.stack(updates) if len(updates) > 1 else updates[0][None]
                for p, update in zip(params, self.orthogonalize(updates)):
                    p.mul_(1 - lr * group['weight_decay'])
                    p.add_(update, alpha=-lr * 0.2 * max(p.shape[-2:]) ** 0.5)


def make_optimizers(model, lr, weight_decay=0.1):
    """[Muon, AdamW] over all parameters of a Zaya. Muon takes each weight matrix and each expert; AdamW takes the
    embedding (a table of rows, not a map), the convolutions (tiny kernels) and all vectors.

    A group's 'lr_scale' multiplies the scheduled learning rate: 0.1 for vectors, which do not decay either. All tokens
    share them: at full rate, biases would within some 20 steps outgrow what a fresh embedding (std 0.02) tells of each
    token, and the routers then see all tokens alike and send them to one expert. After 120 steps of a model of width
    128 with lr 3e-3, full rate had val loss 6.54 and load entropy 0.42, a tenth had 6.29 and 0.78.
    """
    muon, others, vectors = [], [], []
    for name, p in model.named_parameters():
        is_matrix = (p.ndim == 2 and 'embedding' not in name) or 'experts' in name
        (muon if is_matrix else others if p.ndim > 1 else vectors).append(p)
    return [Muon([{'params': muon, 'lr_scale': 1.0}], lr, weight_decay=weight_decay),
            torch.optim.AdamW([{'params': others, 'weight_decay': weight_decay, 'lr_scale': 1.0},
                               {'params': vectors, 'weight_decay': 0.0, 'lr_scale': 0.1}], lr, betas=(0.9, 0.95),
                              fused=model.device.type in ('cpu', 'cuda'))]     # one pass over memory instead of a dozen
