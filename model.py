"""ZAYA1, the whole model: embedding -> 40 x (CCA attention, mixture of experts) -> norm -> tied output head.

    x = scale_0(embedding(token))                               the residual stream, float32 all the way up
    for each layer:
        x = scale(x, CCA(RMSNorm(x)))                           cca.py
        x = scale(x, MoE(RMSNorm(x)))                           router.py picks one expert a token
    logits = embedding^T RMSNorm(x)

with learned residual scaling (ZAYA1-8B report, arXiv 2605.05365, eq. 6) in place of the plain x + f(x):

    scale(x, f) = (x + b_r) * a_r + (f + b_f) * a_f             four vectors of width E; a = 1, b = 0 is x + f

so that each layer can damp what came before it or turn itself down: over 40 layers this keeps the stream's size in
hand. Parameter names are this project's; CHECKPOINT_NAMES maps them to those of the released weights.

`python model.py` prints the sizes of all presets.

Legend:  B batch   S sequence   E residual width   N experts   F expert width   V vocabulary   T = B S tokens
"""
import json
import os
import pickle                                                   # for the name of an error only: see load_checkpoint
import sys
import zipfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import fused
from cca import CCA, Cache, rope_table, wide
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
    skip_expert: bool = False       # one more class that computes nothing; in the released checkpoint, off from scratch
    rope_base: float = 10_000.0     # 10K at 4K context, 1M at 32K, 5M at 131K (report, III)
    rope_fraction: float = 0.5      # of each head's dims that are rotated
    norm_eps: float = 1e-5
    init_std: float = 0.02
    kernel: str = 'auto'            # CCA's convolutions to RoPE: 'torch', 'hip' (kernels/), or 'auto': hip on a GPU where it builds

    def __post_init__(self):
        for name in ('vocab_size', 'context', 'n_layer', 'n_embd', 'n_head', 'n_kv_head', 'head_dim', 'n_expert',
                     'expert_dim', 'router_dim'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}, it must be at least 1')
        for name in ('rope_base', 'norm_eps', 'init_std'):
            if not 0 < getattr(self, name) < float('inf'):
                raise ValueError(f'{name} is {getattr(self, name)}, it must be a positive number')
        if self.kernel not in ('auto', 'hip', 'torch'):
            raise ValueError(f"kernel is {self.kernel!r}, use one of auto, hip, torch")
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})')
        if self.n_kv_head * self.head_dim % 2:
            raise ValueError(f'n_kv_head * head_dim ({self.n_kv_head} * {self.head_dim}) must be even: '
                             'half of the values come from the token before')
        if not 0 < self.rope_fraction <= 1 or self.rope_dim % 2:
            raise ValueError(f'rope_fraction * head_dim ({self.rope_fraction} * {self.head_dim}) must be an '
                             'even number of dims, they are rotated in pairs')

    @property
    def rope_dim(self):
        return int(self.head_dim * self.rope_fraction)

    @classmethod
    def zaya1_8b(cls):
        """The released model, 8.4B parameters of which 0.76B work on each token (report, Table I)."""
        return cls(vocab_size=262_272, context=131_072, n_layer=40, n_embd=2048, n_head=8, n_kv_head=2, head_dim=128,
                   n_expert=16, expert_dim=2048, router_dim=256, skip_expert=True, rope_base=5_000_000.0)

    @classmethod
    def medium(cls):
        """For one GPU: about nanoGPT's GPT-2 in active parameters."""
        return cls(vocab_size=50_304, context=1024, n_layer=16, n_embd=1024, n_head=8, n_kv_head=2, head_dim=64,
                   n_expert=16, expert_dim=1024, router_dim=128)

    @classmethod
    def small(cls):
        """For a laptop: the defaults."""
        return cls()


def rms_norm(x, weight, eps):
    """x / rms(x) * weight. x (..., E), weight (E) -> (..., E)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class RMSNorm(nn.Module):
    """rms_norm over the last dim, computed in float32, returned in the weight's dtype."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        norm = fused.RMSNorm.apply if fused.wanted() else rms_norm
        return norm(wide(x), wide(self.weight), self.eps).to(self.weight.dtype)


