"""fused.py equals the plain formulas, with all gradients."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

import cca
import fused
import model
from common import tiny_model, tokens

seeds, T, E = st.integers(0, 10**6), 7, 12


def leaves(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]


def check_equal(fast, plain, inputs, seed=0):
    ours, theirs = fast(*inputs), plain(*inputs)
    torch.testing.assert_close(ours, theirs)
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed), dtype=ours.dtype)
    for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g)):
        torch.testing.assert_close(a, b)


@given(seeds, st.sampled_from([(T, E), (2, T, E), (1, E)]), st.sampled_from([1e-5, 0.5]))
def test_rms_norm_equals_the_formula(seed, shape, eps):
    check_equal(lambda x, w: fused.RMSNorm.apply(x, w, eps), lambda x, w: model.rms_norm(x, w, eps),
                leaves(seed, shape, (E,)), seed)


@given(seeds, st.sampled_from([(T, E), (2, T, E)]))
def test_residual_scaling_equals_the_formula(seed, shape):
    check_equal(fused.ResidualScaling.apply, model.residual_scaling, leaves(seed, shape, shape, *[(E,)] * 4), seed)


@given(seeds, st.sampled_from([(4, 1, 8), (4, 2, 8), (6, 3, 4), (2, 2, 12)]), st.integers(1, 6), st.booleans())
def test_mix_equals_the_steps_one_by_one(seed, shape, S, packed):
    Hq, Hk, d = shape
    C, B, g = (Hq + Hk) * d, 2, torch.Generator().manual_seed(seed)
    table = [t.double() for t in cca.rope_table(torch.arange(S)[None] + seed % 100, d // 2, 10_000.0)]
    start = torch.rand(B, S, generator=g) < 0.4 if packed else None
    joined = lambda f: lambda *inputs: torch.cat(f(*inputs, *table, start), 1)
    check_equal(joined(fused.mix), joined(cca.mix),
                leaves(seed, (B, S, C), (B, 2, C), (C, 1, 2), (C,), (C, d, 2), (C,), (Hk,)), seed)


def test_mix_of_zeros_is_zero_with_finite_gradients():
    x, w, b, length = torch.zeros(1, 5, 24), torch.ones(3, 8, 24), torch.zeros(3, 8), torch.ones(3)
    x.requires_grad_()
    q, k = fused.Mix.apply(x, w, b, length, 1, *cca.rope_table(torch.arange(3)[None], 4, 10_000.0), None)
    (q.sum() + k.sum()).backward()
    assert q.eq(0).all() and k.eq(0).all() and x.grad.isfinite().all()


@given(seeds, st.integers(1, 20))
def test_permute_is_indexing(seed, rows):
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    check_equal(lambda x: fused.permute(x, order, order.argsort()), lambda x: x[order], leaves(seed, (rows, E)), seed)


@pytest.mark.parametrize('rows, V', [(3, 5), (700, 2000)])                      # the second: more than one piece
@pytest.mark.parametrize('scored', [1.0, 0.3])
def test_cross_entropy_in_pieces_equals_the_whole(rows, V, scored):
    x, W = leaves(0, (rows, E), (V, E))
    targets = torch.where(torch.rand(rows, generator=torch.Generator().manual_seed(0)) < scored, tokens(rows, vocab_size=V), -1)
    targets[0] = 0
    check_equal(lambda x, W: 3 * fused.CrossEntropy.apply(x, W, targets),
                lambda x, W: 3 * F.cross_entropy(F.linear(x, W), targets, ignore_index=-1), [x, W])


def test_the_loss_is_the_same_with_and_without_gradients_and_when_compiled_code_would_run(monkeypatch):
    """In all three the model takes different paths."""
    zaya, idx = tiny_model(), tokens(2, 9)
    with_grad = zaya(idx, idx)[1]
    with torch.no_grad():
        without = zaya(idx, idx)[1]
    monkeypatch.setattr(fused, 'wanted', lambda: False)
    plain = zaya(idx, idx)[1]
    for loss in without, plain:
        torch.testing.assert_close(loss, with_grad)
    for a, b in zip(torch.autograd.grad(with_grad, zaya.parameters()), torch.autograd.grad(plain, zaya.parameters())):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
