"""The hot spots of training once more, each with its gradient written by hand: the same results in fewer passes over memory.

Automatic differentiation is exact but wasteful. For y = x * rsqrt(mean(x^2) + eps) * w it keeps four intermediate results,
reads them all again on the way back, and writes as many gradients. On a CPU, where a number is multiplied faster than
fetched, such chains take longer than the matrix products between them. Here each chain is one step: it keeps only what
its gradient needs, and recomputes the rest. The plain formulas stay where they belong, in model.py, as the definition;
tests/test_fused.py holds the two equal. torch.compile fuses the plain formulas by itself, so it is given those.

Notation: g is the gradient of the loss with respect to a result, dx that with respect to x.

Legend:  T tokens   E residual width   N experts   F expert width   V vocabulary
"""
import torch


class RMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps), one r for each token. x (..., E), w (E), both of one dtype.

    With p = g x:  dw = sum over tokens of p r,  and since r depends on x, too (dr/dx = -r^3 x / E),
                   dx = g w r - x r^3 (p . w) / E
    """

    @staticmethod
    def forward(ctx, x, w, eps):
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()   # (..., 1)
        ctx.save_for_backward(x, w, r)
        return (x * r).mul_(w)

    @staticmethod
    def backward(ctx, g):
        x, w, r = ctx.saved_tensors
        p = g * x
        dot, dw = p @ w, r.flatten() @ p.flatten(0, -2)                         # (...), (E)
        dx = torch.mul(g, w, out=p).mul_(r)                                     # p has served: its memory is used again
        return dx.addcmul_(x, r ** 3 * dot[..., None], value=-1 / x.shape[-1]), dw, None


class ResidualScaling(torch.autograd.Function):
    """y = (x + b_r) a_r + (f + b_f) a_f (report, eq. 6). x, f (..., E); the four vectors (E).

    dx = g a_r,  df = g a_f,  db_r = a_r sum(g),  db_f = a_f sum(g),  da_r = sum(g x) + b_r sum(g),  da_f alike
    """

    @staticmethod
    def forward(ctx, x, f, a_r, b_r, a_f, b_f):
        ctx.save_for_backward(x, f, a_r, b_r, a_f, b_f)
        return torch.addcmul(b_r * a_r + b_f * a_f, x, a_r).addcmul_(f, a_f)

    @staticmethod
    def backward(ctx, g):
        x, f, a_r, b_r, a_f, b_f = ctx.saved_tensors
        total = lambda t: t.flatten(0, -2).sum(0)
        p, sum_g = g * x, total(g)
        da_r = total(p) + b_r * sum_g
        da_f = total(torch.mul(g, f, out=p)) + b_f * sum_g
        return torch.mul(g, a_r, out=p), g * a_f, da_r, a_r * sum_g, da_f, a_f * sum_g


class Permute(torch.autograd.Function):
    """Rows in another order: x[order], x (T, ...), order (T) int64 a permutation and inverse (T) its inverse. That each row
    is read once is what autograd cannot know: it would add gradients up row by row, where a gather is enough."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, g):
        order, inverse = ctx.saved_tensors
        return g.index_select(0, inverse), None, None


def permute(x, order, inverse):
    return Permute.apply(x, order, inverse) if x.requires_grad else x.index_select(0, order)


# ---- output head and loss ----

class CrossEntropy(torch.autograd.Function):
    """Mean over the scored targets (not -1) of -log softmax(x W^T)[target], in nats. x (T, E), W (V, E), targets (T) int64.

    Logits for all tokens may be the largest tensor of the whole training step: at 8B, a megabyte a token. So they are made
    for some tokens at a time, and with them, at once, the gradients, for they are needed then and never again:
    dlogits = (softmax - one-hot) / n,  dx = dlogits W,  dW = dlogits^T x.
    """

    @staticmethod
    def forward(ctx, x, W, targets):
        n = (targets >= 0).sum()                                                # the scored ones
        rows = max(512, 2 ** 19 // len(W))                                      # small vocabularies: what fits into a CPU's cache
        learning = any(ctx.needs_input_grad)
        loss, dx, dW = x.new_zeros(()), *((torch.empty_like(x), torch.zeros_like(W)) if learning else (x, W))
        for x_c, t, dx_c in zip(x.split(rows), targets.split(rows), dx.split(rows)):
            logits = x_c @ W.T                                                  # (rows, V)
            scored, t = (t >= 0)[:, None], t.clamp_min(0)[:, None]
            logp = logits.log_softmax(-1)
            loss -= logp.gather(1, t).mul_(scored).sum()
            if learning:
                dlogits = logp.exp_().scatter_add_(1, t, -torch.ones_like(x_c[:, :1])).mul_(scored / n)
                torch.mm(dlogits, W, out=dx_c)
                dW.addmm_(dlogits.T, x_c)
        ctx.save_for_backward(dx, dW)
        return loss / n

    @staticmethod
    def backward(ctx, g):
        dx, dW = ctx.saved_tensors
        return dx * g, dW * g, None