def residual_scaling(x, f, a_r, b_r, a_f, b_f):
    """(x + b_r) * a_r + (f + b_f) * a_f, multiplied out: two passes over the stream, not four."""
    return torch.addcmul(torch.addcmul(b_r * a_r + b_f * a_f, x, a_r), f, a_f)


class ResidualScaling(nn.Module):
    """residual_scaling with its four vectors. x (B, S, E) float32, f (B, S, E) -> (B, S, E) float32."""

    def __init__(self, dim):
        super().__init__()
        self.residual_scale = nn.Parameter(torch.ones(dim))     # a_r
        self.residual_bias = nn.Parameter(torch.zeros(dim))     # b_r
        self.branch_scale = nn.Parameter(torch.ones(dim))       # a_f
        self.branch_bias = nn.Parameter(torch.zeros(dim))       # b_f

    def forward(self, x, f):
        scale = fused.ResidualScaling.apply if fused.wanted() else residual_scaling
        return scale(x, wide(f), self.residual_scale, self.residual_bias, self.branch_scale, self.branch_bias)


class Experts(nn.Module):
    """N SwiGLU experts: expert_e(x) = W_down,e (silu(gate) * up) with [gate; up] = W_gate_up,e x."""

    def __init__(self, config):
        super().__init__()
        N, E, F_ = config.n_expert, config.n_embd, config.expert_dim
        self.gate_up = nn.Parameter(torch.empty(N, 2 * F_, E))  # gate rows first
        self.down = nn.Parameter(torch.empty(N, E, F_))

    def forward(self, x, expert, weight):
        """x (T, E), expert (T) int64, weight (T) float32 -> (T, E): weight * expert(x), zero where expert is 'skip' (N).

        Each token visits one expert only. So sort the tokens by expert: every expert then works on one contiguous
        slice, with plain matrix products and no wasted work, and at the end the order is put back.
        """
        if len(x) == 1 and not x.is_cuda:                       # nothing to sort, when decoding
            e = int(expert)
            if e == len(self.gate_up):
                return torch.zeros_like(x)
            return F.linear(swiglu(F.linear(x, self.gate_up[e])), self.down[e]) * weight.to(x.dtype)
        order = expert.argsort(stable=True)                     # token indices, expert 0's first, skipped ones last
        inverse = order.argsort()
        count = (expert[:, None] == torch.arange(len(self.gate_up), device=expert.device)).sum(0)      # (N) tokens each
        y = multiply(fused.permute(x, order, inverse), self.gate_up, self.down, count)                 # (T, E), sorted
        return fused.permute(y, inverse, order) * weight[:, None].to(y.dtype)


def swiglu(gate_up):
    """(T, 2F), gate first -> (T, F)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def multiply(x, gate_up, down, count):
    """x (T, E) sorted by expert, count (N) -> (T, E): each expert's products on its own rows, the faster way."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    aligned = gate_up.shape[1] % 16 == 0 and gate_up.shape[2] % 8 == 0          # rows of whole 16 bytes: 8 bf16 numbers
    if x.is_cuda and dtype == torch.bfloat16 and aligned:       # what the GPU kernels are made for
        return grouped_products(x.to(dtype), gate_up.to(dtype), down.to(dtype), count)
    return sliced_products(x, gate_up, down, count)


def sliced_products(x, gate_up, down, count):
    """The definition: one slice and two products for each expert. The slice sizes are needed as plain numbers, which
    costs nothing on a CPU; a GPU would have to finish all earlier work first."""
    *slices, skipped = x.split([*(sizes := count.tolist()), len(x) - sum(sizes)])
    y = [F.linear(swiglu(F.linear(s, w_in)), w_out) for s, w_in, w_out in zip(slices, gate_up.unbind(), down.unbind())
         if len(s) or s.requires_grad]                          # in training also the idle ones, which then learn zero
    return torch.cat([*y, torch.zeros_like(skipped, dtype=y[0].dtype if y else None)])


