"""Fast decode steps: one new token per sequence through all layers. An appendix to model.py and cache.py.

For a single token the arithmetic is negligible and each PyTorch call costs microseconds, so the forward pass of
model.py, written for thousands of tokens, is bound by call overhead. There are two faster forms. Each is a function
step(cache, tokens) that equals model(tokens[:, None], cache=cache) up to rounding; step.static_shapes says whether the
batch size and the cache capacity must stay the same from step to step.

`folded(model)`, ready at once: the same computation written for S = 1, with a third of the calls.
  - Adjacent linear maps are merged in advance: W_Q, W_K and both W_V are one matrix (or one quantized Matrix); the
    weight of the router's norm is folded into the next matrix; the two convolutions are one of kernel 3.
  - QK-mean needs no factor 1/2: q and k are normalized next, so only their directions matter and both may be twice as
    long: (2 q + q~) + k~, and (2 k + k~) + the mean of q~. The term in parentheses is a convolution, like q itself.
  - RoPE rotates all heads of a token by the same angles: one matrix for all layers. It preserves norms, so the
    normalization can follow it.

For a quantized model on a CPU, `folded` runs all layers in one call of kernels/decode.cpp: even folded, the calls
between two products take longer than the products.

`compiled(model)`, after half a minute: the plain forward pass, compiled by torch.compile. Shapes are static, so
attention covers the cache's whole capacity, with a mask.

Legend:  B sequences, one new token each   P cached positions   E residual width   Hq, Hk query / KV heads   H = Hq + Hk
         d head dim   C = H d   R router width   M router classes
"""
import contextlib
import copy
import functools
import sys
import threading
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from cca import merge_convolutions, rope_table
from kernels import int4
from layers import upcast
from model import Experts, Zaya, ZayaConfig, swiglu
from quantize import Matrix, quantized
from router import choose


def fold(layer):
    """Return the folded weights of a Block that both forms use. Those marked * are float32, the others in the model's
    dtype."""
    attn, router, a, m = layer.attn, layer.moe.router, layer.attn_residual, layer.moe_residual
    T = upcast(attn.temperature)
    # RMSNorm divides by |x| / sqrt(E). `step` divides by |x|; the factor sqrt(E) is folded into the norm's weight.
    norm_weight = lambda norm: upcast(norm.weight) * len(norm.weight) ** 0.5
    constant = lambda s: upcast(s.residual_bias * s.residual_scale + s.branch_bias * s.branch_scale)
    return SimpleNamespace(
        attn_norm=norm_weight(layer.attn_norm),                                             # (E) *
        size=torch.cat([T.new_ones(attn.Hq), T * attn.head_dim ** 0.5])[:, None],           # (H, 1) *: norm per head
        attn_scale=upcast(a.residual_scale), attn_constant=constant(a), attn_branch=upcast(a.branch_scale), # (E) * each
        moe_norm=norm_weight(layer.moe_norm),                                               # (E) *
        router_down=router.down_proj.weight, router_bias=router.down_proj.bias,             # (R, E), (R)
        eda_scale=router.eda_scale,                                                         # (R), None in layer 0
        fc1=(upcast(router.fc1.weight) * norm_weight(router.norm)).to(router.fc1.weight.dtype),          # (R, R)
        fc1_bias=router.fc1.bias, fc2=router.fc2.weight, fc2_bias=router.fc2.bias,          # (R), (R, R), (R)
        out=router.out_proj.weight,                                                         # (M, R)
        moe_scale=upcast(m.residual_scale), moe_constant=constant(m), moe_branch=upcast(m.branch_scale))    # (E) * each


