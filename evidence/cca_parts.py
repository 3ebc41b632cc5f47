"""Does each part of CCA lower the loss? `python -m evidence.cca_parts [--seeds=N] [--quick=True]`.

Claim. What small latents lose, two convolutions, a delayed half of the values and a query-key mean give back, each a
little (CCA paper, arXiv 2510.04476, ablation). Published: loss of 350M/1.5B mixtures of experts after the same steps,

    none 2.280    one convolution 2.264    two 2.252    + value shift 2.248    + QK-mean 2.241

Test. The same ladder with the model of evidence/attention.py: 200 steps over the same data, at the learning rate that
is best for all parts together. From rung to rung a step of cca.py is replaced from outside. What is left out:

    a convolution   looks at the newer of its two tokens alone, by an identity; the first to come is the depthwise one
    value shift     W_V1 and W_V2 both see this token
    QK-mean         the means are 0, so that queries and keys are the convolutions' alone

The SwiGLU's width makes up for a convolution's parameters, within 1 %. A rung above the one before it would refute.

Legend:  B batch   S sequence   E residual width   Hq, Hk query / KV heads   C channels of [q~; k~]   d head dim
"""
import statistics

import torch
import torch.nn.functional as F

import cca
from evidence.attention import matched, run
from evidence.claims import by_seed, run_claim, replaced, table, verdict, with_seeds

LR = 1e-2
PUBLISHED = 2.280, 2.264, 2.252, 2.248, 2.241


def idle_convolutions(C, d):
    """w1, b1, w2, b2 of convolutions that do nothing. Shapes: see cca.merge_convolutions."""
    w2 = torch.zeros(C, d, 2)
    w2[..., 1] = torch.eye(d).repeat(C // d, 1)
    return torch.tensor([0.0, 1.0]).expand(C, 1, 2), torch.zeros(C), w2, torch.zeros(C)


def no_mean(q, k):
    return torch.zeros_like(q), torch.zeros_like(k)


class Rung(cca.CCA):
    """CCA with the first few convolutions, with or without value shift and QK-mean. See CCA.forward."""
    convolutions, value_shift, qk_mean = 2, True, True

    def __init__(self, config, layer):
        super().__init__(config, layer)
        for name in ('depthwise', 'grouped')[self.convolutions:]:
            setattr(self, f'conv_{name}_weight', None)
            setattr(self, f'conv_{name}_bias', None)
        self.mix = self.mix_parts

    def mix_parts(self, qk, past, w1, b1, w2, b2, *rest):
        idle = idle_convolutions(qk.shape[-1], self.head_dim)
        convolutions = [idle[i] if w is None else w for i, w in enumerate((w1, b1, w2, b2))]
        with replaced('cca', qk_mean=qk_mean if self.qk_mean else no_mean):
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
rung = lambda *parts: matched(type('Rung', (Rung,), dict(zip(('convolutions', 'value_shift', 'qk_mean'), parts))))
LADDER = {'none': rung(0, False, False), 'one convolution': rung(1, False, False),
          'two convolutions': rung(2, False, False), '+ value shift': rung(2, True, False),
          '+ QK-mean': rung(2, True, True)}


def main(config):
    rows = table('cca_parts', config, list(LADDER),
                 lambda setting, seed: run(config, 'cca_parts', setting, seed, *LADDER[setting], LR, steps=200))
    losses = {setting: by_seed(rows, setting, 'val_loss') for setting in LADDER}
    print('| parts | parameters | val loss (seeds) | published |')
    print('| --- | --- | --- | --- |')
    for (setting, of_seeds), published in zip(losses.items(), PUBLISHED):
        parameters = next(row['parameters'] for row in rows if row['setting'] == setting)
        print(f'| {setting} | {int(parameters):,} | {with_seeds(of_seeds, ".4f")} | {published:.3f} |')
    for before, after in zip(LADDER, list(LADDER)[1:]):
        verdict(f'{after} below {before}', losses[after], losses[before])
    verdict('all parts below none', losses['+ QK-mean'], losses['none'])


def draw(plt, rows):
    """From rung to rung: the loss, a line a seed."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
    of_seeds = list(zip(*(by_seed(rows, setting, 'val_loss') for setting in LADDER)))
    for losses in of_seeds:
        axis.plot(losses, 'o-', color='tab:blue', alpha=0.4, linewidth=1, markersize=4)
    axis.plot([statistics.fmean(losses) for losses in zip(*of_seeds)], '_', color='black', markersize=30)
    axis.set(xticks=range(len(LADDER)), xticklabels=LADDER, ylabel='loss on held-out files, nats a token')
    return figure


if __name__ == '__main__':
    run_claim('cca_parts', main, draw)