def grouped_products(x, gate_up, down, count):
    """The same in two launches that read the sizes on the GPU itself."""
    ends = count.cumsum(0, dtype=torch.int32)                   # expert e has rows ends[e - 1] : ends[e]
    skipped = (torch.arange(len(x), device=x.device) >= ends[-1])[:, None]          # those after the last one's
    x = x.masked_fill(skipped, 0)                               # grouped_mm leaves them undefined: zero in and out, so
    h = F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends)     # that no gradient passes either; (T, 2F)
    return F.grouped_mm(swiglu(h), down.transpose(1, 2), offs=ends).masked_fill(skipped, 0)            # (T, E)


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
        """x (B, S, E), r (B, S, R) or None -> the same, one layer up. attn_args: the arguments of CCA.forward after x."""
        x = self.attn_residual(x, self.attn(self.attn_norm(x), *attn_args))
        y, r = self.moe(self.moe_norm(x), r)
        return self.moe_residual(x, y), r


class Zaya(nn.Module):
    """The language model. See forward; Zaya.from_pretrained(folder) reads released weights."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.released_config = {}                               # config.json of the folder this model came from, if it did
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)         # also the output head: weights are tied
        self.embedding_scale = nn.Parameter(torch.ones(config.n_embd))
        self.embedding_bias = nn.Parameter(torch.zeros(config.n_embd))
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.train_layer = Block.__call__                       # train.py may replace it by its compiled self
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """All initialisation: matrices and convolutions normal(0, init_std), biases 0, scales and temperatures 1,
        balancing biases 0 except 'skip', whose -1 makes it lose against any probability. The router's matrices are
        larger, so that its first probabilities differ from token to token: else all tokens choose alike."""
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=p.shape[-1] ** -0.5 if 'router' in name else self.config.init_std)
            elif name.endswith('bias'):
                nn.init.zeros_(p)
            else:
                nn.init.ones_(p)                                # norms, residual scales, eda_scale, temperature
        for layer in self.layers:
            layer.moe.router.balancing_bias.zero_()
            layer.moe.router.balancing_bias[self.config.n_expert:] = -1.0

    def forward(self, idx, targets=None, start=None, cache=None, n_new=None, last_only=False):
        """idx (B, S) int64 token ids -> (logits (B, S, V) float32, None), or with targets (None, loss).

        targets (B, S) int64: the next tokens; -1 is not scored. The loss is the mean cross entropy in nats, a float32
            scalar; the logits are made piece by piece, so that they never stand in memory all at once.
        start (B, S) bool: True where a document begins, for windows packed with several. Each then is a world of its own:
            attention, RoPE positions, convolutions and value shift start afresh, and the loss is that of the documents alone.
        cache: a Cache; idx then continues each row where its cached part ended, and the cache takes the new tokens in.
            Not together with start.
        n_new: list of B ints, only with a cache: in row b only the first n_new[b] of idx are real, the rest padding
            (any ids), which leaves no trace; its logits mean nothing.
        last_only: logits only for each row's last real token, (B, 1, V).
        Raises ValueError if the sequence is empty or longer than the context.
        """
        B, S = idx.shape
        longest = S if cache is None else max(old + new for old, new in zip(cache.lengths, n_new or [S] * B))
        if S < 1 or longest > self.config.context:
            raise ValueError(f'a sequence must have 1 to {self.config.context} tokens (the context), got {min(S, longest)}'
                             + (f' after {max(cache.lengths)} in the cache' if cache is not None else ''))
        # Positions (1 or B, S) and attention mask (None: plainly causal) are the same for all layers.
        t, mask = torch.arange(S, device=idx.device), None
        if cache is not None:
            positions, mask = cache.begin(S, n_new)
        elif start is not None:
            document = start.cumsum(1)                          # (B, S): which document of the window a token is in
            positions = t - torch.where(start, t, 0).cummax(1).values           # counted from the document's start
            mask = ((document[:, None] == document[..., None]) & (t <= t[:, None]))[:, None]    # (B, 1, S, S)
        else:
            positions = t[None]
        cos, sin = rope_table(positions, self.config.rope_dim, self.config.rope_base)      # (1 or B, S, rope_dim / 2)
        x = wide((self.embedding(idx) + self.embedding_bias) * self.embedding_scale)       # (B, S, E) float32
        r = None                                                # the router state climbs the layers beside x
        call = self.train_layer if self.training else Block.__call__
        for layer in self.layers:
            x, r = call(layer, x, r, cos, sin, mask, start, cache)
        if last_only:
            last = torch.tensor(n_new or [S], device=idx.device) - 1
            x = x[torch.arange(B, device=idx.device), last][:, None]                       # (B, 1, E)
        x = self.norm(x)
        if cache is not None:
            cache.end()
        with torch.autocast(idx.device.type, enabled=False):    # head and loss in float32 (report, IV-D)
            W = wide(self.embedding.weight)                     # (V, E)
            if targets is None:
                return F.linear(wide(x), W), None               # (B, S, V)
            return None, fused.CrossEntropy.apply(wide(x).flatten(0, 1), W, targets.flatten())

    @property
    def routers(self):
        return [layer.moe.router for layer in self.layers]

    @property
    def device(self):
        return self.embedding.weight.device

    def make_cache(self, batch_size, capacity):
        """An empty Cache on the model's device, in its weights' dtype. capacity: positions a row, at most the context."""
        return Cache(self.config, batch_size, capacity, self.device, self.embedding.weight.dtype)

    # ---- the released layout: a folder with config.json and *.safetensors ----

    @classmethod
    def from_pretrained(cls, folder, device='cpu', dtype=None):
        """Read a folder in the released layout. dtype: of the weights, default as stored.

        The model is built without memory (on 'meta') and filled tensor by tensor, so the peak is the model itself plus
        one tensor. Raises ValueError, naming the culprit, if the folder does not hold exactly this model.
        """
        safe_open = _safetensors().safe_open
        config = config_from_json(folder)
        with torch.device('meta'):
            model = cls(config)
        own = {checkpoint_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
        missing = set(own)
        for path in checkpoint_files(folder):
            try:
                with safe_open(path, 'pt') as file:
                    for name in file.keys():
                        if name == 'lm_head.weight':            # tied: the embedding once more
                            continue
                        if name not in own:
                            raise ValueError(f'{path}: unknown tensor {name}')
                        our_name, like = own[name]
                        shape = file.get_slice(name).get_shape()
                        if list(shape) != list(like.shape):
                            raise ValueError(f'{path}: {name} has shape {list(shape)}, '
                                             f'config.json asks for {list(like.shape)}')
                        tensor = file.get_tensor(name)
                        keep = torch.float32 if name.endswith('balancing_biases') else dtype or tensor.dtype
                        set_tensor(model, our_name, tensor.to(device, keep))
                        missing.discard(name)
            except (OSError, _safetensors().SafetensorError) as error:
                raise ValueError(f'{path}: cannot be read as safetensors ({error}); is the file complete?') from None
        if missing:
            raise ValueError(f'{folder}: {len(missing)} tensors are missing, the first is {min(missing)}')
        for router in model.routers:                            # not stored: the load counters
            router.load = torch.zeros_like(router.load, device=device)
        model.released_config = read_json(os.path.join(folder, 'config.json'))      # end-of-text token and the like
        return model.eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors in the released layout; `transformers` loads it. Tensors bit for bit."""
        save_file = _safetensors().torch.save_file
        os.makedirs(folder, exist_ok=True)
        tensors = {checkpoint_name(name): tensor.contiguous() for name, tensor in self.state_dict().items()}
        dtype = str(self.embedding.weight.dtype).removeprefix('torch.')
        save_file(tensors, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})
        with open(os.path.join(folder, 'config.json'), 'w') as file:
            json.dump(self.released_config | config_to_json(self.config) | {'dtype': dtype}, file, indent=2, sort_keys=True)


