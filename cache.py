"""The generation cache: keys, values and convolution state, so that past tokens are not recomputed.

Attention needs the key and the value of every past token. In CCA (cca.py) they are small: 2 Hk d elements per token and
layer, 512 in the 8B model against 4096 for full multi-head attention. In addition, each layer keeps a state of constant
size: what the convolutions and the value shift need of the last two tokens.

    k, v     (B, Hk, capacity + 1, d)   keys after norm and RoPE, and values; the last position takes padding
    qk       (B, 2, C) float32          [q~; k~] of the last two tokens, before the convolutions
    v_last   (B, 1, Hk d / 2) float32   the last token's W_V2 x, which is half of the next token's value

The sequences of a batch may have different lengths. A forward pass takes S new tokens per sequence; in sequence b the
first n_new[b] are real and the rest is padding:

    positions, mask = cache.reserve(S, n_new)                   once per forward pass
    cache.qk[layer], cache.v_last[layer]                        per layer: read the state before the new tokens
    k, v = cache.update(layer, qk, v2, k, v)                    per layer: store the new; k, v now include the past
    cache.commit()                                              once per forward pass

Symbols such as q~, W_V2: see cca.py. Legend:  B sequences   S new tokens   P positions attended to   Hk KV heads
         d head dim   C convolution channels
"""
import torch
import torch.nn.functional as F


class Cache:
    """An empty cache for B sequences of at most `capacity` tokens each. dtype: of k and v."""

    def __init__(self, config, B, capacity, device=None, dtype=torch.float32):
        Hk, d = config.n_kv_head, config.head_dim
        zeros = lambda dtype, *shape: [torch.zeros(B, *shape, dtype=dtype, device=device)
                                       for _ in range(config.n_layer)]
        self.k, self.v = (zeros(dtype, Hk, capacity + 1, d) for _ in range(2))
        self.qk = zeros(torch.float32, 2, (config.n_head + Hk) * d)
        self.v_last = zeros(torch.float32, 1, Hk * d // 2)
        self.lengths, self.capacity, self.device = [0] * B, capacity, device    # lengths: cached tokens per sequence

    def reserve(self, S, n_new=None, whole=False):
        """Prepare for S new tokens per sequence, of which the first n_new[b] are real (None: all). Return their
        positions, (B, S) int64, and the attention mask, (B, 1, S, P) bool, or None if plain causal attention suffices.
        whole: P is the capacity, so that shapes are the same in every step (decode.compiled).
        Raises ValueError if a sequence would exceed the capacity."""
        self.n_new = [S] * len(self.lengths) if n_new is None else list(n_new)
        needed = max(length + n for length, n in zip(self.lengths, self.n_new))
        if needed > self.capacity:
            raise ValueError(f'the cache holds {self.capacity} positions, this forward needs {needed}: '
                             'make it with a larger capacity')
        causal = S > 1 and not any(self.lengths)                # no past; S = 1 is handled as a decode step
        self.P = None if causal else self.capacity if whole else needed
        self.rows = torch.arange(len(self.lengths), device=self.device)[:, None]               # (B, 1), b for indexing
        t = torch.arange(S, device=self.device)
        positions = torch.tensor(self.lengths, device=self.device)[:, None] + t                # (B, S)
        self.target, self.newest = positions, None              # write index of k, v; index of the next state
        if n_new is not None:
            n = torch.tensor(self.n_new, device=self.device)[:, None]                          # (B, 1)
            self.target = torch.where(t < n, positions, self.capacity)                         # padding: last position
            self.newest = n + torch.arange(2, device=self.device)                              # (B, 2)
        if causal:
            return positions, None
        return positions, (torch.arange(self.P, device=self.device) <= positions[..., None])[:, None]

    def update(self, layer, qk, v2, k, v):
        """Store a layer's new tokens. Return the keys and values to attend to, (B, Hk, P, d) each.
        k, v (B, Hk, S, d): new tokens only. qk (B, S + 2, C), v2 (B, S + 1, Hk d / 2): the old state, then the new
        tokens; the next state starts at index n_new[b]."""
        if self.newest is None:                                 # no padding: the state is at the end
            qk, v2 = qk[:, -2:], v2[:, -1:]
        else:
            qk, v2 = qk[self.rows, self.newest], v2[self.rows, self.newest[:, :1]]
        self.qk[layer].copy_(qk)
        self.v_last[layer].copy_(v2)
        for store, new in (self.k[layer], k), (self.v[layer], v):
            store[self.rows, :, self.target] = new.transpose(1, 2).to(store.dtype)
        return [k, v] if self.P is None else [store[layer][:, :, :self.P].to(k.dtype) for store in (self.k, self.v)]

    def commit(self):
        """Add the new tokens to the lengths, after all layers have stored them."""
        self.lengths = [length + n for length, n in zip(self.lengths, self.n_new)]

    def keep(self, rows):
        """Keep only the sequences `rows` (a list of batch indices), in that order; an index may repeat."""
        index = torch.tensor(rows, device=self.device)
        for name in 'k', 'v', 'qk', 'v_last':
            setattr(self, name, [t[index] for t in getattr(self, name)])
        self.lengths = [self.lengths[row] for row in rows]

    def grow(self, capacity):
        """Increase the capacity to `capacity` tokens per sequence."""
        for store in self.k, self.v:
            store[:] = [F.pad(t, (0, 0, 0, max(0, capacity - self.capacity))) for t in store]
        self.capacity = max(self.capacity, capacity)

    def mark(self):
        """Return a copy of the lengths and the state, with which `rewind` drops all tokens added later."""
        return list(self.lengths), [t.clone() for t in self.qk + self.v_last]

    def rewind(self, mark):
        self.lengths = list(mark[0])
        for t, saved in zip(self.qk + self.v_last, mark[1]):
            t.copy_(saved)
