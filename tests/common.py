"""Small models for the tests."""
import torch

from model import Zaya, ZayaConfig


def tiny_config(**changes):
    return ZayaConfig(**dict(vocab_size=50, context=64, n_layer=3, n_embd=32, n_head=4, n_kv_head=2, head_dim=8,
                             n_expert=4, expert_dim=16, router_dim=8) | changes)


@torch.no_grad()
def randomize(module, seed=0):
    """Every parameter and float buffer random: a fresh model's ones and zeros would hide errors."""
    g = torch.Generator().manual_seed(seed)
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        if t.is_floating_point() and 'inv_freq' not in name:     # RoPE's frequencies are not learned
            t.copy_(torch.randn(t.shape, generator=g) * (0.3 if t.ndim < 2 else t.shape[-1] ** -0.5)
                    + ('scale' in name or 'norm' in name or 'temp' in name))
    return module


def tiny_model(seed=0, **changes):
    return randomize(Zaya(tiny_config(**changes)), seed).eval()


def tokens(*shape, seed=0, vocab_size=50):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
