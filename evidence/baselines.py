"""Baseline attention modules that replace CCA: `with replaced('model', CCA=GQA): ...`.

    GQA     grouped-query attention (arXiv 2305.13245): q, k, v = W x; Hq / Hk queries share a key and a value. With
            Hk = Hq it is multi-head attention (MHA)
    MLA     multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads are projected from
            one latent c, and all heads share a rotated key k_R. Only these two are cached:
            [c; k_R] = W_D x,    k = [k_R; W_UK RMSNorm(c)],    v = W_UV RMSNorm(c)

Both normalize queries and keys as CCA does, so that the norm is not what is compared. They have CCA.forward's
interface, including the mask and rotation of packed documents, but do not use the cache.

GPT is a whole model, for the speedrun (speedrun.py): a plain transformer of nanoGPT's kind, with learned positions,
LayerNorm, multi-head attention, a GELU MLP of width 4 E, and tied embeddings.

Legend:  B batch   S sequence   E residual width   Hq, Hk query / KV heads   d head dim
"""
import torch
import torch.nn.functional as F
from torch import nn

from cca import norm, rope
from layers import RMSNorm, upcast


def attend(q, k, v, temperature, cos, sin, mask):
    """Apply steps 4, 5 and 7 of cca.py. q (Hq, B, S, d), k (Hk, B, S, d), v (B, Hk, S, d) -> (B, S, Hq d)."""
    d = q.shape[-1]
    q = rope(norm(upcast(q), q.new_full((len(q),), d ** 0.5)), cos, sin).to(v.dtype).transpose(0, 1)
    k = rope(norm(upcast(k), d ** 0.5 * temperature), cos, sin).to(v.dtype).transpose(0, 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2).flatten(-2)


class GQA(nn.Module):
    """Grouped-query attention of one layer. forward: x (B, S, E) -> (B, S, E), causal; see CCA.forward."""

    def __init__(self, config, layer):
        super().__init__()
        E, d, self.Hq, self.Hk = config.n_embd, config.head_dim, config.n_head, config.n_kv_head
        self.qkv_proj = nn.Linear(E, (self.Hq + 2 * self.Hk) * d, bias=False)
        self.o_proj = nn.Linear(self.Hq * d, E, bias=False)
        self.temperature = nn.Parameter(torch.empty(self.Hk))

    def forward(self, x, cos, sin, mask=None, start=None, cache=None):
        heads = self.qkv_proj(x).unflatten(-1, (self.Hq + 2 * self.Hk, -1)).permute(2, 0, 1, 3)        # (H, B, S, d)
        q, k, v = heads.split([self.Hq, self.Hk, self.Hk])
        return self.o_proj(attend(q, k, v.transpose(0, 1), self.temperature, cos, sin, mask))


class MLA(nn.Module):
    """Multi-head latent attention of one layer. n_kv_head only sets the size of the cache, the 2 Hk d elements of c and
    k_R."""

    def __init__(self, config, layer):
        super().__init__()
        E, d, self.H, self.rotated = config.n_embd, config.head_dim, config.n_head, config.rope_dim
        self.c = 2 * config.n_kv_head * d - self.rotated
        self.q_proj = nn.Linear(E, self.H * d, bias=False)
        self.down_proj = nn.Linear(E, self.c + self.rotated, bias=False)                               # W_D
        self.latent_norm = RMSNorm(self.c, config.norm_eps)
        self.up_k = nn.Linear(self.c, self.H * (d - self.rotated), bias=False)                         # W_UK
        self.up_v = nn.Linear(self.c, self.H * d, bias=False)                                          # W_UV
        self.o_proj = nn.Linear(self.H * d, E, bias=False)
        self.temperature = nn.Parameter(torch.empty(self.H))

    def forward(self, x, cos, sin, mask=None, start=None, cache=None):
        heads = lambda t: t.unflatten(-1, (self.H, -1)).permute(2, 0, 1, 3)                            # (H, B, S, .)
        c, k_R = self.down_proj(x).split([self.c, self.rotated], -1)
        c = self.latent_norm(c)
        k = torch.cat([k_R.expand(self.H, *k_R.shape), heads(self.up_k(c))], -1)                       # (H, B, S, d)
        v = heads(self.up_v(c)).transpose(0, 1)                                                        # (B, H, S, d)
        return self.o_proj(attend(heads(self.q_proj(x)), k, v, self.temperature, cos, sin, mask))


class GPTBlock(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x)). x (B, S, E) -> (B, S, E)."""

    def __init__(self, E, H):
        super().__init__()
        self.H, self.norm1, self.norm2 = H, nn.LayerNorm(E, bias=False), nn.LayerNorm(E, bias=False)
        self.qkv_proj, self.o_proj = nn.Linear(E, 3 * E, bias=False), nn.Linear(E, E, bias=False)
        self.up_proj, self.down_proj = nn.Linear(E, 4 * E, bias=False), nn.Linear(4 * E, E, bias=False)

    def forward(self, x):
        q, k, v = self.qkv_proj(self.norm1(x)).unflatten(-1, (3, self.H, -1)).permute(2, 0, 3, 1, 4)   # (B, H, S, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).flatten(-2))
        return x + self.down_proj(F.gelu(self.up_proj(self.norm2(x))))


class GPT(nn.Module):
    """forward: tokens and targets (B, S) int64 -> the mean cross entropy, -1 ignored, a scalar in nats. Uses
    vocab_size, context, n_layer, n_embd and n_head of a ZayaConfig. Initialized as in GPT-2."""

    def __init__(self, config):
        super().__init__()
        E = config.n_embd
        self.embedding, self.position = nn.Embedding(config.vocab_size, E), nn.Embedding(config.context, E)
        self.blocks = nn.Sequential(*(GPTBlock(E, config.n_head) for _ in range(config.n_layer)))
        self.norm = nn.LayerNorm(E, bias=False)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                residual = name.endswith(('o_proj.weight', 'down_proj.weight'))
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5 if residual else 0.02)

    def forward(self, tokens, targets):
        x = self.embedding(tokens) + self.position.weight[:tokens.shape[1]]
        logits = self.norm(self.blocks(x)) @ self.embedding.weight.T             # (B, S, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