# This project's names -> the released names; `layers.i.` becomes `model.layers.i.`.
CHECKPOINT_NAMES = {
    'embedding.weight': 'model.embed_tokens.weight',
    'embedding_scale': 'model.input_hidden_states_scale',
    'embedding_bias': 'model.input_hidden_states_bias',
    'norm.weight': 'model.norm.weight',
    'attn_norm': 'input_layernorm',
    'moe_norm': 'post_attention_layernorm',
    'attn.q_proj': 'self_attn.qkv_proj.q_proj',
    'attn.k_proj': 'self_attn.qkv_proj.k_proj',
    'attn.v_proj': 'self_attn.qkv_proj.v_proj_current',
    'attn.v_proj_delayed': 'self_attn.qkv_proj.v_proj_delayed',
    'attn.o_proj': 'self_attn.o_proj',
    'attn.conv_depthwise_weight': 'self_attn.qkv_proj.conv_qk_depthwise.weight',
    'attn.conv_depthwise_bias': 'self_attn.qkv_proj.conv_qk_depthwise.bias',
    'attn.conv_grouped_weight': 'self_attn.qkv_proj.conv_qk_grouped.weight',
    'attn.conv_grouped_bias': 'self_attn.qkv_proj.conv_qk_grouped.bias',
    'attn.temperature': 'self_attn.qk_norm.temp',
    'moe.router.down_proj': 'mlp.gate.down_proj',
    'moe.router.eda_scale': 'mlp.gate.router_states_scale',
    'moe.router.norm': 'mlp.gate.router_mlp.norm',
    'moe.router.fc1': 'mlp.gate.router_mlp.fc1',
    'moe.router.fc2': 'mlp.gate.router_mlp.fc2',
    'moe.router.out_proj': 'mlp.gate.router_mlp.out_proj',
    'moe.router.balancing_bias': 'mlp.gate.balancing_biases',
    'moe.experts.gate_up': 'mlp.experts.gate_up_proj',
    'moe.experts.down': 'mlp.experts.down_proj',
    'attn_residual.residual_scale': 'post_attention_residual_scale.residual_scale',
    'attn_residual.residual_bias': 'post_attention_residual_scale.residual_bias',
    'attn_residual.branch_scale': 'post_attention_residual_scale.hidden_states_scale',
    'attn_residual.branch_bias': 'post_attention_residual_scale.hidden_states_bias',
    'moe_residual.residual_scale': 'post_mlp_residual_scale.residual_scale',
    'moe_residual.residual_bias': 'post_mlp_residual_scale.residual_bias',
    'moe_residual.branch_scale': 'post_mlp_residual_scale.hidden_states_scale',
    'moe_residual.branch_bias': 'post_mlp_residual_scale.hidden_states_bias',
}

