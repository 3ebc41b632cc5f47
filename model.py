"""ZAYA1, the whole model: embedding -> 40 x (CCA attention, mixture of experts) -> norm -> tied output head.

    x = (embedding(token) + b) * a                              the residual stream, float32 all the way up
    for each layer:
        x = scale(x, CCA(RMSNorm(x)))                           cca.py; `scale`, residual scaling, is in layers.py
        x = scale(x, w expert_e(RMSNorm(x)))                    router.py picks one expert e a token, and its weight w
    logits = embedding^T RMSNorm(x)

    expert(x) = W_down (silu(gate) * up)   with   [gate; up] = W_gate_up x                      (SwiGLU)
    loss      = mean over the scored tokens of -log softmax(logits)[target]

Source: ZAYA1-8B report (arXiv 2605.05365), section II and Table I. Parameter names are this project's; checkpoint.py
maps them to those of the released weights.

Legend:  B batch   S sequence   T = B S tokens   E residual width   N experts   F expert width   R router width
         V vocabulary
"""
import zlib
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from cache import Cache
from cca import CCA, rope_table
from configurator import check_ranges
from layers import ResidualScaling, RMSNorm, bf16_inside, upcast
from router import Router


@dataclass
class ZayaConfig:
    """Every size of the model. The defaults are a small model that trains on a laptop."""
    vocab_size: int = 4096
    context: int = 256              # longest sequence, in tokens
    n_layer: int = 6
    n_embd: int = 256               # E, width of the residual stream
    n_head: int = 4                 # query heads; n_head * head_dim is the query latent, E / 2 here (C1 = 2)
    n_kv_head: int = 1              # key/value heads; the KV latent, E / 8 here (C2 = 8)
    head_dim: int = 32
    n_expert: int = 8
    expert_dim: int = 256           # F, width inside an expert, after the gate
    router_dim: int = 64            # R
    skip_expert: bool = False       # one more class that computes nothing; the released model has it
    rope_base: float = 10_000.0     # 10K at 4K context, 1M at 32K, 5M at 131K (report, III)
    rope_fraction: float = 0.5      # of each head's dims that are rotated
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self):
        check_ranges(self, **{field.name: (1, 10**9) for field in fields(self) if field.type is int} | dict(
            n_layer=(1, 1000), rope_base=(1, None), norm_eps=(1e-20, 1), init_std=(1e-9, 1)))
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})')
        if self.n_kv_head * self.head_dim % 2:
            raise ValueError('n_kv_head * head_dim must be even: half of the values come from the token before')
        if not 0 < self.rope_fraction <= 1 or self.rope_fraction * self.head_dim % 2:
            raise ValueError('rope_fraction must be 0 to 1, and times head_dim even: dims are rotated in pairs')
        if self.n_embd % 8 or self.expert_dim % 8:
            raise ValueError('n_embd and expert_dim must be multiples of 8: grouped products want rows of 16 bytes')

    @property
    def rope_dim(self):
        return int(self.head_dim * self.rope_fraction)

    @classmethod
    def zaya1_8b(cls):
        """The released model, 8.4B parameters of which 0.76B work on each token (report, Table I)."""
        return cls(vocab_size=262_272, context=131_072, n_layer=40, n_embd=2048, n_head=8, n_kv_head=2, head_dim=128,
                   n_expert=16, expert_dim=2048, router_dim=256, skip_expert=True, rope_base=5_000_000.0)


def logits(x, W):
    """x W^T in float32 throughout (report, IV-D). x (..., E) float32, W (V, E) of any dtype: converted in pieces that
    stay in a processor's cache, so that the memory reads W as it is, and holds no float32 copy of it."""
    if bf16_inside():                                           # but not here
        torch.set_float32_matmul_precision('highest')
        try:
            return logits(x, W)
        finally:
            torch.set_float32_matmul_precision('medium')
    if W.dtype == x.dtype or torch.compiler.is_compiling():
        return F.linear(x, W.to(x.dtype))
    rows = 2 ** (20 if x.device.type == 'cpu' else 27) // W.shape[1]
    return torch.cat([F.linear(x, piece.to(x.dtype)) for piece in W.split(max(1, rows))], -1)


