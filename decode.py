"""Decoding, the fast way: one token a row through all layers, in as few operations as possible.

For a single token the arithmetic is nothing and each of PyTorch's calls takes microseconds, so the plain forward pass
(model.py), made for thousands of tokens at once, spends its time in calls. Here the same function is written for S = 1:

  - Weights that meet in a row are multiplied beforehand (`fold`): W_Q, W_K and both W_V are one matrix, every RMSNorm's weight
    is in the matrix after it, the two convolutions are one of kernel 3, and half of residual scaling is in W_O.
  - QK-mean needs no means. Only the directions of q and k count, since both are normed next: twice q + (q~ + k~) / 2 does
    as well, and its 2 q + q~ is a convolution like q itself. Likewise 2 k + k~, to which the mean of q~ is added.
  - RoPE turns all heads of a token by the same angles: one matrix, made once for all layers. It keeps lengths, so the norm
    can come after it.
  - A token sees all that the cache holds: rows of one length need no mask.

`step` equals model(tokens[:, None], cache=cache) up to rounding; tests/test_decode.py holds them equal. What still costs is
PyTorch itself, some microseconds a call. `compiled` lets torch.compile write the whole step as one program, for which no
tensor may change its shape from token to token: see StaticCache.

Legend:  B rows, one new token each   P cached positions   E residual width   Hq, Hk query / KV heads   G = Hq / Hk   H = Hq + Hk
         d head dim   C = H d   R router width   M router classes
"""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cca import one_convolution, rope_table, wide
from model import Experts, swiglu


class Layer(NamedTuple):
    """One layer's weights, multiplied out. Those marked * are float32, the others in the model's dtype."""
    qkv: Tensor             # (E, C + Hk d)   [W_Q; W_K; W_V1; W_V2]^T, with the norm's weight
    taps: Tensor            # (H, 3 d, d)   * twice the convolution, plus the identity at the newest tap
    taps_bias: Tensor       # (H, 1, d)     *
    length: Tensor          # (H, 1)        * 1 for query heads, T sqrt(d) for key heads: logits are then q . k, unscaled
    o: Tensor               # (Hq d, E)       (diag(a_f) W_O)^T
    attn_scale: Tensor      # (E)           * a_r
    attn_constant: Tensor   # (E)           * b_r a_r + b_f a_f
    moe_norm: Tensor        # (E)           * the norm's weight
    down: Tensor            # (E, R)          the router's
    down_bias: Tensor       # (R)
    eda_scale: Tensor       # (R)             gamma, None in layer 0
    fc1: Tensor             # (R, R)          with the norm's weight
    fc1_bias: Tensor        # (R)
    fc2: Tensor             # (R, R)
    fc2_bias: Tensor        # (R)
    out: Tensor             # (R, M)
    moe_scale: Tensor       # (E)           *
    moe_constant: Tensor    # (E)           *
    branch_scale: Tensor    # (E)           * a_f


class Folded(NamedTuple):
    """A whole model's. The constants are tensors, since a number would be made one at every use."""
    layers: list            # of Layer
    mean: Tensor            # (H, H)          QK-mean's sums: of each k~ to its queries, of their mean to k~
    norm: Tensor            # (E)             the last norm's weight
    head: Tensor            # (V, E)        * the output head
    eps: Tensor             # sqrt(E eps), for norms of the stream
    eps_router: Tensor      # sqrt(R eps)


def gelu(x):
    """F.gelu, but not oneDNN's, which takes ten times as long for so few numbers."""
    if torch.compiler.is_compiling():                           # into code of its own
        return F.gelu(x)
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    y = F.gelu(x)
    torch.backends.mkldnn.enabled = before
    return y


