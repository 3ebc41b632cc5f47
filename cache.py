"""The cache: all that generation must keep of the past, so that a new token need not read the old ones again.

Attention looks back at every token before, but needs of each only its key and value, and in CCA (cca.py) these are
small: 2 Hk d numbers a token and layer, 512 in the 8B model against 4096 for full multi-head attention. Beside them
each layer keeps a state of constant size: what the convolutions and the value shift still need of the last tokens.

    k, v     (B, Hk, capacity + 1, d)   keys, normed and rotated, and values; the last place is for padding
    qk       (B, 2, C) float32          the last two columns of [q~; k~], before the convolutions
    v_last   (B, 1, Hk d / 2) float32   the last token's delayed value, which belongs to the next token

Rows hold prompts of different lengths. A forward over S new columns, of which row b's first n_new[b] are real and the
rest padding, is

    positions, mask = cache.reserve(S, n_new)                     once
    cache.qk[layer], cache.v_last[layer]                        in each layer: the past to go on from, then
    k, v = cache.update(layer, qk, v_delayed, k, v)             the new columns are taken in; k and v are now all
    cache.commit()                                                 once

Legend:  B rows   S new columns   P positions looked at   Hk KV heads   d head dim   C convolution channels
"""
import torch
import torch.nn.functional as F


class Cache:
    """Make it empty, for B rows of at most `capacity` tokens each. dtype: of k and v."""

    def __init__(self, config, B, capacity, device=None, dtype=torch.float32):
        Hk, d = config.n_kv_head, config.head_dim
        zeros = lambda *shape, dtype: [torch.zeros(B, *shape, device=device, dtype=dtype)
                                       for _ in range(config.n_layer)]
        self.k, self.v = zeros(Hk, capacity + 1, d, dtype=dtype), zeros(Hk, capacity + 1, d, dtype=dtype)
        self.qk = zeros(2, (config.n_head + Hk) * d, dtype=torch.float32)
        self.v_last = zeros(1, Hk * d // 2, dtype=torch.float32)
        self.lengths, self.capacity, self.device = [0] * B, capacity, device   # lengths: how many tokens each row holds

    def reserve(self, S, n_new=None, whole=False):
        """Announce S new columns, of which row b's first n_new[b] are real (None: all). Return the columns' positions,
        (B, S) int64, and the mask: which positions each may see, (B, 1, S, P) bool; None if it is plainly causal.
        whole: look at the whole capacity, masked, so that no shape changes from step to step (decode.compiled).
        Raises ValueError if a row would outgrow the capacity."""
        self.n_new = [S] * len(self.lengths) if n_new is None else list(n_new)
        needed = max(length + n for length, n in zip(self.lengths, self.n_new))
        if needed > self.capacity:
            raise ValueError(f'the cache holds {self.capacity} positions, this forward needs {needed}: '
                             'make it with a larger capacity')
        fresh = S > 1 and not any(self.lengths)                 # nothing is held: attention is among the new columns
        self.P = None if fresh else self.capacity if whole else needed
        self.rows = torch.arange(len(self.lengths), device=self.device)[:, None]               # (B, 1)
        columns = torch.arange(S, device=self.device)
        positions = torch.tensor(self.lengths, device=self.device)[:, None] + columns          # (B, S)
        self.target, self.newest = positions, None              # where keys and values go; for the newest see update
        if n_new is not None:
            n = torch.tensor(self.n_new, device=self.device)[:, None]                          # (B, 1)
            self.target = torch.where(columns < n, positions, self.capacity)                   # padding: the last place
            self.newest = n + torch.arange(2, device=self.device)                              # (B, 2)
        if fresh:
            return positions, None
        return positions, (torch.arange(self.P, device=self.device) <= positions[..., None])[:, None]

    def update(self, layer, qk, v_delayed, k, v):
        """Take in the new columns of a layer. Return the keys and values to attend to, (B, Hk, P, d) each.
        k, v (B, Hk, S, d). qk (B, S + 2, C) and v_delayed (B, S + 1, Hk d / 2) begin with the past."""
        if self.newest is None:                                 # no padding: the newest are the last
            qk, v_delayed = qk[:, -2:], v_delayed[:, -1:]
        else:                                                   # the past is in front: row b's newest are at n_new[b]
            qk, v_delayed = qk[self.rows, self.newest], v_delayed[self.rows, self.newest[:, :1]]
        self.qk[layer].copy_(qk)
        self.v_last[layer].copy_(v_delayed)
        for store, new in (self.k[layer], k), (self.v[layer], v):
            store[self.rows, :, self.target] = new.transpose(1, 2).to(store.dtype)
        return [k, v] if self.P is None else [store[layer][:, :, :self.P].to(k.dtype) for store in (self.k, self.v)]

    def commit(self):
        """Count the new tokens as held."""
        self.lengths = [length + n for length, n in zip(self.lengths, self.n_new)]

    def keep(self, rows):
        """Keep only these rows (a list of ints), in this order, or more than once: finished rows leave the batch."""
        index = torch.tensor(rows, device=self.device)
        for name in 'k', 'v', 'qk', 'v_last':
            setattr(self, name, [t[index] for t in getattr(self, name)])
        self.lengths = [self.lengths[row] for row in rows]

    def grow(self, capacity):
        """Make room for rows of `capacity` tokens."""
        for store in self.k, self.v:
            store[:] = [F.pad(t, (0, 0, 0, max(0, capacity - self.capacity))) for t in store]
        self.capacity = max(self.capacity, capacity)

    def mark(self):
        """Return what `rewind` needs to forget all tokens that will come after those held now."""
        return list(self.lengths), [t.clone() for t in self.qk + self.v_last]

    def rewind(self, mark):
        self.lengths = list(mark[0])
        for t, was in zip(self.qk + self.v_last, mark[1]):
            t.copy_(was)
