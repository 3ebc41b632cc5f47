"""CCA, Compressed Convolutional Attention: attention done entirely inside a compressed latent.

The idea. Ordinary attention projects a token of width E up to full-size queries, keys and values. CCA projects it
DOWN (8B model: 2048 -> query latent 1024, key and value latents 256 each) and never comes back up before attention is
over, so that parameters, attention FLOPs and the KV cache all shrink by the same factor. What the small latents lose
in expressiveness, two tiny causal convolutions, a query-key mean and a delayed half of the values give back.

For a token x_t (already RMS-normed), after the CCA paper (arXiv 2510.04476, II-B and listing A.1):

    1. project        q~ = W_Q x,   k~ = W_K x
    2. convolve       [q; k] = conv_grouped(conv_depthwise([q~; k~]))      both causal, kernel 2
    3. QK-mean        m_q = (q~ + k~ of the head's KV group) / 2,  m_k = mean of m_q over the group's query heads
                      q += m_q,  k += m_k
    4. norm           q <- sqrt(d) q / |q|,   k <- T sqrt(d) k / |k|       T: one learned number for each KV head
    5. RoPE           rotates the first half of each head's dims
    6. value shift    v_t = [W_V1 x_t ; W_V2 x_{t-1}]                      x_{-1} = 0
    7. attend         softmax(q k^T / sqrt(d)) v, causal, then W_O back to width E

T itself scales the keys, not exp(T) as in the paper: this keeps the logits bounded (ZAYA1-8B report, 2605.05365, App. C).

Legend:  B batch   S sequence (new tokens)   P positions held by the cache   E residual width
         Hq, Hk query / KV heads   G = Hq / Hk query heads a KV head   d head dim   C = (Hq + Hk) d conv channels
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import fused
from kernels import cca_mix, usable


def wide(x):
    """x in float32, the least precision that the delicate steps below are done in (report, IV-D); float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- step 2: the two convolutions, written as what they are: this token's term plus the previous token's ----
# These two are the definition. The model uses `convolve`, below, and the tests hold it equal to them.

def conv_depthwise(before, now, weight, bias):
    """y_t = w_0 x_{t-1} + w_1 x_t + b, each channel by itself. before = x_{t-1}, now = x_t: (B, S, C) -> (B, S, C).
    weight (C, 1, 2) as in nn.Conv1d: out, in of the group, time. bias (C)."""
    w_before, w_now = weight[:, 0].unbind(-1)                       # (C) each
    return before * w_before + (now * w_now + bias)


def conv_grouped(before, now, weight, bias):
    """y_t = W_0 x_{t-1} + W_1 x_t + b, the channels of a head among themselves. As above; weight (C, d, 2), bias (C)."""
    C, d, _ = weight.shape
    H = C // d                                                      # one group a head
    x = torch.stack([before, now], 2).unflatten(-1, (H, d))         # (B, S, 2, H, d)
    w = weight.view(H, d, d, 2)                                     # (head, out, in, time)
    return torch.einsum('bsthi,hoit->bsho', x, w).flatten(-2) + bias


def one_convolution(w1, b1, w2, b2):
    """Two convolutions with nothing between them are ONE of kernel 3, whose weights are products of theirs. Of the depthwise
    one w1 (C, 1, 2), b1 (C), of the grouped one w2 (C, d, 2), b2 (C) -> w (H, d, 3d), taps from old to new, and b (H, d)."""
    C, d, _ = w2.shape
    H = C // d                                                      # one group a head
    w1, b1, w2, b2 = map(wide, (w1, b1, w2, b2))                    # products of weights: rounded once, at the end
    w1, w2 = w1.view(H, 1, d, 2), w2.view(H, d, d, 2)               # (head, out, in, time)
    w = torch.cat([w2[..., 0] * w1[..., 0],                         # x_{t-2}
                   w2[..., 0] * w1[..., 1] + w2[..., 1] * w1[..., 0],       # x_{t-1}
                   w2[..., 1] * w1[..., 1]], -1)                    # x_t
    return w, (w2.sum(-1) @ b1.view(H, d, 1))[..., 0] + b2.view(H, d)


def padded(past, qk):
    """past (B, 2, C) or None, for zeros, and qk (B, S, C) -> (B, S + 2, C)."""
    return F.pad(qk, (0, 0, 2, 0)) if past is None else torch.cat([past, qk], 1)


def out_of_sight(start):
    """start (B, S) bool, where a document begins -> which tokens may not see x_{t-2} and x_{t-1}: two (B, S, 1) bool."""
    return (start | F.pad(start, (1, 0))[:, :-1])[..., None], start[..., None]


