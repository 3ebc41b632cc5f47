"""The hot spots of training once more, each with its gradient written by hand: the same results in fewer passes over memory.

Automatic differentiation is exact but wasteful. For y = x * rsqrt(mean(x^2) + eps) * w it keeps four intermediate results,
reads them all again on the way back, and writes as many gradients. On a CPU, where a number is multiplied faster than
fetched, such chains take longer than the matrix products between them. Here each chain is one step: it keeps only what
its gradient needs, and recomputes what is quickly made again. The plain formulas stay where they belong, in model.py and
cca.py, as the definition; tests/test_fused.py holds the two equal. torch.compile fuses the plain formulas by itself, so it
is given those.

Notation: g is the gradient of the loss with respect to a result, dx that with respect to x.

Legend:  T tokens   E residual width   V vocabulary   B, S, C, H, Hq, Hk, G, d as in cca.py, H = Hq + Hk
"""
import torch

import cca


def wanted():
    """Whether to take the functions of this file. They are faster forward, too, so that inference wants them as well."""
    return not torch.compiler.is_compiling()


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


def mix(qk, past, w1, b1, w2, b2, temperature, cos, sin, start=None):
    """cca.mix, with the same arguments and results."""
    w, b = cca.one_convolution(w1, b1, w2, b2)
    length = cca.lengths(temperature, len(w) - len(temperature), b.shape[1])
    return Mix.apply(cca.padded(past, qk), w, b, length, len(temperature), cos, sin, start)


class Mix(torch.autograd.Function):
    """Steps 2 to 5 of CCA: convolution, QK-mean, norm, RoPE. x (B, S + 2, C), two columns of past first; w (H, d, 3d), b (H, d) of
    cca.one_convolution; length (H) of cca.lengths -> q (B, Hq, S, d), k (B, Hk, S, d). Inside, heads come first,
    (H, B, S, d), for that is how one product a head leaves them, and attention likes it.

    Of q~, k~:  z_q = conv_q + q~ / 2 + k~ / 2,   z_k = conv_k + k~ / 2 + mean(q~) / 2;   the head's own half joins the
    convolution, as half an identity at its newest tap.  y = z length / |z|, so  dz = (g - z (z . g) / |z|^2) length / |z|.
    Rotating back is rotating by minus the angle.
    """

    @staticmethod
    def forward(ctx, x, w, b, length, Hk, cos, sin, start):
        (B, S, _), (H, d) = x[:, 2:].shape, b.shape
        w = w.clone()
        w[..., 2 * d:].diagonal(dim1=1, dim2=2).add_(0.5)
        taps = cca.shifted(x, H, start).flatten(0, 1).transpose(0, 1)           # (H, B S, 3d)
        z = torch.baddbmm(b[:, None], taps, w.mT).view(H, B, S, d)
        heads = x[:, 2:].unflatten(-1, (H, d)).permute(2, 0, 1, 3)
        q, k = heads[:-Hk].unflatten(0, (Hk, -1)), heads[-Hk:]                  # (Hk, G, B, S, d), (Hk, B, S, d)
        z[:-Hk].unflatten(0, (Hk, -1)).add_(k[:, None], alpha=0.5)
        z[-Hk:].add_(q.mean(1), alpha=0.5)
        size = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min_(torch.finfo(z.dtype).eps)
        length = length[:, None, None, None]
        y = Mix.rotate(z * (length / size), cos, sin)
        ctx.save_for_backward(taps, w, z, size, length, cos, sin, start)
        return y[:-Hk].transpose(0, 1), y[-Hk:].transpose(0, 1)

    @staticmethod
    def rotate(y, cos, sin):
        """RoPE in place. y (H, B, S, d), cos and sin (B or 1, S, n)."""
        n = cos.shape[-1]
        a, b = y[..., :n], y[..., n:2 * n]
        old = a.clone()
        a.mul_(cos).addcmul_(b, sin, value=-1)
        b.mul_(cos).addcmul_(old, sin)
        return y

    @staticmethod
    def backward(ctx, g_q, g_k):
        taps, w, z, size, length, cos, sin, start = ctx.saved_tensors
        (H, B, S, d), Hk = z.shape, g_k.shape[1]
        g = Mix.rotate(torch.cat([g_q.transpose(0, 1), g_k.transpose(0, 1)]), cos, -sin)
        dot = (g * z).sum(-1, keepdim=True)                                     # (H, B, S, 1)
        dlength = (dot / size).sum((1, 2, 3))
        along = torch.where(size > torch.finfo(z.dtype).eps, dot / size ** 2, 0)
        dz = g.addcmul_(z, along, value=-1).mul_(length / size)
        flat = dz.view(H, B * S, d)
        dw = flat.mT @ taps                                                     # (H, d, 3d)
        dtaps = (flat @ w).view(H, B, S, 3, d)
        if start is not None:                                                   # what was masked learns nothing
            for tap, hidden in enumerate(cca.out_of_sight(start)):
                dtaps[..., tap, :].masked_fill_(hidden, 0)
        dx = z.new_empty(B, S + 2, H * d)
        heads = dx.unflatten(-1, (H, d)).permute(2, 0, 1, 3)                    # (H, B, S + 2, d), the same memory
        heads[:, :, :2], heads[:, :, 2:] = 0, dtaps[..., 2, :]
        for tap in range(2):
            heads[:, :, tap:tap + S] += dtaps[..., tap, :]
        q, k = heads[:-Hk, :, 2:].unflatten(0, (Hk, -1)), heads[-Hk:, :, 2:]
        q.add_(dz[-Hk:, None], alpha=0.5 / q.shape[1])
        k.add_(dz[:-Hk].unflatten(0, (Hk, -1)).sum(1), alpha=0.5)
        return dx, dw, flat.sum(1), dlength, None, None, None, None


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
    """Permute; without a gradient to come, the gather alone: for a few rows, as in decoding, the detour costs more than it."""
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
        loss, dx, dW = x.new_zeros(()), *((torch.empty_like(x), torch.zeros_like(W)) if learning else (x, W))   # or stand-ins, not written
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
