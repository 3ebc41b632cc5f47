"""Ablate the parts of CCA: `python -m evidence.cca_parts [--seeds=N] [--quick=True]`.

Claim. Two convolutions, the value shift and the query-key mean each recover a part of what compression to a small
latent loses (CCA paper, arXiv 2510.04476). Published losses of 350M/1.5B mixtures of experts after equal steps: none
2.280, one convolution 2.264, two 2.252, + value shift 2.248, + QK-mean 2.241. A part that raises the loss would refute
the claim.

Test. The parts are added one by one to the model of evidence/attention.py: 200 steps, at the learning rate that is best
for all parts together. The SwiGLU's width compensates for a convolution's parameters within 1 %.

Legend:  B batch   S sequence   E residual width   Hq, Hk query / KV heads   C channels of [q~; k~]   d head dim
"""
import statistics

import torch
import torch.nn.functional as F

import cca
from evidence.attention import match_parameters, run
from evidence.claims import by_seed, compare, fill_table, print_settings, print_verdicts, replaced, run_claim

LR = 1e-2


def identity_convolutions(C, d):
    """Return w1, b1, w2, b2 of two convolutions that are identities. Shapes: see cca.merge_convolutions."""
    w2 = torch.zeros(C, d, 2)
    w2[..., 1] = torch.eye(d).repeat(C // d, 1)
    return torch.tensor([0.0, 1.0]).expand(C, 1, 2), torch.zeros(C), w2, torch.zeros(C)


class AblatedCCA(cca.CCA):
    """CCA with the first `convolutions` of its two, identities in place of the others; without value shift, both value
    projections read the current token; without QK-mean, the means are 0. See CCA.forward."""
    convolutions, value_shift, qk_mean = 2, True, True

    def __init__(self, config, layer):
        super().__init__(config, layer)
        for name in ('depthwise', 'grouped')[self.convolutions:]:
            setattr(self, f'conv_{name}_weight', None)
            setattr(self, f'conv_{name}_bias', None)
        self.mix = self.mix_parts

    def mix_parts(self, qk, past, w1, b1, w2, b2, *rest):
        identity = identity_convolutions(qk.shape[-1], self.head_dim)
        convolutions = [identity[i] if w is None else w for i, w in enumerate((w1, b1, w2, b2))]
        with replaced('cca', qk_mean=qk_mean if self.qk_mean else lambda q, k: (0 * q, 0 * k)):
            return mix(qk, past, *convolutions, *rest)

    def forward(self, x, cos, sin, mask=None, start=None, cache=None):
        if self.value_shift:
            return super().forward(x, cos, sin, mask, start, cache)
        qk = torch.cat([self.q_proj(x), self.k_proj(x)], -1)                    # (B, S, C)
        q, k = self.mix(qk, None, self.conv_depthwise_weight, self.conv_depthwise_bias, self.conv_grouped_weight,
                        self.conv_grouped_bias, self.temperature, cos, sin, start)
        v = torch.cat([self.v_proj(x), self.v_proj_delayed(x)], -1).unflatten(-1, (self.Hk, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))                       # (B, Hq, S, d) -> (B, S, E)


mix, qk_mean = cca.mix, cca.qk_mean
ablated = lambda *parts: match_parameters(
    type('AblatedCCA', (AblatedCCA,), dict(zip(('convolutions', 'value_shift', 'qk_mean'), parts))))
ABLATIONS = {'none': ablated(0, False, False), 'one convolution': ablated(1, False, False),
             'two convolutions': ablated(2, False, False), '+ value shift': ablated(2, True, False),
             '+ QK-mean': ablated(2, True, True)}


def main(config):
    rows = fill_table('cca_parts', config, list(ABLATIONS),
                      lambda setting, seed: run(config, 'cca_parts', setting, seed, *ABLATIONS[setting], LR, steps=200))
    print_settings(rows, ABLATIONS, parameters=('parameters', ',.0f'), val_loss=('val loss, nats per token', '.3f'))
    print_verdicts(compare(rows, 'val_loss', 'nats', *zip(list(ABLATIONS)[1:], ABLATIONS), ('+ QK-mean', 'none')))


def draw(figure, rows):
    """Plot the loss as parts are added, one line per seed."""
    axis = figure.subplots()
    per_seed = list(zip(*(by_seed(rows, setting, 'val_loss') for setting in ABLATIONS)))
    for losses in per_seed:
        axis.plot(losses, 'o-', color='tab:blue', alpha=0.4, linewidth=1, markersize=4)
    axis.plot([statistics.fmean(losses) for losses in zip(*per_seed)], '_', color='black', markersize=30)
    axis.set(xticks=range(len(ABLATIONS)), xticklabels=ABLATIONS, ylabel='validation loss, nats per token')


if __name__ == '__main__':
    run_claim('cca_parts', main, draw)