def fold_products(layer):
    """Return fold(layer) with CCA's products and its convolutions, merged."""
    attn, d = layer.attn, layer.attn.head_dim
    taps, bias = merge_convolutions(attn.conv_depthwise_weight, attn.conv_depthwise_bias,
                                    attn.conv_grouped_weight, attn.conv_grouped_bias)      # (H, d, 3 d), (H, d)
    taps = 2 * taps
    taps[..., 2 * d:] += torch.eye(d, device=taps.device)
    w, is_quantized = fold(layer), isinstance(attn.o_proj, Matrix)
    w.down = attn.project if is_quantized else merged(
        attn.q_proj, attn.k_proj, attn.v_proj, attn.v_proj_delayed)                         # (B, E) -> (B, C + Hk d)
    w.o = attn.o_proj if is_quantized else merged(attn.o_proj)                              # (B, Hq d) -> (B, E)
    w.taps, w.taps_bias = taps.mT.contiguous(), 2 * bias[:, None]                           # (H, 3 d, d), (H, 1, d) *
    return w


def merged(*linears):
    """Return the function x -> [W_1; W_2; ...] x, one matrix product."""
    W = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
    return lambda x: F.linear(x, W)


def rotation(cos, sin, d):
    """Return the rotation matrices of RoPE (B, d, d): x @ rotation rotates x (., d). cos, sin (B, n). Dimensions after
    2n are unchanged."""
    B, n = cos.shape
    c = torch.cat([cos, cos, cos.new_ones(B, d - 2 * n)], -1)
    s = torch.cat([sin, sin.new_zeros(B, d - 2 * n)], -1)                       # (B, d - n), n off the diagonal
    return torch.diag_embed(c) + torch.diag_embed(s, n) - torch.diag_embed(s, -n)


