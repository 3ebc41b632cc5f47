"""The ZAYA1 router: which one of the experts works on a token, and how all of them are kept busy.

The idea. Most mixture-of-experts models route with a single linear layer. ZAYA1 spends a little more: an MLP decides,
from a small state that is averaged over DEPTH, so that a layer's choice builds on those of the layers below it
(ZAYA1-8B report, arXiv 2605.05365, II-A2, eqs. 1-5):

    r_l = W_down h_l + b_down + gamma_l * r_{l-1}            Exponential Depth Averaging; h normed x, gamma_0 = 0
    s_l = softmax(MLP(RMSNorm(r_l)))                         MLP: linear, GELU, linear, GELU, linear (no bias)
    e   = argmax(s_l + b_l)                                  top-1; the balancing bias b_l only takes part here ...
    w   = s_l[e]                                             ... the output weight is the unbiased probability

Left alone, a router sends ever more tokens to whichever experts learned first. The Balancer below moves b_l after each
optimizer step so that each of N experts gets 1/N of the tokens. The loss never sees b_l: no auxiliary term bends its
gradient.

Legend:  B batch   S sequence   E residual width   R router width   N experts   M classes: N, or N + 1 with 'skip'
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from layers import RMSNorm, upcast


def choose(probs, bias):
    """Top-1 under the balancing bias. probs (..., M) float32, bias (M) -> expert (...) int64, weight (...) float32."""
    expert = (probs.detach() + bias).argmax(-1)
    return expert, probs.gather(-1, expert[..., None])[..., 0]


class Router(nn.Module):
    """The router of layer `layer`. forward: x (B, S, E) and the layer below's state -> expert, weight, state."""

    def __init__(self, config, layer):
        super().__init__()
        E, R, self.n_expert = config.n_embd, config.router_dim, config.n_expert
        M = self.n_expert + config.skip_expert
        self.down_proj = nn.Linear(E, R)
        self.eda_scale = nn.Parameter(torch.ones(R)) if layer > 0 else None     # gamma
        self.norm = RMSNorm(R, config.norm_eps)
        self.fc1, self.fc2 = nn.Linear(R, R), nn.Linear(R, R)
        self.out_proj = nn.Linear(R, M, bias=False)
        self.choose = choose                                    # rl.py puts another in its place, to replay choices
        # b_l is a buffer, not a parameter: saved with the model, invisible to the loss.
        self.register_buffer('balancing_bias', torch.zeros(M))
        # Tokens each expert got since the Balancer last looked. Bookkeeping, so it is not saved.
        self.register_buffer('load', torch.zeros(M, dtype=torch.int64), persistent=False)

    def forward(self, x, r_below=None):
        """x (B, S, E), r_below (B, S, R) or, in layer 0, None -> expert (B, S) int64, weight (B, S) float32, and the
        state r (B, S, R)."""
        r = self.down_proj(x)
        if self.eda_scale is not None:
            r = r + self.eda_scale * r_below
        h = F.gelu(self.fc1(self.norm(r)))
        h = F.gelu(self.fc2(h))
        probs = upcast(self.out_proj(h)).softmax(-1)                              # s_l (B, S, M), float32
        expert, weight = self.choose(probs, self.balancing_bias)
        if self.training:
            self.load += F.one_hot(expert.flatten(), len(self.load)).sum(0)     # no bincount: it would wait for the GPU
        return expert, weight, r            # class N, if there is one, is 'skip': the experts give such a token zero


def load_entropy(fractions):
    """How even a load is: H(p) / ln N, 1 when perfectly balanced, 0 when one expert gets all. (..., N) -> (...)."""
    return -torch.special.xlogy(fractions, fractions).sum(-1) / (math.log(fractions.shape[-1]) or 1)


class Balancer:
    """Moves every router's bias once per optimizer step, from what the experts got in the GLOBAL batch.

    The error of expert e is p_e - 1/N, p_e its fraction of the tokens. Three rules:
        'pid'   ZAYA1: AdamW takes a step on b with the error as its 'gradient'. The error is a PID controller's
                proportional signal; AdamW's first moment integrates it over time, its second moment damps the swings.
        'sign'  DeepSeek's, for comparison: a fixed step against the sign of the error.
        'none'  no balancing, to see the collapse.
    Make it after the model is on its device: it updates the routers' buffers in place.
    """

    def __init__(self, routers, rule='pid', lr=3e-2):
        if rule not in ('pid', 'sign', 'none'):
            raise ValueError(f"balancer rule {rule!r}: use 'pid', 'sign' or 'none'")
        self.routers, self.rule, self.lr = list(routers), rule, lr
        # Views of the experts' biases; the bias of 'skip', if there is one, stays where it is.
        self.biases = [router.balancing_bias[:router.n_expert] for router in self.routers]
        self.adamw = torch.optim.AdamW(self.biases, lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def step(self, update=True):
        """Read and clear the loads, summed over all ranks; move the biases unless `update` is False (a skipped step).
        Return the load fractions, (layers, N) float32."""
        loads = torch.stack([router.load[:router.n_expert] for router in self.routers])
        if dist.is_initialized():
            dist.all_reduce(loads)
        for router in self.routers:
            router.load.zero_()
        fractions = loads / loads.sum(-1, keepdim=True).clamp_min(1)
        error = fractions - loads.any(-1, keepdim=True) / loads.shape[-1]       # (layers, N); no tokens, no error
        if update and self.rule == 'pid':
            for bias, e in zip(self.biases, error):
                bias.grad = e
            self.adamw.step()
        elif update and self.rule == 'sign':
            for bias, e in zip(self.biases, error):
                bias -= self.lr * e.sign()
        return fractions