# Config fields -> keys of config.json, and the keys that have one possible value here.
CONFIG_NAMES = {
    'vocab_size': 'vocab_size', 'context': 'max_position_embeddings', 'n_layer': 'num_hidden_layers',
    'n_embd': 'hidden_size', 'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads',
    'head_dim': 'head_dim', 'n_expert': 'num_experts', 'expert_dim': 'moe_intermediate_size',
    'router_dim': 'router_hidden_size', 'norm_eps': 'rms_norm_eps', 'init_std': 'initializer_range',
}
ROPE_NAMES = {'rope_base': 'rope_theta', 'rope_fraction': 'partial_rotary_factor'}          # inside rope_parameters
CONFIG_FIXED = {
    'model_type': 'zaya', 'hidden_act': 'silu', 'num_experts_per_tok': 1, 'tie_word_embeddings': True,
    'attention_bias': False, 'lm_head_bias': False, 'cca_time0': 2, 'cca_time1': 2, 'sliding_window': None,
}


def checkpoint_name(name):
    """'layers.3.attn.q_proj.weight' -> 'model.layers.3.self_attn.qkv_proj.q_proj.weight'."""
    if name in CHECKPOINT_NAMES:
        return CHECKPOINT_NAMES[name]
    _, i, inner = name.split('.', 2)
    stem, dot, last = inner.rpartition('.')                     # a whole name is in the table, or all but its last part
    inner = CHECKPOINT_NAMES.get(inner) or CHECKPOINT_NAMES[stem] + dot + last
    return f'model.layers.{i}.{inner}'


