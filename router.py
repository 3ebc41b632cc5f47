"""The ZAYA1 router: it chooses one expert per token. The balancer: it keeps the load of the experts even.

The idea. Most mixture-of-experts models route with a single linear layer. ZAYA1 routes with an MLP, on a small state
that is averaged over depth, so that a layer's choice depends on the router states of the layers below (ZAYA1-8B report,
arXiv 2605.05365, II-A2, eqs. 1-5):

    r_l = W_down x_l + b_down + gamma_l * r_{l-1}            Exponential Depth Averaging; x_l normed, gamma_0 = 0
    s_l = softmax(MLP(RMSNorm(r_l)))                         MLP: linear, GELU, linear, GELU, linear (no bias)
    e   = argmax(s_l + b_l)                                  top-1; the balancing bias b_l affects the choice only
    w   = s_l[e]                                             the expert's output is weighted by s, without the bias

Without balancing, the experts that learn first receive ever more tokens. After each optimizer step the Balancer moves
b_l so that each of N experts receives about 1/N of the tokens. There is no auxiliary loss; b_l has no gradient.

Legend:  B batch   S sequence   E residual width   R router width   N experts   M classes: N, or N + 1 with 'skip'
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from layers import RMSNorm, upcast


def choose(probs, bias):
    """Return the top-1 expert under the balancing bias, (...) int64, and its own probability, (...) float32.
    probs (..., M) float32, bias (M)."""
    expert = (probs.detach() + bias).argmax(-1)
    return expert, probs.gather(-1, expert[..., None])[..., 0]


class Router(nn.Module):
    """The router of layer `layer`. forward: x and the router state of the layer below -> expert, weight, state."""

    def __init__(self, config, layer):
        super().__init__()
        E, R, self.n_expert = config.n_embd, config.router_dim, config.n_expert
        M = self.n_expert + config.skip_expert
        self.down_proj = nn.Linear(E, R)
        self.eda_scale = nn.Parameter(torch.ones(R)) if layer > 0 else None     # gamma
        self.norm = RMSNorm(R, config.norm_eps)
        self.fc1, self.fc2 = nn.Linear(R, R), nn.Linear(R, R)
        self.out_proj = nn.Linear(R, M, bias=False)
        self.choose = choose                                    # rl.py replaces it, to replay recorded choices
        self.register_buffer('balancing_bias', torch.zeros(M))  # b_l: saved, but no parameter, so without gradient
        self.register_buffer('load', torch.zeros(M, dtype=torch.int64), persistent=False)   # tokens per class

    def forward(self, x, r_below=None):
        """x (B, S, E), r_below (B, S, R), None in layer 0 -> expert (B, S) int64, weight (B, S) float32 and the router
        state r (B, S, R). Class N, if there is one, is 'skip': the MoE output of such a token is zero."""
        r = self.down_proj(x)
        if self.eda_scale is not None:
            r = r + self.eda_scale * r_below
        h = F.gelu(self.fc1(self.norm(r)))
        h = F.gelu(self.fc2(h))
        probs = upcast(self.out_proj(h)).softmax(-1)                              # s_l (B, S, M), float32
        expert, weight = self.choose(probs, self.balancing_bias)
        if self.training:
            self.load += F.one_hot(expert.flatten(), len(self.load)).sum(0)     # bincount would sync with the GPU
        return expert, weight, r


def load_entropy(fractions):
    """Return H(p) / ln N of load fractions (..., N) -> (...): 1 for an even load, 0 if one expert gets all tokens."""
    return -torch.special.xlogy(fractions, fractions).sum(-1) / (math.log(fractions.shape[-1]) or 1)


class Balancer:
    """Moves the balancing biases of all routers once per optimizer step, by the expert load of the GLOBAL batch.

    The error of expert e is p_e - 1/N, where p_e is its fraction of the tokens that are not skipped. Three rules:
        'pid'   ZAYA1: AdamW (no decay) steps on b_l with the error as gradient. PID-inspired: the error is the
                proportional signal, b_l accumulates it, AdamW's moments smooth and damp it.
        'sign'  DeepSeek's rule, for comparison: a step of fixed size against the sign of the error.
        'none'  no balancing, to show the collapse.
    Any other raises ValueError. Create it after the model is on its device: it holds views of the routers' buffers."""

    def __init__(self, routers, rule='pid', lr=3e-2):
        if rule not in ('pid', 'sign', 'none'):
            raise ValueError(f"balancer rule {rule!r}: use 'pid', 'sign' or 'none'")
        self.routers, self.rule, self.lr = list(routers), rule, lr
        # Views of the experts' biases. The bias of 'skip', if there is one, does not change.
        self.biases = [router.balancing_bias[:router.n_expert] for router in self.routers]
        self.adamw = torch.optim.AdamW(self.biases, lr=lr, weight_decay=0.0, fused=self.biases[0].is_cuda)

    @torch.no_grad()
    def step(self, found_inf=None):
        """Update the biases unless found_inf (0-d float32, as in train_step) is 1; always reset the load counters.
        Return the load fractions, tokens per expert / tokens of all experts, over all ranks, (layers, N) float32."""
        loads = torch.stack([router.load[:router.n_expert] for router in self.routers])
        if dist.is_initialized():
            dist.all_reduce(loads)
        for router in self.routers:
            router.load.zero_()
        fractions = loads / loads.sum(-1, keepdim=True).clamp_min(1)
        error = fractions - loads.any(-1, keepdim=True) / loads.shape[-1]       # (layers, N); 0 if no token was routed
        self.adamw.found_inf = found_inf if loads.is_cuda else None     # read by the kernel, else in the next line
        if self.rule == 'pid' and (loads.is_cuda or not found_inf):
            for bias, e in zip(self.biases, error):
                bias.grad = e
            self.adamw.step()
        elif self.rule == 'sign':
            for bias, e in zip(self.biases, error):
                bias -= self.lr * e.sign() * (1 if found_inf is None else 1 - found_inf)
        return fractions
