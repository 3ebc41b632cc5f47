"""Invariants of the optimizers (optim.py)."""
import functools

import pytest
import torch
from hypothesis import given, strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from common import tiny_model
from optim import POLAR_EXPRESS, Muon, make_optimizers, orthogonalize

shapes = st.sampled_from([(8, 8), (16, 64), (64, 16), (32, 48), (3, 20, 30), (1, 7)])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(shapes, st.integers(0, 10**6))
def test_the_update_has_singular_values_near_1(shape, seed):
    s = torch.linalg.svdvals(orthogonalize(random(*shape, seed=seed), POLAR_EXPRESS + 7 * ((1.875, -1.25, 0.375),)))
    assert s.min() > 0.6 and s.max() < 1.3


@given(st.lists(st.floats(0.02, 1), min_size=2, max_size=8))
def test_singular_values_above_a_hundredth_of_the_norm_end_within_0_27_of_1(s):
    s = torch.tensor(s)
    end = torch.linalg.svdvals(orthogonalize(torch.diag(s)))[s.sort(descending=True).values / s.norm() >= 0.01]
    assert (end - 1).abs().max() < 0.28


@given(shapes, st.integers(0, 10**6))
def test_the_update_keeps_the_singular_vectors(shape, seed):
    G = random(*shape, seed=seed)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    middle = U.mT @ orthogonalize(G) @ Vh.mT                    # diagonal in the basis of G's singular vectors
    off = middle - torch.diag_embed(middle.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3


@given(st.integers(0, 10**6))
def test_each_expert_of_a_stack_is_a_matrix_of_its_own(seed):
    G = random(4, 12, 20, seed=seed) * torch.tensor([1e-3, 1.0, 10.0, 1e3])[:, None, None]
    torch.testing.assert_close(orthogonalize(G), torch.stack([orthogonalize(g) for g in G]), atol=1e-5, rtol=1e-4)


def test_muon_equals_torch_s_own_for_each_of_many_matrices():
    """With its coefficients, Jordan's. It computes in bfloat16 on every device, hence the tolerance."""
    shapes = [(24, 24), (16, 40), (40, 16), (16, 40), (24, 24), (16, 40)]       # some have equal shapes
    start = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    a = Muon(ours, lr=0.05, weight_decay=0.1)
    a.orthogonalize = functools.partial(orthogonalize, coefficients=5 * [(3.4445, -4.7750, 2.0315)])
    b = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, momentum=0.95, adjust_lr_fn='match_rms_adamw')
    for step in range(5):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad, q.grad = (random(*p.shape, seed=100 * step + i) for _ in range(2))
        a.step()
        b.step()
    for before, p, q in zip(start, ours, theirs):
        assert (p - q).norm() < 0.02 * (q - before).norm()


def test_an_update_has_adamw_s_rms():
    p = torch.nn.Parameter(torch.zeros(256, 64))
    p.grad = random(256, 64)
    Muon([p], lr=1.0, weight_decay=0).step()
    assert 0.14 < p.detach().square().mean().sqrt() < 0.26      # 0.2, up to the spread of the singular values


def test_every_parameter_has_exactly_one_optimizer_and_matrices_have_muon():
    model = tiny_model()
    muon, adamw = ([p for group in o.param_groups for p in group['params']] for o in make_optimizers(model, 1e-3))
    assert len({*map(id, muon), *map(id, adamw)}) == len(muon) + len(adamw) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    for p in muon:
        assert p.ndim >= 2 and 'embedding' not in names[id(p)] and 'conv' not in names[id(p)]
    for p in adamw:
        assert p.ndim == 1 or 'embedding' in names[id(p)] or 'conv' in names[id(p)]


def test_vectors_do_not_decay():
    for group in make_optimizers(tiny_model(), 1e-3)[1].param_groups:
        assert all((p.ndim > 1) == (group['weight_decay'] > 0) for p in group['params'])


def stepped(found_inf=None, steps=2, **settings):
    """Return the matrices and momenta of a small model's Muon after `steps` steps, and Muon. found_inf: in the last."""
    model = tiny_model()
    muon = make_optimizers(model, 1e-2, **settings)[0]
    parameters = muon.param_groups[0]['params']
    for step in range(steps):
        for i, p in enumerate(parameters):
            p.grad = random(*p.shape, seed=100 * step + i)
        if step == steps - 1 and found_inf is not None:
            muon.found_inf = torch.tensor(found_inf)
            parameters[0].grad[:] = float('nan') if found_inf else parameters[0].grad
        muon.step()
    return [*parameters, *(muon.state[p]['momentum'] for p in parameters)], muon


@pytest.mark.parametrize('found_inf', [0.0, 1.0])
def test_a_step_with_found_inf_changes_no_weight_and_no_momentum(found_inf):
    """With 0 it is a plain step, bit for bit. The gradient of a skipped step is NaN somewhere."""
    expected, _ = stepped(steps=1 if found_inf else 2)
    assert all(a.equal(b) for a, b in zip(expected, stepped(found_inf)[0]))


def test_compiled_muon_equals_eager_and_a_new_learning_rate_does_not_recompile(monkeypatch):
    graphs, compile = CompileCounterWithBackend('aot_eager'), torch.compile
    monkeypatch.setattr(torch, 'compile', functools.partial(compile, backend=graphs))
    torch._dynamo.reset()
    eager, (compiled, muon) = stepped()[0], stepped(compile=True)
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b)
    n = graphs.frame_count
    assert 1 <= n <= 5                                          # shapes are dynamic; after 8 graphs torch gives up
    muon.param_groups[0]['lr'] *= 0.5
    for p in muon.param_groups[0]['params']:
        p.grad = random(*p.shape)
    muon.step()
    assert graphs.frame_count == n
