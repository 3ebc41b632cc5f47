"""Muon for matrices, AdamW for all other parameters: the optimizers of ZAYA1 (report, arXiv 2605.05365, IV-A).

The idea. A gradient matrix G = U S V^T usually has a few large singular values and many small ones, so that a gradient
step changes the weights in few directions. Muon steps along U V^T, the nearest semi-orthogonal matrix, which gives all
directions the same weight (K. Jordan, kellerjordan.github.io/posts/muon). No SVD: a Newton-Schulz iteration

    X <- a X + b (X X^T) X + c (X X^T)^2 X

maps each singular value s to a s + b s^3 + c s^5. Three steps suffice with Polar Express's a, b, c (arXiv 2505.16932).
The elements of an orthogonal m x n matrix have RMS 1 / sqrt(max(m, n)), those of an AdamW update about 0.2. Muon's
update is scaled by 0.2 sqrt(max(m, n)) (arXiv 2502.16982); both optimizers share one learning rate and weight decay.

Legend:  m, n matrix rows and columns   N experts (orthogonalized separately; gate and up as one matrix)
"""
import torch

POLAR_EXPRESS = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)       # a, b, c


def orthogonalize(G, coefficients=POLAR_EXPRESS):
    """Return the matrices of G (..., m, n), in its dtype, with its singular vectors; singular values above 0.01 |G|
    become 0.73 to 1.27. Computed in bf16 on GPUs, which is precise enough, in float32 tensors on CPUs."""
    X = G.reshape(-1, *G.shape[-2:]).to(torch.bfloat16 if G.is_cuda else torch.float32)
    tall = X.shape[-2] > X.shape[-1]
    if tall:                                                    # the smaller of X X^T and X^T X
        X = X.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)          # Frobenius >= spectral norm: all s in [0, 1]
    for a, b, c in coefficients:
        XXt = X @ X.mT
        P = torch.baddbmm(XXt, XXt, XXt, beta=b, alpha=c)       # b XXt + c XXt XXt
        X = torch.baddbmm(X, P, X, beta=a)                      # a X + P X
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum. Parameters: matrices (m, n), or stacks of matrices (N, m, n)."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.1, compile=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        # The learning rate is not an argument: a new value would recompile. train.py wraps this if sharded.
        self.orthogonalize = torch.compile(orthogonalize, dynamic=True) if compile else orthogonalize
        self.found_inf = None           # 0-d tensor, as for torch's fused AdamW: if 1, step() changes nothing

    @torch.no_grad()
    def step(self):
        # Skipped: the decay factor is 1, the momentum averaged with itself, and the update orthogonalize(0) = 0.
        either = lambda skipped, x: x if self.found_inf is None else torch.where(self.found_inf > 0, skipped, x)
        for group in self.param_groups:
            lr, momentum, keep = group['lr'], group['momentum'], either(1, 1 - group['lr'] * group['weight_decay'])
            stacks = {}                                         # one batch per shape of matrices; a stack: its own
            for p in group['params']:
                stacks.setdefault(p.shape if p.ndim == 2 else id(p), []).append(p)
                if not self.state[p]:
                    self.state[p]['momentum'] = torch.zeros_like(p)
            for params in stacks.values():                      # foreach: few kernels for all matrices
                averages = [self.state[p]['momentum'] for p in params]
                grads = [either(average, p.grad) for average, p in zip(averages, params)]
                torch._foreach_lerp_(averages, grads, 1 - momentum)
                torch._foreach_lerp_(grads, averages, momentum)                 # Nesterov
                updates = self.orthogonalize(either(0, torch.stack(grads) if len(grads) > 1 else grads[0][None]))
                torch._foreach_mul_(params, keep)
                torch._foreach_add_(params, updates.unbind(), alpha=-lr * 0.2 * max(updates.shape[-2:]) ** 0.5)


def make_optimizers(model, lr, weight_decay=0.1, compile=False):
    """Return [Muon, AdamW] over all parameters of a Zaya. Muon gets the weight matrices and the experts; AdamW gets the
    embedding (a lookup table), the convolutions (tiny kernels) and all vectors.

    A group's 'lr_scale' multiplies the scheduled learning rate. It is 0.1 for vectors, which have no weight decay. At
    the full rate the biases outgrow a new embedding (std 0.02) within some 20 steps; the routers, which then see
    almost equal tokens, send all tokens to one expert. With width 128 and lr 3e-3, val loss and load entropy after 120
    steps are 6.54 and 0.42 at the full rate, 6.29 and 0.78 at a tenth."""
    muon, others, vectors = [], [], []
    for name, p in model.named_parameters():
        is_matrix = (p.ndim == 2 and 'embedding' not in name) or 'experts' in name
        (muon if is_matrix else others if p.ndim > 1 else vectors).append(p)
    return [Muon([{'params': muon, 'lr_scale': 1.0}], lr, weight_decay=weight_decay, compile=compile),
            torch.optim.AdamW([{'params': others, 'weight_decay': weight_decay, 'lr_scale': 1.0},
                               {'params': vectors, 'weight_decay': 0.0, 'lr_scale': 0.1}], lr, betas=(0.9, 0.95),
                              fused=model.device.type in ('cpu', 'cuda'))]      # one pass over memory