def checkpoint_files(folder):
    """The safetensors files of a folder: model.safetensors, or the shards that its index names."""
    index = os.path.join(folder, 'model.safetensors.index.json')
    names = ['model.safetensors']
    if os.path.exists(index) and not os.path.exists(os.path.join(folder, names[0])):
        shards = read_json(index).get('weight_map')
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f'{index}: should hold an object weight_map, from tensors to files')
        names = sorted(set(shards.values()))
    for name in names:
        if os.path.basename(name) != name or not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f'{folder}: the weights file {name} is missing')
    return [os.path.join(folder, name) for name in names]


def read_json(path):
    """The object in a JSON file. Raises ValueError that names the file."""
    try:
        with open(path, encoding='utf-8') as file:
            value = json.load(file)
    except OSError as error:
        raise ValueError(f'{path}: cannot be read ({error.strerror})') from None
    except ValueError as error:
        raise ValueError(f'{path}: is not valid JSON ({error})') from None
    if not isinstance(value, dict):
        raise ValueError(f'{path}: should hold a JSON object')
    return value


def config_from_json(folder):
    """config.json of a released checkpoint -> ZayaConfig. Raises ValueError for a variant not implemented here."""
    path = os.path.join(folder, 'config.json')
    given = read_json(path)
    for key, value in CONFIG_FIXED.items():
        if given.get(key, value) != value:
            raise ValueError(f'{path}: {key} is {given[key]!r}, nanoZAYA implements {value!r} only')
    if set(given.get('layer_types') or ['hybrid']) != {'hybrid'}:
        raise ValueError(f"{path}: layer_types holds {sorted(set(given['layer_types']))}, "
                         "nanoZAYA implements 'hybrid' only: no sliding-window layers")
    rope = given.get('rope_parameters') or {'hybrid': {}}
    if not isinstance(rope, dict) or not isinstance(rope.get('hybrid'), dict):
        raise ValueError(f"{path}: rope_parameters must hold an object 'hybrid'")
    rope = rope['hybrid']
    if rope.get('rope_type', 'default') != 'default':
        raise ValueError(f"{path}: rope_type is {rope['rope_type']!r}, nanoZAYA implements 'default' only")
    released = ZayaConfig.zaya1_8b()                            # a key that is left out has the released model's value
    sizes = {ours: given.get(theirs, getattr(released, ours)) for ours, theirs in CONFIG_NAMES.items()}
    sizes |= {ours: rope.get(theirs, getattr(released, ours)) for ours, theirs in ROPE_NAMES.items()}
    for ours, value in sizes.items():
        kind = type(getattr(released, ours))
        if type(value) not in (kind, int):
            raise ValueError(f'{path}: {(CONFIG_NAMES | ROPE_NAMES)[ours]} must be {kind.__name__}, got {value!r}')
    return ZayaConfig(**sizes, skip_expert=True)


def config_to_json(config):
    """ZayaConfig -> the contents of config.json. Raises ValueError without the skip class, which the layout demands."""
    if not config.skip_expert:
        raise ValueError('the released layout always has the skip class, this model has none: '
                         'train with skip_expert=True to export it')
    rope = {'rope_type': 'default'} | {theirs: getattr(config, ours) for ours, theirs in ROPE_NAMES.items()}
    return CONFIG_FIXED | {theirs: getattr(config, ours) for ours, theirs in CONFIG_NAMES.items()} | {
        'architectures': ['ZayaForCausalLM'], 'rope_parameters': {'hybrid': rope},
        'layer_types': ['hybrid'] * config.n_layer}


def set_tensor(model, name, tensor):
    """Put `tensor` in the place of the model's parameter or buffer `name`, whatever is there now."""
    module, _, name = name.rpartition('.')
    module = model.get_submodule(module)
    if name in module._parameters:
        tensor = nn.Parameter(tensor)
    setattr(module, name, tensor)


