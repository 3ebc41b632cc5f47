"""ZAYA1, the whole model: embedding -> 40 x (CCA attention, mixture of experts) -> norm -> tied output head.

    x = (embedding(token) + b) * a                              the residual stream, float32 in all layers
    for each layer:
        x = scale(x, CCA(RMSNorm(x)))                           cca.py; `scale`, residual scaling, is in layers.py
        x = scale(x, w expert_e(RMSNorm(x)))                    router.py chooses an expert e per token, with weight w
    logits = RMSNorm(x) embedding^T

    expert(x) = W_down (silu(gate) * up)   with   [gate; up] = W_gate_up x                      (SwiGLU)
    loss      = mean over the targets (-1 is ignored) of -log softmax(logits)[target]

Source: ZAYA1-8B report (arXiv 2605.05365), II and Table I. runtime/pretrained.py maps the released parameter names.

Legend:  B batch   S sequence   T = B S   E residual width   N experts   F expert width   R router width   V vocabulary
"""
import zlib
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from cache import Cache
from cca import CCA, rope_table
from configurator import check_ranges
from kernels.head import linear, products
from layers import ResidualScaling, RMSNorm, bf16_matmuls, float32_matmuls, upcast
from router import Router


@dataclass
class ZayaConfig:
    """The model's hyperparameters. The defaults are a small model that trains on a laptop."""
    vocab_size: int = 4096          # V; train.py takes it from the dataset
    context: int = 256              # maximum sequence length, in tokens
    n_layer: int = 6                # blocks of attention and experts
    n_embd: int = 256               # E, width of the residual stream
    n_head: int = 4                 # query heads; the query latent is n_head * head_dim, E / 2 here
    n_kv_head: int = 1              # key/value heads; the KV latent is n_kv_head * head_dim, E / 8 here
    head_dim: int = 32              # d
    n_expert: int = 8               # N, of which one is active per token
    expert_dim: int = 256           # F, hidden width of an expert
    router_dim: int = 64            # R, width of the router
    skip_expert: bool = False       # an additional class without an expert; the released model has it
    rope_base: float = 10_000.0     # 10K at 4K context, 1M at 32K, 5M at 131K (report, III)
    rope_fraction: float = 0.5      # fraction of each head's dims that RoPE rotates
    norm_eps: float = 1e-5          # of RMSNorm
    init_std: float = 0.02          # of matrices and convolutions, except the router's

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
            raise ValueError('n_embd and expert_dim must be multiples of 8: grouped_mm needs 16-byte-aligned rows')

    @property
    def rope_dim(self):
        return int(self.head_dim * self.rope_fraction)

    @classmethod
    def zaya1_8b(cls):
        """Return the config of the released model (report, Table I; `sizes` has its parameter counts)."""
        return cls(vocab_size=262_272, context=131_072, n_layer=40, n_embd=2048, n_head=8, n_kv_head=2, head_dim=128,
                   n_expert=16, expert_dim=2048, router_dim=256, skip_expert=True, rope_base=5_000_000.0)


def logits(x, W):
    """Return x W^T in float32 (report, IV-D). x (..., E) float32, W (V, E) of any dtype -> (..., V)."""
    with float32_matmuls():
        return F.linear(x, W) if W.dtype == x.dtype else linear(x, W)