@torch.no_grad()
def fold(model):
    """A Zaya -> Folded. To be made again when the weights have changed. `rms` below is sqrt(E) times too large, or sqrt(R) in
    the router: the norms' weights make up for it."""
    config, layers = model.config, []
    norm = lambda rms_norm: wide(rms_norm.weight) * len(rms_norm.weight) ** 0.5
    Hq, Hk, d = config.n_head, config.n_kv_head, config.head_dim
    for layer in model.layers:
        attn, router, a, m = layer.attn, layer.moe.router, layer.attn_residual, layer.moe_residual
        dtype, T = attn.o_proj.weight.dtype, wide(attn.temperature)
        matrix = lambda W, scale: (wide(W).T * scale).to(dtype).contiguous()
        w, b = one_convolution(attn.conv_depthwise_weight, attn.conv_depthwise_bias,
                               attn.conv_grouped_weight, attn.conv_grouped_bias)                       # (H, d, 3 d), (H, d)
        w = 2 * w
        w[..., 2 * d:] += torch.eye(d, device=w.device)
        constant = lambda s: wide(s.residual_bias * s.residual_scale + s.branch_bias * s.branch_scale)
        layers.append(Layer(
            matrix(attn.down_weight(), norm(layer.attn_norm)[:, None]), w.mT.contiguous(), 2 * b[:, None],
            torch.cat([T.new_ones(config.n_head), T * d ** 0.5])[:, None], matrix(attn.o_proj.weight, wide(a.branch_scale)),
            wide(a.residual_scale), constant(a), norm(layer.moe_norm), router.down_proj.weight.T.contiguous(),
            router.down_proj.bias, router.eda_scale, matrix(router.fc1.weight, norm(router.norm)[:, None]), router.fc1.bias,
            router.fc2.weight.T.contiguous(), router.fc2.bias, router.out_proj.weight.T.contiguous(),
            wide(m.residual_scale), constant(m), wide(m.branch_scale)))
    group = torch.eye(Hk).repeat_interleave(Hq // Hk, 0)                        # (Hq, Hk): 1 where a query head belongs to a KV head
    mean = F.pad(group, (Hq, 0, 0, Hk)) + F.pad(group.T * Hk / Hq, (0, Hk, Hq, 0))                     # (H, H)
    eps = [torch.tensor((n * config.norm_eps) ** 0.5, device=model.device) for n in (config.n_embd, config.router_dim)]
    return Folded(layers, mean.to(model.device), norm(model.norm), wide(model.embedding.weight), *eps)


def rotation(cos, sin, d):
    """cos, sin (B, n) -> (B, d, d): x @ rotation is RoPE of x (., d), and dims past 2n stay as they are."""
    B, n = cos.shape
    c = torch.cat([cos, cos, cos.new_ones(B, d - 2 * n)], -1)
    s = torch.cat([sin, sin.new_zeros(B, d - 2 * n)], -1)                       # (B, d - n), n beside the diagonal
    return torch.diag_embed(c) + torch.diag_embed(s, n) - torch.diag_embed(s, -n)


def gathered(experts, x, expert, weight):
    """Experts.forward for few tokens: each is multiplied by matrices looked up for it, so that nobody must know how many tokens
    an expert has. Compiled, this stores no copy of them, but reads them once for every token."""
    N = len(experts.gate_up)
    e = expert.clamp_max(N - 1)                                                 # 'skip' takes any expert, and no weight
    product = lambda W, x: (W[e] * x[:, None]).sum(-1)                          # (N, out, in), (B, in) -> (B, out)
    y = product(experts.down, swiglu(product(experts.gate_up, x)))              # (B, E)
    return y * torch.where(expert < N, weight, 0)[:, None].to(y.dtype)


class StaticCache:
    """A copy of a Cache that has read its prompts, for steps that are compiled. All shapes stay as they are: each row writes at a
    position counted in a tensor, and sees the whole capacity through a mask. Rows cannot leave. A step more than there is room
    for is an IndexError."""

    def __init__(self, cache):
        # A layer's own: of views of one tensor, torch.compile would write all at every change of one.
        own = lambda t: [layer.clone() for layer in t]
        self.k, self.v, self.conv, self.value = own(cache.k), own(cache.v), own(cache.conv), own(cache.value[:, :, 0])
        self.length = torch.tensor(cache.lengths, device=cache.k.device)                               # (B)
        self.row = torch.arange(len(self.length), device=self.length.device)

    def begin(self, S):
        positions, P = self.length[:, None], self.k[0].shape[2]                 # (B, 1), the capacity
        return positions, (torch.arange(P, device=positions.device) <= positions)[:, None, None]       # (B, 1, 1, P)

    def layers(self):
        """See Cache.layers."""
        def append(layer, k, v):
            for store, new in (self.k[layer], k), (self.v[layer], v):
                store[self.row, :, self.length] = new.to(store.dtype)           # row b at its own position, length[b]
            return self.k[layer].flatten(0, 1), self.v[layer].flatten(0, 1)     # (B Hk, P, d)

        return self.conv, self.value, [functools.partial(append, layer) for layer in range(len(self.k))]

    def end(self):
        self.length += 1


@functools.cache
def compiled(device_type):
    """`step` in one piece, for a StaticCache, on a CPU in C++ throughout. The first call takes half a minute for 6 layers, that of
    another process on the same machine some seconds; again for each number of rows and each capacity, at most a hundred."""
    torch._dynamo.config.recompile_limit = 100                                  # instead of 8, which is meant to find mistakes
    return torch.compile(step, fullgraph=True, dynamic=False, options={'cpp_wrapper': True} if device_type == 'cpu' else None)


@torch.no_grad()
def step(model, folded, cache, tokens):
    """tokens (B) int64, the next of each row -> logits (B, V) float32; the cache takes them in: a Cache, or a
    StaticCache. folded: fold(model)."""
    config, dtype, B = model.config, model.embedding.weight.dtype, len(tokens)
    Hq, Hk, d = config.n_head, config.n_kv_head, config.head_dim
    H, G, half = Hq + Hk, Hq // Hk, Hk * d // 2
    # What is the same in all layers: positions, mask, rotation.
    positions, mask = cache.begin(1)                                            # (1 or B, 1), None or (B, 1, 1, P)
    mask = 0.0 if mask is None else torch.where(mask[:, 0], 0.0, -torch.inf).repeat_interleave(Hk, 0)      # or (B Hk, 1, P)
    mask = torch.as_tensor(mask, dtype=dtype, device=tokens.device)
    rotate = rotation(*rope_table(positions[:, 0], config.rope_dim, config.rope_base), d).expand(B, d, d)
    _, mean, norm, head, eps, eps_router = folded
    mean = mean.expand(B, H, H)
    experts = gathered if torch.compiler.is_compiling() else Experts.__call__
    # sqrt(sum(x^2) + E eps), which is sqrt(E) times RMSNorm's denominator; hypot(a, b) = sqrt(a^2 + b^2)
    rms = lambda x, eps: torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), eps)           # (B, 1)
    x, r = wide((model.embedding(tokens) + model.embedding_bias) * model.embedding_scale), None        # (B, E)
    for layer, w, conv, value, append in zip(model.layers, folded.layers, *cache.layers()):
        # Attention.
        qk, v, v_delayed = torch.mm((x / rms(x, eps)).to(dtype), w.qkv).split([H * d, half, half], -1)
        qk = qk.float().view(B, H, d)                                           # [q~; k~]
        taps = torch.cat([conv.view(B, 2, H, d), qk[:, None]], 1)               # (B, 3, H, d)
        v = torch.cat([v, value.to(dtype)], -1).view(B, Hk, d)
        conv.copy_(taps[:, 1:].view(B, 2, H * d))
        value.copy_(v_delayed)
        y = torch.baddbmm(w.taps_bias, taps.permute(2, 0, 1, 3).reshape(H, B, 3 * d), w.taps).transpose(0, 1)  # (B, H, d)
        y = torch.bmm(torch.baddbmm(y, mean, qk), rotate)
        y = y * (w.length / torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min(1e-7))
        q, k = y.to(dtype).split([Hq, Hk], 1)
        k, v = append(k, v)                                                     # (B Hk, P, d)
        logits = torch.baddbmm(mask, q.reshape(B * Hk, G, d), k.mT)             # (B Hk, G, P)
        y = torch.bmm(logits.softmax(-1, torch.float32).to(dtype), v).view(B, Hq * d)
        x = torch.addcmul(w.attn_constant, x, w.attn_scale) + torch.mm(y, w.o)  # (B, E)
        # Router.
        h = (x / rms(x, eps) * w.moe_norm).to(dtype)                            # (B, E)
        r = torch.addmm(w.down_bias if r is None else torch.addcmul(w.down_bias, w.eda_scale, r), h, w.down)   # (B, R)
        z = (r / rms(r.float(), eps_router)).to(dtype)
        z = gelu(torch.addmm(w.fc1_bias, z, w.fc1))
        z = gelu(torch.addmm(w.fc2_bias, z, w.fc2))
        probs = torch.mm(z, w.out).softmax(-1, torch.float32)                   # (B, M)
        expert = (probs + layer.moe.router.balancing_bias).argmax(-1, keepdim=True)                    # (B, 1)
        # Experts.
        y = experts(layer.moe.experts, h, expert[:, 0], probs.gather(-1, expert)[:, 0])
        x = torch.addcmul(torch.addcmul(w.moe_constant, x, w.moe_scale), y, w.branch_scale)
    cache.end()
    return F.linear(wide((x / rms(x, eps) * norm).to(dtype)), head)             # (B, V)