def qk_mean(Hq, Hk):
    """Return the sums of QK-mean as a matrix (H, H): k~ is added to the queries of its group, the mean of their q~ to
    k."""
    group = torch.eye(Hk).repeat_interleave(Hq // Hk, 0)                        # (Hq, Hk): 1 if in the group
    return F.pad(group, (Hq, 0, 0, Hk)) + F.pad(group.T * Hk / Hq, (0, Hk, Hq, 0))


onednn = SimpleNamespace(lock=threading.Lock(), users=0, before=None)


@contextlib.contextmanager
def without_onednn(wanted):
    """Disable oneDNN, if wanted. For so few elements its GELU takes four times as long as PyTorch's, a sixth of a step
    at B = 1. In bf16 it stays enabled, since its matrix products are faster. The setting is the process's: of threads
    that overlap, the first disables it and the last restores it."""
    with onednn.lock:
        if wanted and onednn.users == 0:
            onednn.before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
        onednn.users += wanted
    try:
        yield
    finally:
        with onednn.lock:
            onednn.users -= wanted
            if wanted and onednn.users == 0:
                torch.backends.mkldnn.enabled = onednn.before


def route(router, w, h, r, length):
    """Router.forward with folded weights. h (B, E); r (B, R) of the layer below, or None."""
    bias = w.router_bias if r is None else torch.addcmul(w.router_bias, w.eda_scale, r)
    r = F.linear(h, w.router_down) + bias                                       # (B, R)
    z = (r / length(r.float())).to(h.dtype)
    z = F.gelu(F.linear(z, w.fc1, w.fc1_bias))
    z = F.gelu(F.linear(z, w.fc2, w.fc2_bias))
    probs = F.linear(z, w.out).softmax(-1, torch.float32)                       # (B, M)
    expert, weight = router.choose(probs, router.balancing_bias)                # (B) each
    return expert, weight, r


def one_expert(experts, x, expert, weight):
    """Experts.forward for a single token on a CPU: no sort, and reading the expert's index needs no synchronization."""
    if not isinstance(experts, Experts):                        # quantize.Experts
        return experts(x, expert, weight)
    e = int(expert)
    if e == len(experts.down):                                                  # 'skip'
        return torch.zeros_like(x)
    return F.linear(swiglu(F.linear(x, experts.gate_up[e])), experts.down[e]) * weight.to(x.dtype)


@torch.no_grad()
def folded(model):
    """Return step(cache, tokens): tokens (B) int64 -> logits (B, V) float32; it raises ValueError if the cache is full.
    The folded weights are copies: fold again after a weight update."""
    if kernel_fits(model) and kernel_agrees(model.embedding.bits, model.dtype):
        return by_kernel(model)
    return in_pytorch(model)


def in_pytorch(model):
    config, layers = model.config, [fold_products(layer) for layer in model.layers]
    Hq, Hk, d, dtype = config.n_head, config.n_kv_head, config.head_dim, model.dtype
    H, half = Hq + Hk, Hk * d // 2
    mean = qk_mean(Hq, Hk).to(model.device)
    # sqrt(|x|^2 + E eps) is sqrt(E) times RMSNorm's denominator. hypot(a, b) = sqrt(a^2 + b^2)
    eps = {n: torch.tensor((n * config.norm_eps) ** 0.5, device=model.device)
           for n in (config.n_embd, config.router_dim)}
    length = lambda x: torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), eps[x.shape[-1]])    # (B, 1)

    @torch.no_grad()
    @without_onednn(dtype == torch.float32)
    def step(cache, tokens):
        B = len(tokens)
        experts = one_expert if B == 1 and tokens.device.type == 'cpu' else nn.Module.__call__
        # Positions, mask and rotation, which all layers share.
        positions, mask = cache.reserve(1)                                      # (B, 1), (B, 1, 1, P)
        mask = torch.where(mask, 0.0, -torch.inf).to(dtype)                     # (B, 1, 1, P)
        rotate = rotation(*rope_table(positions[:, 0], config.rope_dim, config.rope_base), d)          # (B, d, d)
        x, r = upcast((model.embedding(tokens) + model.embedding_bias) * model.embedding_scale), None    # (B, E)
        for i, (layer, w) in enumerate(zip(model.layers, layers)):
            # Attention.
            h = (x / length(x) * w.attn_norm).to(dtype)                         # (B, E)
            qk, v, v_delayed = w.down(h).split([H * d, half, half], -1)
            qk = qk.float().view(B, 1, H * d)                                   # [q~; k~]
            v = torch.cat([v, cache.v_last[i][:, 0].to(dtype)], -1).view(B, Hk, 1, d)
            columns = torch.cat([cache.qk[i], qk], 1)                           # (B, 3, C): the last three tokens
            taps = columns.view(B, 3, H, d).permute(2, 0, 1, 3).reshape(H, B, 3 * d)
            y = torch.baddbmm(w.taps_bias, taps, w.taps).transpose(0, 1)        # (B, H, d)
            y = torch.bmm(torch.baddbmm(y, mean.expand(B, H, H), qk.view(B, H, d)), rotate)
            y = y * (w.size / torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min(1e-7))
            q, k = y.to(dtype).split([Hq, Hk], 1)                               # (B, Hq or Hk, d)
            k, v = cache.update(i, columns, v_delayed[:, None], k[:, :, None], v)        # (B, Hk, P, d)
            # The query heads of a KV head are laid out like tokens: 8 times as fast in bf16 after 8K tokens.
            q = q.view(B, Hk, Hq // Hk, d)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).view(B, Hq * d)
            x = torch.addcmul(torch.addcmul(w.attn_constant, x, w.attn_scale), w.o(y), w.attn_branch)  # (B, E)
            # Router.
            h = (x / length(x) * w.moe_norm).to(dtype)                          # (B, E)
            expert, weight, r = route(layer.moe.router, w, h, r, length)        # (B), (B), (B, R)
            # Experts.
            y = experts(layer.moe.experts, h, expert, weight)
            x = torch.addcmul(torch.addcmul(w.moe_constant, x, w.moe_scale), y, w.moe_branch)
        cache.commit()
        return model.head(x)
    step.static_shapes = False
    return step


# ---- a quantized model on a CPU: kernels/decode.cpp ----

# The pointers of kernels/decode.cpp's Layer, in its order.
FOLDED = ('attn_norm moe_norm attn_scale attn_constant attn_branch moe_scale moe_constant moe_branch w1 b1 b2 size w2 '
          'router_down router_bias eda_scale fc1 fc1_bias fc2 fc2_bias out balancing_bias').split()


def kernel_fits(model):
    """Return whether kernels/decode.cpp can run this model: quantized, with int4.cpp, and of these sizes."""
    c = model.config
    aligned = not (c.n_embd % 32 or c.expert_dim % 32 or c.n_head * c.head_dim % 32 or c.head_dim % 16
                   or c.router_dim % 8)
    return (getattr(model.embedding, 'kernel', False) and model.dtype in int4.DTYPES
            and aligned and c.head_dim <= 512 and c.n_expert <= 1000
            and all(router.choose is choose for router in model.routers))       # not replaced, as by evidence/view.py


@functools.cache
def kernel_agrees(bits, dtype):
    """Return whether by_kernel and in_pytorch agree on a tiny random model, after one and two chunks of positions."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Zaya(ZayaConfig(vocab_size=64, context=400, n_layer=2, n_embd=64, n_kv_head=2, expert_dim=64,
                                n_expert=2))
        for router in model.routers:
            router.balancing_bias[0] = 9                        # rounding must not change the expert
        model, logits = quantized(model.to(dtype), bits), []
        values = torch.randn(4, 2, 5, 500 * 64)
    for make in by_kernel, in_pytorch:
        cache = model.make_cache(5, 300)
        for tensors, value in zip((cache.k, cache.v, cache.qk, cache.v_last), values):
            for t, v in zip(tensors, value):
                t.copy_(v.flatten()[:t.numel()].view_as(t))
        cache.lengths = [1, 40, 255, 256, 290]
        logits.append(make(model)(cache, torch.arange(5)))
    error = ((logits[0] - logits[1]).norm() / logits[1].norm()).item()
    if not error < 0.05:                                        # also if it is NaN
        print(f'decoding runs without kernels/decode.cpp: on this CPU its results are {error:.0%} off', file=sys.stderr)
    return error < 0.05


def by_kernel(model):
    """Return the step of `folded` for a quantized model: one call of kernels/decode.cpp for all layers."""
    c, dtype = model.config, model.dtype
    weights = []                                                                # of each layer, a list of tensors
    for layer in model.layers:
        w, attn, experts = fold(layer), layer.attn, layer.moe.experts
        w.w1, w.b1, w.b2 = (upcast(getattr(attn, f'conv_{name}')) for name in (
            'depthwise_weight', 'depthwise_bias', 'grouped_bias'))
        w.w2, w.balancing_bias = attn.conv_grouped_weight.mT, upcast(layer.moe.router.balancing_bias)  # (C, 2, d), (M)
        matrices = attn.project.__self__, attn.o_proj, experts.gate_up, experts.down
        weights.append([*(getattr(w, name) for name in FOLDED), *(m.blocks for m in matrices),
                        *(m.scale for m in matrices)])
    weights = [[None if t is None else t.detach().contiguous() for t in row] for row in weights]
    pointers = torch.tensor([[0 if t is None else t.data_ptr() for t in row] for row in weights])
    run, bits = int4.load().decode, model.embedding.bits

    @torch.no_grad()
    def step(cache, tokens):
        if len(tokens) != len(cache.lengths) or cache.k[0].dtype != dtype:
            raise ValueError(f'{len(tokens)} tokens of a model in {dtype}, and a cache of {len(cache.lengths)} '
                             f'sequences in {cache.k[0].dtype}')
        positions, _ = cache.reserve(1)                                         # (B, 1)
        cos, sin = (t.contiguous() for t in rope_table(positions[:, 0], c.rope_dim, c.rope_base))      # (B, n)
        x = upcast((model.embedding(tokens) + model.embedding_bias) * model.embedding_scale)           # (B, E)
        state = torch.tensor([[t.data_ptr() for t in tensors] for tensors in zip(
            cache.k, cache.v, cache.qk, cache.v_last)])
        layers = torch.cat([pointers, state], 1)                                # a struct Layer per row
        sizes = torch.tensor([len(tokens), c.n_layer, c.n_embd, c.n_head, c.n_kv_head, c.head_dim, c.rope_dim // 2,
                              c.router_dim, c.n_expert + c.skip_expert, c.n_expert, c.expert_dim, cache.capacity,
                              dtype == torch.bfloat16])
        run(bits, *(t.data_ptr() for t in (sizes, layers, x, cos, sin, positions)), c.norm_eps)
        cache.commit()
        return model.head(x)
    step.static_shapes, step.weights = False, weights           # the pointers' tensors, which must stay alive
    return step


class GatheredExperts(nn.Module):
    """Experts for few tokens: gather each token's expert matrices, so that tokens need not be counted per expert.
    Compiled, this stores no copy of the matrices but reads them once per token."""

    def __init__(self, experts):
        super().__init__()
        self.gate_up, self.down = experts.gate_up, experts.down

    def forward(self, x, expert, weight):
        N = len(self.down)
        e = expert.clamp_max(N - 1)                                             # 'skip' uses any expert, with weight 0
        product = lambda W, x: (W[e] * x[:, None]).sum(-1)                      # (N, out, in), (B, in) -> (B, out)
        y = product(self.down, swiglu(product(self.gate_up, x)))                # (B, E)
        return y * torch.where(expert < N, weight, 0)[:, None].to(y.dtype)


@functools.cache
def compiled_forward(device_type):
    """Return the compiled forward pass for one token per sequence, on a CPU with a C++ wrapper. Compiling takes half a
    minute for 6 layers, or seconds if cached. It is repeated for each B and capacity, at most a hundred times."""
    torch._dynamo.config.recompile_limit = 100                                  # the default, 8, is meant to find bugs

    def plain(model, tokens, positions, mask, cache):
        return model.head(model.stream(tokens, positions, mask, None, cache))
    options = {'cpp_wrapper': True} if device_type == 'cpu' else None
    return torch.compile(plain, fullgraph=True, dynamic=False, options=options)


def recorded(run):
    """Return run(model, tokens, positions, mask, cache) as a CUDA graph, which launches all kernels of a step with one
    call. A graph reads and writes fixed addresses, so a new cache needs a new recording."""
    held = SimpleNamespace(tensors=[])

    def replay(model, tokens, positions, mask, cache):
        tensors = cache.k + cache.v + cache.qk + cache.v_last
        if len(held.tensors) != len(tensors) or any(a is not b for a, b in zip(held.tensors, tensors)):
            held.tensors, held.inputs = tensors, [t.clone() for t in (tokens, positions, mask)]
            cache.target, held.rows = held.inputs[1], cache.rows
            mark = cache.mark()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):                     # two warm-up calls, which allocate memory
                run(model, *held.inputs, cache)
                run(model, *held.inputs, cache)
            torch.cuda.current_stream().wait_stream(stream)
            held.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(held.graph):
                held.logits = run(model, *held.inputs, cache)
            cache.rewind(mark)                                  # undo the state of the warm-up calls
        for static, t in zip(held.inputs, (tokens, positions, mask)):
            static.copy_(t)
        held.graph.replay()
        return held.logits.clone()
    return replay


def compiled(model):
    """Return a step like that of `folded`, but compiled for static shapes. Raise ValueError for a quantized model."""
    if isinstance(model.embedding, Matrix):
        raise ValueError('a quantized model is not compiled, its products are faster as they are: leave out --compile')
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    model = copy.deepcopy(model, tensors)                                       # a new model with the same tensors
    for layer in model.layers:
        layer.moe.experts = GatheredExperts(layer.moe.experts)
    run = compiled_forward(model.device.type)
    run = recorded(run) if model.device.type == 'cuda' else run

    @torch.no_grad()
    def step(cache, tokens):
        positions, mask = cache.reserve(1, whole=True)                          # (B, 1), (B, 1, 1, capacity)
        logits = run(model, tokens[:, None], positions, mask, cache)
        cache.commit()
        return logits[:, 0]                                                     # (B, V)
    step.static_shapes = True
    return step