def _safetensors():
    """The optional package that reads and writes the released weights, or an error that says how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("released checkpoints need the package safetensors: pip install safetensors") from None
    return safetensors


def sizes(config):
    """Counts of a config, without allocating it: parameters in all; those that work on one token, embedding left out;
    KV-cache bytes a token in bf16 over all layers, for CCA and for full multi-head attention of the same width."""
    with torch.device('meta'):
        model = Zaya(config)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for layer in model.layers for p in layer.moe.experts.parameters())
    embedding = config.vocab_size * config.n_embd
    return {'total': total, 'active': total - embedding - experts + experts // config.n_expert,
            'kv_bytes': 2 * config.n_layer * 2 * config.n_kv_head * config.head_dim,
            'mha_kv_bytes': 2 * config.n_layer * 2 * config.n_embd}


# ---- checkpoints of a training run: a folder with ckpt.pt and, as long as it lasts, the one before it ----

def save_checkpoint(folder, state):
    """Write `state` (tensors, numbers, strings, lists and dicts of them) so that a crash at any moment leaves a whole
    checkpoint behind: into a temporary file, onto the disk (fsync), and only then under its name. Raises OSError if
    the disk is full, say; the checkpoints already there are then untouched."""
    new, current, previous = (os.path.join(folder, name) for name in ('ckpt.tmp', 'ckpt.pt', 'ckpt_previous.pt'))
    try:
        with open(new, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:                              # a full disk, Ctrl-C: leave no half file behind
        if os.path.exists(new):
            os.remove(new)
        if isinstance(error, (OSError, RuntimeError)):          # torch reports a failed write as either of them
            cause = error if isinstance(error, OSError) else error.__context__
            raise OSError(f'{new}: cannot be written ({getattr(cause, "strerror", None) or error})') from None
        raise
    if os.path.exists(current) and damage(current) is None:     # a damaged one must not push out a good one
        os.replace(current, previous)
    os.replace(new, current)                                    # killed before this line: ckpt_previous.pt is whole


def damage(path):
    """What is wrong with a file that save_checkpoint wrote, or None. torch.save writes a zip archive with a checksum for
    each part; torch.load ignores them."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
            return part and f'its part {part} is corrupt'
    except Exception as error:                                  # whatever a damaged file makes zipfile say
        return str(error)


def load_checkpoint(folder):
    """The newest undamaged checkpoint of a run folder, on the CPU, or None if it has none at all. A damaged file, or
    one of another program, is reported and its predecessor used. Raises ValueError if every one there is damaged."""
    paths = [os.path.join(folder, name) for name in ('ckpt.pt', 'ckpt_previous.pt')]
    paths = [path for path in paths if os.path.exists(path)]
    for path in paths:
        what = damage(path)
        try:
            if what is None:
                state = torch.load(path, map_location='cpu', weights_only=True)
                if isinstance(state, dict) and 'model_config' in state:
                    return state
                what = 'it is no checkpoint of train.py'
        except MemoryError:
            raise
        except pickle.UnpicklingError:                          # weights_only: nothing in the file is ever executed
            what = 'it holds more than tensors and plain values'
        except Exception as error:                              # whatever else a damaged file makes torch say
            what = error
        print(f'{path} is damaged ({what}): not used', file=sys.stderr)
    if paths:
        raise ValueError(f'{folder}: every checkpoint is damaged ({", ".join(paths)}); remove them to start anew')


if __name__ == '__main__':
    print(f'{"preset":<10}{"parameters":>16}{"active a token":>16}{"KV bytes a token":>18}{"full MHA":>10}{"smaller":>9}')
    for preset in (ZayaConfig.zaya1_8b, ZayaConfig.medium, ZayaConfig.small):
        n = sizes(preset())
        print(f'{preset.__name__:<10}{n["total"]:>16,}{n["active"]:>16,}{n["kv_bytes"]:>18,}{n["mha_kv_bytes"]:>10,}'
              f'{n["mha_kv_bytes"] / n["kv_bytes"]:>8.0f}x')
    print('active: parameters that work on one token, without the embedding. KV cache in bf16, over all layers.')