def swiglu(gate_up):
    """silu(gate) * up. (T, 2F), gate first -> (T, F)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


# x (T, in), W (N, in, out), offs (N) int32 -> (T, out): rows offs[e - 1] : offs[e] are multiplied by W[e].
grouped_mm = torch.compiler.disable(F.grouped_mm)               # torch.compile knows its bf16 form only


class Experts(nn.Module):
    """N SwiGLU experts. forward: x (T, E), expert (T) int64, weight (T) float32 -> (T, E), weight * expert(x);
    zero where expert is N, the class 'skip'."""

    def __init__(self, config):
        super().__init__()
        N, E, F_ = config.n_expert, config.n_embd, config.expert_dim
        self.gate_up = nn.Parameter(torch.empty(N, 2 * F_, E))  # gate rows first
        self.down = nn.Parameter(torch.empty(N, E, F_))

    def forward(self, x, expert, weight):
        """Each token visits one expert only. So sort the tokens by expert: every expert then works on one contiguous
        slice, with plain matrix products and hardly any wasted work. At the end the order is put back."""
        T, N, device = len(x), len(self.down), x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        gate_up, down = self.gate_up.to(dtype), self.down.to(dtype)
        # A slice has a multiple of R rows, the last are zeros: a CPU writes a program for every shape of bf16 products.
        bf16_on_cpu = device == 'cpu' and (dtype == torch.bfloat16 or bf16_inside())
        R = min(64, 1 << max(1, T // (4 * N)).bit_length() - 1) if bf16_on_cpu else 1
        count = F.one_hot(expert, N + 1).sum(0)                 # (N + 1): tokens of each expert, and skipped ones
        room = (count + (R - 1)) // R * R
        ends = room.cumsum(0)                                   # where the slices end
        order = expert.sort(stable=True).indices                # expert 0's tokens first, skipped ones last
        moved = ends - room - (count.cumsum(0) - count)         # how far the zeros before a slice move it
        place = torch.empty_like(order).scatter_(0, order, torch.arange(T, device=x.device) + moved[expert[order]])
        skipped, ends = (expert == N)[:, None], ends[:N].int()  # place (T): a token's row, if skipped behind all slices
        x = x.to(dtype).masked_fill(skipped, 0)                 # backward: the gradient of such rows is not defined
        x = x.new_zeros(T + N * (R - 1), x.shape[1]).index_copy(0, place, x)
        h = swiglu(grouped_mm(x, gate_up.mT, offs=ends))        # (rows, F)
        y = grouped_mm(h, down.mT, offs=ends).index_select(0, place)            # (T, E)
        return y.masked_fill(skipped, 0) * weight[:, None].to(dtype)            # forward: nor are they themselves


class MoE(nn.Module):
    """Router and experts. forward: x (B, S, E), the router state of the layer below -> (B, S, E), router state."""

    def __init__(self, config, layer):
        super().__init__()
        self.router = Router(config, layer)
        self.experts = Experts(config)

    def forward(self, x, r_below):
        expert, weight, r = self.router(x, r_below)
        y = self.experts(x.flatten(0, 1), expert.flatten(), weight.flatten())
        return y.view_as(x), r


class Block(nn.Module):
    """One layer: attention, then experts, each pre-normed and added to the stream by residual scaling."""

    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CCA(config, layer)
        self.attn_residual = ResidualScaling(config.n_embd)
        self.moe_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.moe = MoE(config, layer)
        self.moe_residual = ResidualScaling(config.n_embd)

    def forward(self, x, r, *attn_args):
        """x (B, S, E), r (B, S, R) or None -> the same, one layer up. attn_args: those of CCA.forward after x."""
        x = self.attn_residual(x, self.attn(self.attn_norm(x), *attn_args))
        y, r = self.moe(self.moe_norm(x), r)
        return self.moe_residual(x, y), r


def initial_value(name, shape, config, seed):
    """Return the initial value, float32 on the CPU, of the tensor `name` of Zaya.state_dict().

    Matrices and convolutions are normal(0, init_std), biases 0, all other vectors 1. Router matrices are normal(0,
    1 / sqrt(fan-in)): with init_std, all tokens would be routed alike. The balancing bias of the class 'skip' is -1, so
    that no token chooses it. The generator is seeded with `seed` and the name, so that a process of a sharded model can
    compute any tensor on its own (train.py)."""
    value = torch.zeros(shape, device='cpu')
    if name.endswith('balancing_bias'):
        value[config.n_expert:] = -1.0
    elif len(shape) > 1:
        generator = torch.Generator().manual_seed(zlib.crc32(f'{seed} {name}'.encode()))
        value.normal_(std=shape[-1] ** -0.5 if 'router' in name else config.init_std, generator=generator)
    elif not name.endswith('bias'):
        value.fill_(1.0)
    return value


class Zaya(nn.Module):
    """The language model. torch.manual_seed decides its initial weights. See forward."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)         # also the output head: weights are tied
        self.embedding_scale = nn.Parameter(torch.ones(config.n_embd))
        self.embedding_bias = nn.Parameter(torch.zeros(config.n_embd))
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                if not tensor.is_meta:
                    tensor.copy_(initial_value(name, tensor.shape, config, torch.initial_seed()))

    def forward(self, tokens, targets=None, start=None, cache=None, n_new=None, last_only=False):
        """tokens (B, S) int64 -> (logits (B, S, V) float32, None), or with targets (None, loss).

        targets (B, S) int64: the next tokens; -1 is not scored. The loss is the mean cross entropy in nats, a float32
            scalar; the logits are made piece by piece, so that they never stand in memory all at once.
        start (B, S) bool: True where a document begins, for windows packed with several. Each then is a world of its
            own: attention, RoPE positions, convolutions and value shift start afresh. Not together with a cache.
        cache: a Cache; each row goes on where its cached part ended, and the cache takes the new tokens in.
        n_new: list of B ints, only with a cache: in row b only the first n_new[b] tokens are real. The rest is padding
            (any tokens), which leaves no trace; its logits mean nothing.
        last_only: logits only for each row's last real token, (B, 1, V).
        Raises ValueError if the sequence is empty or longer than the context.
        """
        B, S = tokens.shape
        held = [0] if cache is None else cache.lengths
        longest = max(old + new for old, new in zip(held, n_new or [S] * len(held)))
        if S < 1 or longest > self.config.context:
            after = '' if cache is None else f' after {max(held)} in the cache'
            raise ValueError(f'a sequence must have 1 to {self.config.context} tokens (the context), '
                             f'got {min(S, longest)}{after}')
        # Positions (1 or B, S) and attention mask (None: plainly causal) are the same for all layers.
        t, mask = torch.arange(S, device=tokens.device), None
        positions = t[None]
        if cache is not None:
            positions, mask = cache.reserve(S, n_new)
        elif start is not None:
            document = start.cumsum(1)                          # (B, S): which document of the window a token is in
            positions = t - torch.where(start, t, 0).cummax(1).values           # counted from the document's start
            mask = ((document[:, None] == document[..., None]) & (t <= t[:, None]))[:, None]    # (B, 1, S, S)
        x = self.stream(tokens, positions, mask, start, cache)                             # (B, S, E) float32
        if cache is not None:
            cache.commit()
        if last_only:
            last = torch.tensor(n_new or [S], device=tokens.device) - 1
            x = x[torch.arange(B, device=tokens.device), last][:, None]                    # (B, 1, E)
        if targets is None:
            return self.head(x), None
        with torch.autocast(tokens.device.type, enabled=False):                 # the loss in float32 (report, IV-D)
            x = upcast(self.norm(x)).flatten(0, 1)                                # (T, E)
            return None, CrossEntropy.apply(x, upcast(self.embedding.weight), targets.flatten())

    def stream(self, tokens, positions, mask=None, start=None, cache=None):
        """The residual stream after the last layer, (B, S, E) float32. positions (1 or B, S), mask: see CCA.forward."""
        cos, sin = rope_table(positions, self.config.rope_dim, self.config.rope_base)      # (1 or B, S, rope_dim / 2)
        x = upcast((self.embedding(tokens) + self.embedding_bias) * self.embedding_scale)
        r = None                                                # the router state climbs the layers beside x
        for layer in self.layers:
            x, r = layer(x, r, cos, sin, mask, start, cache)
        return x

    def head(self, x):
        """Logits in float32 (report, IV-D). x (B, S, E) -> (B, S, V)."""
        with torch.autocast(x.device.type, enabled=False):
            return logits(upcast(self.norm(x)), self.embedding.weight)

    @property
    def routers(self):
        return [layer.moe.router for layer in self.layers]

    @property
    def device(self):
        return self.embedding_scale.device

    @property
    def dtype(self):
        return self.embedding_scale.dtype

    def make_cache(self, B, capacity):
        """An empty Cache for B rows on the model's device, in its weights' dtype. capacity: positions a row has."""
        return Cache(self.config, B, capacity, self.device, self.dtype)


