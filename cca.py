"""CCA, Compressed Convolutional Attention: attention inside a compressed latent space.

The idea. Multi-head attention projects each token of width E to full-width queries, keys and values. CCA projects to
smaller latents (8B model: E = 2048, query latent 1024, key and value latents 256 each), attends in them, and projects
back to E at the end. Parameters and attention FLOPs shrink, and the KV cache is 8 times smaller. Two small causal
convolutions, a query-key mean and a value shift recover the expressiveness that the compression loses.

For a token x_t, after RMSNorm (CCA paper, arXiv 2510.04476, II-B and listing A.1):

    1. project        q~ = W_Q x,   k~ = W_K x
    2. convolve       [q; k] = conv_grouped(conv_depthwise([q~; k~]))      both causal, kernel size 2
    3. QK-mean        m_q = (q~ + k~ of the head's KV group) / 2,  m_k = mean of m_q over the group's query heads
                      q += m_q,  k += m_k
    4. norm           q <- sqrt(d) q / |q|,   k <- T sqrt(d) k / |k|       T: learned scale, one per KV head
    5. RoPE           rotate the first 2n = d / 2 dims of each head by the position
    6. value shift    v_t = [W_V1 x_t ; W_V2 x_{t-1}]                      x_{-1} = 0
    7. attend         softmax(q k^T / sqrt(d)) v, causal, then W_O back to width E

The keys are scaled by T, not by exp(T) as in the paper: attention logits then grow only linearly in T (ZAYA1-8B report,
arXiv 2605.05365, App. C). Steps 2 to 5 are one function, `mix`, which a fused kernel can replace (kernels/).

Legend:  B batch   S sequence (new tokens)   P positions attended to   E residual width
         Hq, Hk query / KV heads   H = Hq + Hk   G = Hq / Hk   d head dim   n rotated pairs   C = H d channels
"""
import torch
import torch.nn.functional as F
from torch import nn

from layers import bf16_matmuls, upcast