def shifted(x, H, start=None):
    """x (B, S + 2, C), two columns of past first -> (B, S, H, 3d): of each token, head by head, x_{t-2}, x_{t-1} and x_t side
    by side. start (B, S) bool: a document begins here, and sees zeros before it."""
    taps = [x[:, :-2], x[:, 1:-1], x[:, 2:]]
    if start is not None:
        taps[:2] = [tap.masked_fill(hidden, 0) for tap, hidden in zip(taps, out_of_sight(start))]
    return torch.cat([tap.unflatten(-1, (H, -1)) for tap in taps], -1)


def convolve(x, w, b, start=None):
    """Both convolutions, as one: w (H, d, 3d), b (H, d). x (B, S + 2, C) as in shifted -> (B, S, C). One product a head."""
    taps = shifted(x, len(w), start)                                # (B, S, H, 3d)
    y = torch.baddbmm(b[:, None].to(x.dtype), taps.flatten(0, 1).transpose(0, 1), w.mT.to(x.dtype))    # (H, B S, d)
    return y.transpose(0, 1).reshape(len(x), -1, b.numel())


# ---- step 3 ----

def qk_mean(q, k):
    """Means of the PRE-convolution latents. q (B, S, Hq, d), k (B, S, Hk, d) -> m_q, m_k of the same shapes."""
    q = q.unflatten(2, (k.shape[2], -1))                            # (B, S, Hk, G, d): query head h belongs to KV head h // G
    m_q = (q + k[:, :, :, None]) / 2
    return m_q.flatten(2, 3), m_q.mean(3)


# ---- step 4 ----

def norm(x, length):
    """Each head of x (B, S, H, d) to the length (H), in x's dtype; a zero vector stays zero instead of 0 / 0."""
    eps = torch.finfo(x.dtype).eps
    return x * (length[:, None] / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps))


def lengths(temperature, Hq, d):
    """The length of each head, (Hq + Hk): sqrt(d) for queries, T sqrt(d) for keys. temperature (Hk)."""
    T = wide(temperature)
    return d ** 0.5 * torch.cat([T.new_ones(Hq), T])


# ---- step 5 ----