def swiglu(gate_up):
    """Return silu(gate) * up. gate_up (T, 2F), gate first -> (T, F)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


# x (T, in), W (N, in, out), offs (N) int32 -> (T, out): tokens offs[e - 1] : offs[e] are multiplied by W[e].
eager_grouped_mm = torch.compiler.disable(F.grouped_mm)         # torch.compile (2.13) supports bf16 only
grouped_mm = lambda x, W, offs: (F.grouped_mm if x.dtype == torch.bfloat16 else eager_grouped_mm)(x, W, offs=offs)


def sort_by_expert(expert, N, multiple):
    """Sort tokens by expert (T) int64, skipped ones (expert N) last, each slice padded to a multiple of `multiple`.
    Return the place of each token in the sorted order, (T) int64, and the ends of the slices, (N) int32."""
    count = F.one_hot(expert, N + 1).sum(0)                     # (N + 1): tokens per expert, then skipped tokens
    padded = (count + (multiple - 1)) // multiple * multiple
    ends = padded.cumsum(0)
    order = expert.sort(stable=True).indices                    # (T): place -> token
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))    # inverse
    padding = (ends - padded) - (count.cumsum(0) - count)       # (N + 1): padding before each slice
    return place + padding[expert], ends[:N].int()


class Experts(nn.Module):
    """N SwiGLU experts. forward: x (T, E), expert (T) int64, weight (T) -> (T, E), weight * expert(x); 0 for N."""

    def __init__(self, config):
        super().__init__()
        N, E, F_ = config.n_expert, config.n_embd, config.expert_dim
        self.gate_up = nn.Parameter(torch.empty(N, 2 * F_, E))  # gate first, then up
        self.down = nn.Parameter(torch.empty(N, E, F_))

    def forward(self, x, expert, weight):
        """Sort the tokens by expert, multiply each expert's contiguous slice by its matrices, restore the order."""
        T, N, device = len(x), len(self.down), x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        # oneDNN JIT-compiles a bf16 kernel per shape: pad slices to multiples of 2^k <= min(64, T / (4 N)).
        bf16_on_cpu = device == 'cpu' and (dtype == torch.bfloat16 or bf16_matmuls())
        multiple = min(64, 1 << max(1, T // (4 * N)).bit_length() - 1) if bf16_on_cpu else 1
        place, ends = sort_by_expert(expert, N, multiple)
        # grouped_mm leaves results and gradients after the last slice undefined: set both to zero for skipped tokens.
        skipped = (expert == N)[:, None]
        x = x.to(dtype).masked_fill(skipped, 0)
        x = x.new_zeros(T + N * (multiple - 1), x.shape[1]).index_copy(0, place, x)     # sorted, padded
        h = swiglu(grouped_mm(x, self.gate_up.to(dtype).mT, offs=ends))
        y = grouped_mm(h, self.down.to(dtype).mT, offs=ends).index_select(0, place)     # (T, E), in the order of x
        return y.masked_fill(skipped, 0) * weight[:, None].to(dtype)


class MoE(nn.Module):
    """Router and experts. forward: x (B, S, E), router state of the layer below -> (B, S, E), router state."""

    def __init__(self, config, layer):
        super().__init__()
        self.router = Router(config, layer)
        self.experts = Experts(config)

    def forward(self, x, r_below):
        expert, weight, r = self.router(x, r_below)
        y = self.experts(x.flatten(0, 1), expert.flatten(), weight.flatten())
        return y.view_as(x), r


class Block(nn.Module):
    """One layer: attention, then experts, each with pre-norm and residual scaling."""

    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CCA(config, layer)
        self.attn_residual = ResidualScaling(config.n_embd)
        self.moe_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.moe = MoE(config, layer)
        self.moe_residual = ResidualScaling(config.n_embd)

    def forward(self, x, r, *attn_args):
        """x (B, S, E), r (B, S, R) or None -> new x and r. attn_args: the arguments of CCA.forward after x."""
        x = self.attn_residual(x, self.attn(self.attn_norm(x), *attn_args))
        y, r = self.moe(self.moe_norm(x), r)
        return self.moe_residual(x, y), r


def initial_value(name, shape, config, seed):
    """Return the initial value, float32 on the CPU, of the tensor `name` of Zaya.state_dict(): normal(0, init_std) for
    matrices and convolutions, 0 for biases, 1 for all other vectors. Router matrices are normal(0, 1 / sqrt(fan-in)):
    with init_std, all tokens would be routed alike. The balancing bias of 'skip' is -1, and not moved. The
    generator is seeded with `seed` and the name: any process can compute any tensor (train.py, sharded)."""
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
    """The language model. The seed of torch.manual_seed determines its initial weights."""

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
        """tokens (B, S) int64 -> (logits (B, S, V) float32, None), or with targets (None, loss), a float32 scalar.
        targets (B, S) int64: the next tokens; -1 is ignored. The loss is the mean cross entropy over the others, in
            nats. Computed without holding all logits in memory.
        start (B, S) bool: True at the first token of a document, for sequences packed with several. Documents do
            not attend to each other: attention, RoPE positions, convolutions and value shift restart. Not with a cache.
        cache: a Cache. Each sequence continues after its cached tokens, and the new tokens are stored.
        n_new: list of B ints, only with a cache: the first n_new[b] tokens of sequence b are real, the rest is padding
            (any tokens), which has no effect and whose logits are meaningless.
        last_only: return the logits of each sequence's last real token only, (B, 1, V).
        Raises ValueError if the sequence is empty or longer than the context."""
        B, S = tokens.shape
        held = [0] if cache is None else cache.lengths
        longest = max(old + new for old, new in zip(held, n_new or [S] * len(held)))
        if S < 1 or longest > self.config.context:
            after = '' if cache is None else f' after {max(held)} in the cache'
            raise ValueError(f'a sequence must have 1 to {self.config.context} tokens (the context), '
                             f'got {min(S, longest)}{after}')
        # Positions (1 or B, S) and attention mask (None: plain causal) are the same in all layers.
        t, mask = torch.arange(S, device=tokens.device), None
        positions = t[None]
        if cache is not None:
            positions, mask = cache.reserve(S, n_new)
        elif start is not None:
            document = start.cumsum(1)                          # (B, S): the document of each token
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
        """Return the residual stream after the last layer, (B, S, E) float32. mask, start: see CCA.forward."""
        cos, sin = rope_table(positions, self.config.rope_dim, self.config.rope_base)      # (1 or B, S, rope_dim / 2)
        x = upcast((self.embedding(tokens) + self.embedding_bias) * self.embedding_scale)
        r = None                                                # router state, from layer to layer
        for layer in self.layers:
            x, r = layer(x, r, cos, sin, mask, start, cache)
        return x

    def head(self, x):
        """Return the logits, in float32 (report, IV-D). x (B, S, E) -> (B, S, V)."""
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
        """Return an empty Cache for B sequences of up to `capacity` tokens, on the model's device, in its dtype."""
        return Cache(self.config, B, capacity, self.device, self.dtype)


class CrossEntropy(torch.autograd.Function):
    """Mean over the targets (-1 ignored) of -log softmax(x W^T)[target], in nats. x (T, E), W (V, E), targets (T).

    The logits of all tokens could be the largest tensor of a training step (8B: 1 MB per token). So forward computes
    them for one piece of the tokens at a time, and dx, dW along with them; backward only scales these:
    dlogits = (softmax - one-hot) / n,  dx = dlogits W,  dW = dlogits^T x, n the number of targets that count. On GPUs
    in bf16 runs, x W^T, dlogits W and dlogits^T x are sums of three bf16 products each (kernels/head.py)."""

    @staticmethod
    def forward(ctx, x, W, targets):
        n, (split, mm, addmm_, size) = (targets >= 0).sum().clamp_min(1), products(x, len(W), bf16_matmuls())
        loss, dx, dW, W = x.new_zeros(()), torch.empty_like(x), torch.zeros_like(W), split(W)
        for x_piece, target, dx_piece in zip(x.split(size), targets.split(size), dx.split(size)):
            scored, target = (target >= 0)[:, None], target.clamp_min(0)[:, None]               # (size, 1) each
            with float32_matmuls():
                logp = mm(split(x_piece), W.mT).log_softmax(-1)                 # (size, V)
            loss -= logp.gather(1, target).mul_(scored).sum()
            if ctx.needs_input_grad[0]:                                         # not in evaluation
                dlogits = split(logp.exp_().scatter_add_(1, target, -torch.ones_like(x_piece[:, :1])))      # * n
                mm(dlogits, W, out=dx_piece).mul_(scored / n)
                addmm_(dW, dlogits.mT, split(x_piece * (scored / n)))
        ctx.save_for_backward(dx, dW)
        return loss / n

    @staticmethod
    def backward(ctx, g):
        dx, dW = ctx.saved_tensors
        return dx * g, dW * g, None


def sizes(config):
    """Count parameters, bytes and FLOPs without allocating the model. total: parameters. active: those used per token,
    without the embedding. The report says 8.4B and 0.76B for the 8B model; this counts 8,840,488,784 with the (tied)
    embedding, 8,303,355,728 without it, and 753,608,528 active. kv_bytes: KV cache per token, bf16, all layers;
    mha_kv_bytes: the same for full multi-head attention. train_flops: per token, 6 (2 forward, 4 backward) per active
    and output-head parameter, plus 12 per layer, query dim and attended position (context / 2 on average)."""
    with torch.device('meta'):
        model = Zaya(config)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for layer in model.layers for p in layer.moe.experts.parameters())
    embedding, L = config.vocab_size * config.n_embd, config.n_layer
    active = total - embedding - experts + experts // config.n_expert
    return {'total': total, 'active': active, 'kv_bytes': 2 * L * 2 * config.n_kv_head * config.head_dim,
            'mha_kv_bytes': 2 * L * 2 * config.n_embd,
            'train_flops': 6 * (active + embedding + L * config.n_head * config.head_dim * config.context)}