# ---- step 2 ----
def merge_convolutions(w1, b1, w2, b2):
    """Return weight (H, d, 3d) and bias (H, d), float32, of the one convolution of kernel size 3 that equals the two in
    sequence. The three taps of the weight are concatenated, oldest first.

    w1 (C, 1, 2), b1 (C): depthwise; w2 (C, d, 2), b2 (C): grouped, one group per head; laid out as in nn.Conv1d. With
    taps w_old, w_new of w1 and W_old, W_new of w2, and u = [q~; k~]:

        a_t = w_old u_{t-1} + w_new u_t + b1                        within each channel
        y_t = W_old a_{t-1} + W_new a_t + b2                        within the d channels of a head
            = W_old w_old u_{t-2} + (W_old w_new + W_new w_old) u_{t-1} + W_new w_new u_t  +  (W_old + W_new) b1 + b2"""
    C, d, _ = w2.shape
    w1, b1, w2, b2 = map(upcast, (w1, b1, w2, b2))              # merge in float32; the caller casts the result
    w_old, w_new = w1.view(C // d, 1, d, 2).unbind(-1)              # (H, 1, d): one factor per input channel
    W_old, W_new = w2.view(C // d, d, d, 2).unbind(-1)              # (H, d, d)
    weight = torch.cat([W_old * w_old, W_old * w_new + W_new * w_old, W_new * w_new], -1)
    return weight, ((W_old + W_new) @ b1.view(-1, d, 1))[..., 0] + b2.view(-1, d)


def document_boundary_masks(start):
    """Return two masks, (B, S) bool: where x_{t-2} and where x_{t-1} belong to an earlier document than x_t.
    start (B, S) bool: True at the first token of a document."""
    return start | F.pad(start, (1, 0))[:, :-1], start


# ---- step 3 ----
def qk_mean(q, k):
    """Return m_q, m_k of the latents BEFORE the convolutions. q (Hq, ...), k (Hk, ...) -> the same shapes."""
    q = q.unflatten(0, (len(k), -1))                              # (Hk, G, ...): query head h belongs to KV head h // G
    m_q = (q + k[:, None]) / 2
    return m_q.flatten(0, 1), m_q.mean(1)


# ---- step 4 ----
def norm(x, size):
    """Scale the vectors of head h to norm size[h]. x (H, B, S, d), size (H). A zero vector stays zero, not 0 / 0."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).eps)     # (H, B, S, 1)
    return x * (size[:, None, None, None] / length)


# ---- step 5 ----
def rope_table(positions, dim, base):
    """Return cos and sin of position * base^(-2i / dim), i < dim / 2: (..., S, dim / 2) float32 each.
    positions (..., S) int."""
    frequency = base ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + n}), i < n; dims from 2n on stay. x (H, B, S, d); cos, sin (B or 1, S, n)."""
    n = cos.shape[-1]
    a, b, rest = x[..., :n], x[..., n:2 * n], x[..., 2 * n:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


# ---- steps 2 to 5 ----
def mix(qk, past, w1, b1, w2, b2, temperature, cos, sin, start=None):
    """Return the queries (B, Hq, S, d) and keys (B, Hk, S, d), in qk's dtype. qk (B, S, C): the projections [q~; k~].

    past (B, 2, C): qk of the two tokens before; None at the start of a sequence. w1 to b2: see merge_convolutions.
    temperature (Hk): T. cos, sin (B or 1, S, n): from rope_table. start (B, S) bool or None: see CCA.forward."""
    (B, S, C), d, Hk = qk.shape, w2.shape[1], len(temperature)
    H, Hq = C // d, C // d - Hk
    # 2. Kernel size 3 reads two past tokens. At the start of a sequence, zeros are padded before the first convolution
    # only, so that the second one reads b1 at t = -1, not zero.
    x = F.pad(qk, (0, 0, 2, 0)) if past is None else torch.cat([past, qk], 1)   # (B, S + 2, C)
    x = x.unflatten(-1, (H, d)).permute(2, 0, 1, 3)                         # (H, B, S + 2, d), heads first from here
    taps = [x[:, :, :-2], x[:, :, 1:-1], x[:, :, 2:]]                           # x_{t-2}, x_{t-1}, x_t
    if start is not None:
        taps[:2] = [tap.masked_fill(other[..., None], 0) for tap, other in zip(taps, document_boundary_masks(start))]
    weight, bias = (t.to(qk.dtype) for t in merge_convolutions(w1, b1, w2, b2))
    taps = torch.cat(taps, -1).flatten(1, 2)                                    # (H, B S, 3d)
    z = torch.baddbmm(bias[:, None], taps, weight.mT).view(H, B, S, d)          # one product per head
    # 3 to 5. In float32, since errors here affect every attention logit. Queries and keys are processed together.
    z = upcast(z) + torch.cat(qk_mean(*upcast(x[:, :, 2:]).split([Hq, Hk])))
    size = d ** 0.5 * F.pad(upcast(temperature), (Hq, 0), value=1.0)      # (H): sqrt(d) for queries, T sqrt(d) for keys
    q, k = rope(norm(z, size), cos, sin).to(qk.dtype).split([Hq, Hk])           # (Hq or Hk, B, S, d)
    return q.transpose(0, 1), k.transpose(0, 1)


class CCA(nn.Module):
    """Causal attention of layer `layer`. forward: x (B, S, E) -> (B, S, E)."""

    def __init__(self, config, layer):
        super().__init__()
        E, d, self.Hq, self.Hk = config.n_embd, config.head_dim, config.n_head, config.n_kv_head
        C = (self.Hq + self.Hk) * d
        self.layer, self.head_dim, self.mix = layer, d, mix
        self.q_proj = nn.Linear(E, self.Hq * d, bias=False)                     # W_Q
        self.k_proj = nn.Linear(E, self.Hk * d, bias=False)                     # W_K
        self.v_proj = nn.Linear(E, self.Hk * d // 2, bias=False)                # W_V1, of this token
        self.v_proj_delayed = nn.Linear(E, self.Hk * d // 2, bias=False)        # W_V2, of the previous token
        self.o_proj = nn.Linear(self.Hq * d, E, bias=False)                     # W_O
        self.conv_depthwise_weight = nn.Parameter(torch.empty(C, 1, 2))         # w1
        self.conv_depthwise_bias = nn.Parameter(torch.empty(C))                 # b1
        self.conv_grouped_weight = nn.Parameter(torch.empty(C, d, 2))           # w2
        self.conv_grouped_bias = nn.Parameter(torch.empty(C))                   # b2
        self.temperature = nn.Parameter(torch.empty(self.Hk))                   # T

    def project(self, x):
        """x (..., E) -> [q~; k~; W_V1 x; W_V2 x] (..., C + Hk d), in one matmul."""
        W = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, self.v_proj_delayed.weight])
        return F.linear(x, W)

    def forward(self, x, cos, sin, mask=None, start=None, cache=None):
        """x (B, S, E) -> (B, S, E). cos, sin (B or 1, S, n): from rope_table.
        mask (B or 1, 1, S, P) bool: True where a token may attend; None: plain causal attention.
        start (B, S) bool: True at the first token of a document (packed sequences). Convolutions and value shift do not
            read tokens of earlier documents; mask must do the same for attention.
        cache: a Cache after its reserve()."""
        Hq, Hk, d = self.Hq, self.Hk, self.head_dim
        qk, v1, v2 = self.project(x).split([(Hq + Hk) * d, Hk * d // 2, Hk * d // 2], -1)         # 1. Project.
        # The state of the past tokens: None or zero at the start of a sequence, else from the cache.
        past, v_last = None, v2.new_zeros(len(v2), 1, v2.shape[-1])
        if cache is not None:
            past, v_last = cache.qk[self.layer].to(qk.dtype), cache.v_last[self.layer].to(v2.dtype)
        v2 = torch.cat([v_last, v2], 1)                                         # (B, S + 1, Hk d / 2), from t = -1
        # 2 to 5. Convolutions, QK-mean, norm, RoPE.
        q, k = self.mix(qk, past, self.conv_depthwise_weight, self.conv_depthwise_bias, self.conv_grouped_weight,
                        self.conv_grouped_bias, self.temperature, cos, sin, start)       # (B, Hq or Hk, S, d)
        # 6. Value shift. With 2 KV heads, head 0 has the values of this token, head 1 those of the previous one.
        v2_shifted = v2[:, :-1] if start is None else v2[:, :-1].masked_fill(start[..., None], 0)  # (B, S, Hk d / 2)
        v = torch.cat([v1, v2_shifted], -1).unflatten(-1, (Hk, d)).transpose(1, 2)         # (B, Hk, S, d)
        # 7. Attend, scale 1 / sqrt(d); each KV head serves G query heads.
        if cache is not None:
            k, v = cache.update(self.layer, torch.cat([past, qk], 1), v2, k, v)     # (B, Hk, P, d)
        if v.device.type == 'cpu' and bf16_matmuls():
            q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()                  # faster here than float32 attention
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2).to(qk.dtype))           # (B, S, Hq d) -> (B, S, E)