def rope_table(positions, dim, base):
    """cos and sin of position * base^(-2i / dim) for i < dim / 2. positions (..., S) int -> two (..., S, dim / 2) float32."""
    frequency = base ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """Rotate pairs (x_i, x_{i + n}) by their angle; dims past 2n pass unrotated. x (B, S, H, d), cos and sin (B, S, n)."""
    n = cos.shape[-1]
    cos, sin = cos[..., None, :], sin[..., None, :]                 # (B, S, 1, n): the same for every head
    a, b, rest = x[..., :n], x[..., n:2 * n], x[..., 2 * n:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


# ---- steps 2 to 5 in a row ----

def mix(qk, past, w1, b1, w2, b2, temperature, cos, sin, start=None):
    """From the projected qk = [q~; k~] (B, S, C) to q (B, Hq, S, d) and k (B, Hk, S, d), in qk's dtype.

    past (B, 2, C): the two columns before qk; None at the start of a sequence. w1, b1 and w2, b2: weights and biases of the
    two convolutions, as above. temperature (Hk). cos, sin (B or 1, S, n) of rope_table. start (B, S) bool or None: as in CCA.forward."""
    (B, S, C), d, Hk = qk.shape, w2.shape[1], len(temperature)
    Hq = C // d - Hk
    # 2. Two kernels of 2 eat two columns of padding, the past. At the start of a sequence it is zero, and since it stands
    # BEFORE the first convolution, what the second one sees of it is not zero, but the first one's bias.
    z = convolve(padded(past, qk), *one_convolution(w1, b1, w2, b2), start)                             # (B, S, C)
    # 3 to 5 in float32: here small errors would bend every attention logit. Queries and keys go together.
    heads = lambda t: wide(t).unflatten(-1, (Hq + Hk, d))           # (B, S, Hq + Hk, d)
    z = heads(z) + torch.cat(qk_mean(*heads(qk).split([Hq, Hk], 2)), 2)
    y = rope(norm(z, lengths(temperature, Hq, d)), cos, sin)
    return y.to(qk.dtype).transpose(1, 2).split([Hq, Hk], 1)


class CCA(nn.Module):
    """The attention of layer `layer`. forward: x (B, S, E) -> (B, S, E), causal."""

    def __init__(self, config, layer):
        super().__init__()
        E, d, self.Hq, self.Hk = config.n_embd, config.head_dim, config.n_head, config.n_kv_head
        C = (self.Hq + self.Hk) * d
        self.layer, self.head_dim, self.kernel = layer, d, config.kernel
        self.q_proj = nn.Linear(E, self.Hq * d, bias=False)                    # W_Q
        self.k_proj = nn.Linear(E, self.Hk * d, bias=False)                    # W_K
        self.v_proj = nn.Linear(E, self.Hk * d // 2, bias=False)               # W_V1, sees this token
        self.v_proj_delayed = nn.Linear(E, self.Hk * d // 2, bias=False)       # W_V2, sees the token before
        self.o_proj = nn.Linear(self.Hq * d, E, bias=False)                    # W_O
        self.conv_depthwise_weight = nn.Parameter(torch.empty(C, 1, 2))
        self.conv_depthwise_bias = nn.Parameter(torch.empty(C))
        self.conv_grouped_weight = nn.Parameter(torch.empty(C, d, 2))
        self.conv_grouped_bias = nn.Parameter(torch.empty(C))
        self.temperature = nn.Parameter(torch.empty(self.Hk))                  # T

    def down_weight(self):
        """[W_Q; W_K; W_V1; W_V2], (C + Hk d, E)."""
        return torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, self.v_proj_delayed.weight])

    def forward(self, x, cos, sin, mask=None, start=None, cache=None):
        """x (B, S, E) -> (B, S, E). cos, sin (B or 1, S, n) from rope_table.
        mask: bool, what each token may attend to, (B or 1, 1, S, P); None: itself and all before it.
        start (B, S) bool: a document begins here, and nothing of what lies before it may be seen (packed windows).
        cache: a Cache whose begin() was called."""
        B, S, _ = x.shape
        Hq, Hk, d = self.Hq, self.Hk, self.head_dim
        # 1. Down into the latents, all four in one product.
        qk, v, v_delayed = F.linear(x, self.down_weight()).split([(Hq + Hk) * d, Hk * d // 2, Hk * d // 2], -1)         # (B, S, .) each
        # What came before this chunk: zeros at the start of a sequence, else the cache's constant-size state.
        if cache is None:
            qk_past, v_past = None, v.new_zeros(B, 1, v.shape[-1])
        else:
            qk_past, v_past = cache.conv[self.layer].to(qk.dtype), cache.value[self.layer].to(v.dtype)
        v_padded = torch.cat([v_past, v_delayed], 1)                           # (B, S + 1, Hk d / 2), from t = -1
        # 2 to 5. Convolutions, QK-mean, norm and RoPE: in one kernel, or with the gradient by hand, or plainly.
        if usable(self.kernel, qk.device.type, qk.dtype, d, cos.shape[-1]):
            mixer = cca_mix
        else:
            mixer = fused.mix if fused.wanted() and qk.dtype == wide(qk).dtype else mix          # fused.mix takes no bf16
        q, k = mixer(qk, qk_past, self.conv_depthwise_weight, self.conv_depthwise_bias, self.conv_grouped_weight,
                     self.conv_grouped_bias, self.temperature, cos, sin, start)                        # (B, H, S, d) each
        # 6. Values: half of the latent sees this token, the other half the one before. 2 KV heads: one head each.
        v_before = v_padded[:, :-1]                                            # (B, S, Hk d / 2)
        if start is not None:
            v_before = v_before.masked_fill(start[..., None], 0)
        v = torch.cat([v, v_before], -1).unflatten(-1, (Hk, -1))               # (B, S, Hk, d)
        # 7. Attend in the latent: (B, H, S, d) is the layout of scaled_dot_product_attention.
        v = v.transpose(1, 2)
        if cache is not None:
            cache.remember(self.layer, qk_past, qk, v_padded)
            k, v = cache.append(self.layer, k, v)                              # now (B, Hk, P, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True,
                                           is_causal=mask is None and S > 1)   # scale 1 / sqrt(d) is its default
        return self.o_proj(y.transpose(1, 2).flatten(-2))                      # (B, S, Hq d) -> (B, S, E)


class Cache:
    """All that generation must keep of the past, preallocated for every layer.

        k, v   (layers, B, Hk, capacity, d)   the compressed keys (normed, rotated) and values
        conv   (layers, B, 2, C) float32      the last two columns of [q~; k~] before the convolutions
        value  (layers, B, 1, Hk d / 2) f32   the last token's delayed value, which belongs to the next token

    Only k and v grow with the context, by 2 Hk d numbers a token and layer: 512 in the 8B model against 4096 for full
    attention. Rows may have different lengths: `lengths` counts the tokens each row holds. A forward goes
    begin(S, n_new) once -> remember(layer, ...), append(layer, ...) in each layer -> end() once.
    """

    def __init__(self, config, batch_size, capacity, device=None, dtype=torch.float32):
        L, Hk, d = config.n_layer, config.n_kv_head, config.head_dim
        zeros = lambda *shape, dtype: torch.zeros(L, batch_size, *shape, device=device, dtype=dtype)
        self.k, self.v = zeros(Hk, capacity, d, dtype=dtype), zeros(Hk, capacity, d, dtype=dtype)
        self.conv = zeros(2, (config.n_head + Hk) * d, dtype=torch.float32)
        self.value = zeros(1, Hk * d // 2, dtype=torch.float32)
        self.lengths = [0] * batch_size                        # plain ints: no question to the GPU is needed to know them

    def begin(self, S, n_new=None):
        """S columns of new tokens arrive, of which row b's first n_new[b] are real (default all S). Returns the new
        tokens' positions, (B or 1, S) int64, and the mask: which cached positions each may see, (B or 1, 1, S, P) or None.
        Raises ValueError if a row would outgrow the capacity."""
        self.n_new = [S] * len(self.lengths) if n_new is None else list(n_new)
        self.P = max(length + n for length, n in zip(self.lengths, self.n_new))
        if self.P > self.k.shape[3]:
            raise ValueError(f'the cache holds {self.k.shape[3]} positions, this forward needs {self.P}: '
                             'make it with a larger capacity')
        device = self.k.device
        # Rows in step (same length, no padding) need no index arithmetic, and often no mask.
        self.in_step = len(set(self.lengths)) == 1 and all(n == S for n in self.n_new)
        start = torch.tensor(self.lengths[:1] if self.in_step else self.lengths, device=device)     # (1) or (B)
        positions = start[:, None] + torch.arange(S, device=device)                                 # (B or 1, S)
        if self.in_step and (S == 1 or self.lengths[0] == 0):
            mask = None                                        # one token sees all; a fresh prefill is plainly causal
        else:                                                  # a token sees itself and what lies before it
            mask = (torch.arange(self.P, device=device) <= positions[..., None])[:, None]           # (B or 1, 1, S, P)
        if not self.in_step:
            self.last = torch.tensor(self.n_new, device=device)                                     # (B)
            self.row, self.column = (torch.arange(S, device=device) < self.last[:, None]).nonzero(as_tuple=True)
            self.target = positions[self.row, self.column]     # real token (row, column) goes to this cache position
        return positions, mask

    def remember(self, layer, qk_past, qk, v_padded):
        """Keep the newest two columns of qk_past (B, 2, C) and qk (B, S, C), and the newest delayed value of v_padded (B, S + 1, .).
        Of a single new token, one column of the past stays."""
        if self.in_step:
            self.conv[layer], self.value[layer] = padded(qk_past, qk[:, -2:])[:, -2:], v_padded[:, -1:]
        else:                                                  # with the past in front, row b's newest sits at n_new[b]
            b = torch.arange(len(self.last), device=self.last.device)
            self.conv[layer] = padded(qk_past, qk)[b[:, None], self.last[:, None] + torch.arange(2, device=b.device)]
            self.value[layer] = v_padded[b, self.last][:, None]

    def append(self, layer, k, v):
        """Store the new k and v (B, Hk, S, d); return all of them, (B, Hk, P, d) views."""
        for store, new in (self.k[layer], k), (self.v[layer], v):
            if self.in_step:
                store[:, :, self.lengths[0]:self.P] = new
            else:                                              # padding is not written, so it can never be seen
                store[self.row, :, self.target] = new[self.row, :, self.column].to(store.dtype)
        return self.k[layer, :, :, :self.P].to(k.dtype), self.v[layer, :, :, :self.P].to(v.dtype)

    def layers(self):
        """For one new token a row, the same layer by layer: lists of conv (B, 2, C), value (B, Hk d / 2) and append, a function
        of the new k and v (B, Hk, d) that returns all of them, (B Hk, P, d) views."""
        if self.in_step:
            new_k, new_v = (t[:, :, :, self.P - 1].unbind() for t in (self.k, self.v))                  # (B, Hk, d) each
        ks, vs = (t[:, :, :, :self.P].flatten(1, 2).unbind() for t in (self.k, self.v))                 # (B Hk, P, d) each

        def append(layer, k, v):
            if self.in_step:
                new_k[layer].copy_(k)
                new_v[layer].copy_(v)
            else:
                self.k[layer, self.row, :, self.target] = k.to(self.k.dtype)
                self.v[layer, self.row, :, self.target] = v.to(self.v.dtype)
            return ks[layer], vs[layer]

        return self.conv.unbind(), self.value[:, :, 0].unbind(), [partial(append, layer) for layer in range(len(ks))]

    def end(self):
        self.lengths = [length + n for length, n in zip(self.lengths, self.n_new)]

    def keep(self, rows):
        """Keep only these rows (a list of ints), in this order: finished rows leave the batch."""
        index = torch.tensor(rows, device=self.k.device)
        self.k, self.v, self.conv, self.value = (t[:, index] for t in (self.k, self.v, self.conv, self.value))
        self.lengths = [self.lengths[row] for row in rows]