class CrossEntropy(torch.autograd.Function):
    """Mean over the scored targets (not -1) of -log softmax(x W^T)[target], in nats. x (T, E), W (V, E), targets (T).

    Logits for all tokens may be the largest tensor of a training step: at 8B, a megabyte a token. So they are made for
    a piece of the tokens at a time. What is needed of them later is their gradient alone, so it is made at once:
    dlogits = (softmax - one-hot) / n,  dx = dlogits W,  dW = dlogits^T x, and n the number of scored targets.
    """

    @staticmethod
    def forward(ctx, x, W, targets):
        n, rows = (targets >= 0).sum().clamp_min(1), max(512, 2 ** 19 // len(W))    # a piece: 2 MiB, or 512 rows
        loss, dx, dW = x.new_zeros(()), torch.empty_like(x), torch.zeros_like(W)
        for x_piece, target, dx_piece in zip(x.split(rows), targets.split(rows), dx.split(rows)):
            scored, target = (target >= 0)[:, None], target.clamp_min(0)[:, None]               # (rows, 1) each
            logp = logits(x_piece, W).log_softmax(-1)                           # (rows, V)
            loss -= logp.gather(1, target).mul_(scored).sum()
            if ctx.needs_input_grad[0]:                                         # not in evaluation
                dlogits = logp.exp_().scatter_add_(1, target, -torch.ones_like(x_piece[:, :1]))        # times n
                torch.mm(dlogits, W, out=dx_piece).mul_(scored / n)
                dW.addmm_(dlogits.T, x_piece * (scored / n))
        ctx.save_for_backward(dx, dW)
        return loss / n

    @staticmethod
    def backward(ctx, g):
        dx, dW = ctx.saved_tensors
        return dx * g, dW * g, None


def sizes(config):
    """Count what a config comes to, without allocating it. total: parameters. active: those that work on one token,
    without the embedding. kv_bytes: of the KV cache, a token, bf16, all layers; mha_kv_bytes: were it full multi-head
    attention. train_flops: of training on one token. 6 for each parameter at work, those of the output head included (2
    forward, 4 backward); 12 for each dim of the query heads and each position attended to, half the context."""
    with torch.device('meta'):
        model = Zaya(config)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for layer in model.layers for p in layer.moe.experts.parameters())
    embedding, L = config.vocab_size * config.n_embd, config.n_layer
    active = total - embedding - experts + experts // config.n_expert
    return {'total': total, 'active': active, 'kv_bytes': 2 * L * 2 * config.n_kv_head * config.head_dim,
            'mha_kv_bytes': 2 * L * 2 * config.n_embd,
            'train_flops': 6 * (active + embedding + L * config.n_head * config.head_dim * config.context)}
