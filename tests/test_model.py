"""Invariants of layers.py and model.py. Equality to the reference implementation: test_reference.py."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

import model as model_module
from runtime.pretrained import save_pretrained
from common import randomize, tiny_config, tiny_model, tokens
from layers import ResidualScaling, RMSNorm, float32_matmuls
from model import CrossEntropy, Experts, Zaya, ZayaConfig, initial_value, sizes, swiglu

seeds = st.integers(0, 10**6)


def sorted_tokens(seed, T=40, **changes):
    """Return experts, x (T, E), expert (T), weight (T) of a random routing; some experts may have no tokens."""
    g = torch.Generator().manual_seed(seed)
    experts = randomize(Experts(tiny_config(**changes)), seed)
    expert = torch.randint(experts.gate_up.shape[0], (T,), generator=g) * torch.randint(2, (T,), generator=g)
    return experts, torch.randn(T, 32, generator=g), expert, torch.rand(T, generator=g)


@given(seeds, st.integers(1, 40), st.booleans())
def test_dispatch_equals_the_dense_one_hot_formula(seed, T, skip):
    experts, x, expert, weight = sorted_tokens(seed, T, skip_expert=skip)
    N = len(experts.gate_up)
    if skip:
        expert = torch.where(torch.arange(T) % 3 == 0, N, expert)               # class N, 'skip': no expert
    h = torch.einsum('te,nfe->tnf', x, experts.gate_up)                         # every token through every expert
    y = torch.einsum('tnf,nef->tne', swiglu(h), experts.down)
    dense = torch.einsum('tn,t,tne->te', F.one_hot(expert, N + 1)[:, :N].float(), weight, y)
    torch.testing.assert_close(experts(x, expert, weight), dense, atol=1e-5, rtol=1e-4)


@given(seeds, st.integers(1, 600), st.booleans())
def test_padded_slices_give_the_same_results_and_gradients(seed, T, skip):
    """With bf16 products on a CPU each expert's slice is padded with zeros; only rounding differs."""
    experts, x, expert, weight = sorted_tokens(seed, T, skip_expert=skip)
    leaves = [x.requires_grad_(), experts.gate_up, experts.down]
    found = []
    for precision in 'highest', 'medium':
        torch.set_float32_matmul_precision(precision)
        y = experts(x, expert, weight)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.set_float32_matmul_precision('highest')
    for exact, rounded in zip(*found):
        assert (rounded - exact).norm() <= 0.02 * exact.norm()


@given(seeds, st.booleans())
def test_gradients_of_dispatch_are_those_of_each_expert_alone(seed, skip):
    """Compared with one product per token; an expert without tokens has zero gradients."""
    experts, x, expert, weight = sorted_tokens(seed, skip_expert=skip)
    if skip:
        expert[::3] = len(experts.gate_up)
    leaves = [x.requires_grad_(), weight.requires_grad_(), experts.gate_up, experts.down]

    def one_by_one():
        return torch.stack([0 * x_t if e == len(experts.gate_up) else
                            w * experts.down[e] @ swiglu(experts.gate_up[e] @ x_t)
                            for x_t, e, w in zip(x, expert, weight)])
    g = torch.randn(40, 32, generator=torch.Generator().manual_seed(seed))
    grads = [torch.autograd.grad(y, leaves, g, materialize_grads=True)
             for y in (experts(x, expert, weight), one_by_one())]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_skipped_tokens_get_zero_and_finite_gradients_from_undefined_rows(monkeypatch):
    """grouped_mm leaves results and gradients after the last slice undefined; here they are NaN."""
    experts, x, expert, weight = sorted_tokens(0, skip_expert=True)
    expert[::3] = len(experts.gate_up)
    grouped_mm = model_module.grouped_mm

    def undefined(x, w, offs):
        y, n = grouped_mm(x, w, offs=offs), offs[-1]
        return torch.cat([y[:n], x[n:].sum(1, keepdim=True) * y[n:] * float('nan')])
    monkeypatch.setattr(model_module, 'grouped_mm', undefined)
    x.requires_grad_(), weight.requires_grad_()
    y = experts(x, expert, weight)
    y.square().sum().backward()
    assert y[::3].eq(0).all() and y.isfinite().all()
    assert weight.grad.isfinite().all() and weight.grad[::3].eq(0).all()
    assert x.grad.isfinite().all() and x.grad[::3].eq(0).all()


def test_float32_products_restores_the_precision_it_found():
    torch.set_float32_matmul_precision('high')
    with pytest.raises(KeyError), float32_matmuls():
        assert torch.get_float32_matmul_precision() == 'highest'
        raise KeyError
    assert torch.get_float32_matmul_precision() == 'high'


def test_residual_scaling_at_init_is_the_plain_residual():
    x, f = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    assert torch.equal(ResidualScaling(8)(x, f), x + f)


@given(seeds)
def test_residual_scaling_is_equation_6(seed):
    s, generator = randomize(ResidualScaling(8), seed), torch.Generator().manual_seed(seed)
    x, f = torch.randn(2, 2, 3, 8, generator=generator)
    expected = (x + s.residual_bias) * s.residual_scale + (f + s.branch_bias) * s.branch_scale
    torch.testing.assert_close(s(x, f), expected)


@given(seeds, st.floats(1e-3, 1e3))
def test_rms_norm_has_unit_rms_and_forgets_the_scale(seed, scale):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    y = RMSNorm(64, 1e-12)(x * scale)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(5))
    torch.testing.assert_close(y, RMSNorm(64, 1e-12)(x), atol=1e-4, rtol=1e-4)


@given(seeds, st.sampled_from([1e-12, 0.1]))
def test_rms_norm_is_torch_s_own(seed, eps):
    x, norm = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)), randomize(RMSNorm(64, eps), seed)
    x[0] = 0
    torch.testing.assert_close(norm(x), F.rms_norm(x, (64,), norm.weight, eps))


@torch.no_grad()
@given(st.permutations(range(5)), seeds)
def test_permuting_the_batch_permutes_the_output(order, seed):
    model, idx = tiny_model(seed), tokens(5, 7, seed=seed)
    torch.testing.assert_close(model(idx)[0][order], model(idx[order])[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@given(seeds)
def test_the_loss_is_the_mean_over_scored_targets(seed):
    model, idx, targets = tiny_model(seed), tokens(2, 9, seed=seed), tokens(2, 9, seed=seed + 1)
    targets[0, 3:] = -1
    logits, loss = model(idx)[0], model(idx, targets)[1]
    logp = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    torch.testing.assert_close(loss, -logp[targets >= 0].mean())


@pytest.mark.parametrize('rows, V', [(3, 5), (700, 2000)])                      # the second needs more than one piece
@pytest.mark.parametrize('scored', [1.0, 0.3])
def test_cross_entropy_in_pieces_equals_the_whole_with_its_gradients(rows, V, scored):
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 12, generator=g, dtype=torch.float64).requires_grad_() for n in (rows, V)]
    targets = torch.where(torch.rand(rows, generator=g) < scored, tokens(rows, vocab_size=V), -1)
    targets[0] = 0
    ours = 3 * CrossEntropy.apply(*leaves, targets)
    theirs = 3 * F.cross_entropy(F.linear(*leaves), targets, ignore_index=-1)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)):
        torch.testing.assert_close(a, b)


def test_the_loss_is_the_same_with_and_without_gradients():
    zaya, idx = tiny_model(), tokens(2, 9)
    with torch.no_grad():
        without = zaya(idx, idx)[1]
    torch.testing.assert_close(without, zaya(idx, idx)[1])


def test_a_fresh_model_has_the_loss_of_uniform_predictions():
    torch.manual_seed(0)
    model = Zaya(ZayaConfig())
    idx = tokens(2, 64, vocab_size=4096)
    assert abs(model(idx, idx.roll(1))[1].item() - torch.tensor(4096.0).log().item()) < 0.1


def test_initial_values_depend_on_the_seed_and_the_name_only():
    """Not on the state of the global generator. Each matrix has its own values and the documented std."""
    config = tiny_config(skip_expert=True, n_embd=64)
    torch.manual_seed(3)
    torch.rand(5)
    state = Zaya(config).state_dict()
    for name, value in state.items():
        assert value.equal(initial_value(name, value.shape, config, 3)), name
    matrices = [(name, value) for name, value in state.items() if value.ndim > 1]
    assert len({value.flatten()[0].item() for _, value in matrices}) == len(matrices)
    for name, value in matrices:
        std = value.shape[-1] ** -0.5 if 'router' in name else config.init_std
        assert value.std().item() == pytest.approx(std, rel=4 * (2 * value.numel()) ** -0.5), name
        assert not value.equal(initial_value(name, value.shape, config, 4)), name
    assert state['layers.0.moe.router.balancing_bias'].tolist() == [0.0] * 4 + [-1.0]
    assert state['layers.0.attn.temperature'].eq(1).all() and state['norm.weight'].eq(1).all()
    assert state['embedding_bias'].eq(0).all() and state['layers.0.attn_residual.branch_bias'].eq(0).all()


@torch.no_grad()
def test_last_only_gives_the_last_real_logits_of_each_sequence():
    model, idx = tiny_model(), tokens(3, 6)
    assert torch.allclose(model(idx, last_only=True)[0], model(idx)[0][:, -1:], atol=1e-5)
    n_new = [2, 6, 4]
    full = model(idx)[0]
    last = model(idx, cache=model.make_cache(3, 6), n_new=n_new, last_only=True)[0]
    for b, n in enumerate(n_new):
        assert torch.allclose(last[b, 0], full[b, n - 1], atol=1e-4)


def test_the_numbers_of_section_iv_d_are_float32_under_bf16():
    """Residual stream, router probabilities, logits, loss and the convolution state of the cache are float32 in a bf16
    model and under autocast; matrix products are bf16."""
    for autocast in (False, True):
        model = tiny_model()
        model = model if autocast else model.bfloat16()
        seen = {}
        layer = model.layers[1]
        layer.register_forward_hook(lambda m, args, out: seen.update(stream=out[0].dtype))
        layer.moe.router.register_forward_hook(lambda m, args, out: seen.update(weight=out[1].dtype))
        layer.attn.o_proj.register_forward_hook(lambda m, args, out: seen.update(attention=out.dtype))
        idx = tokens(2, 8)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            logits, loss = model(idx)[0], model(idx, idx)[1]
            cache = model.make_cache(2, 8)
            model(idx, cache=cache)
        assert {seen['stream'], seen['weight'], logits.dtype, loss.dtype, cache.qk[0].dtype,
                cache.v_last[0].dtype} == {torch.float32}
        assert seen['attention'] == torch.bfloat16


def test_bf16_is_close_to_float32():
    idx = tokens(2, 16)
    with torch.no_grad():
        exact, rounded = tiny_model()(idx)[0], tiny_model().bfloat16()(idx)[0]
    assert (exact - rounded).norm() / exact.norm() < 0.1


@pytest.mark.parametrize('idx, message', [(tokens(1, 65), '1 to 64 tokens'), (tokens(1, 1)[:, :0], '1 to 64 tokens')])
def test_too_long_and_empty_sequences_are_refused(idx, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(idx)
    model = tiny_model()
    cache = model.make_cache(1, 100)
    model(tokens(1, 64), cache=cache)
    with pytest.raises(ValueError, match='after 64 in the cache'):
        model(tokens(1, 1), cache=cache)
    with pytest.raises(ValueError, match='got 65'):
        model(tokens(2, 70), cache=model.make_cache(2, 100), n_new=[3, 65])


@pytest.mark.parametrize('bad', [dict(n_head=5), dict(n_layer=0), dict(head_dim=7, n_kv_head=1),
                                 dict(rope_fraction=0.4), dict(init_std=-1.0), dict(norm_eps=0.0),
                                 dict(rope_base=float('inf'))])
def test_impossible_sizes_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        tiny_config(**bad)


def test_sizes_equal_the_counts_of_an_allocated_model():
    config = tiny_config()
    n = sizes(config)
    model = Zaya(config)
    assert n['total'] == sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() for layer in model.layers for p in layer.moe.experts.parameters()) * 3 // 4
    assert n['active'] == n['total'] - 50 * 32 - idle
    assert n['kv_bytes'] == 2 * 2 * 3 * 2 * 8
    attention = 2 * 2 * sum(range(1, 65)) / 64 * 3 * 4 * 8        # 2 products, 2 FLOPs per multiply-add, 64 positions
    assert n['train_flops'] == pytest.approx(3 * (2 * (n['active'] + 50 * 32) + attention), rel=0.02)


def test_export_without_the_skip_class_is_refused(tmp_path):
    pytest.importorskip('safetensors')
    with pytest.raises(ValueError, match='skip'):
        save_pretrained(tiny_model(), tmp_path)


def test_a_window_without_targets_has_loss_zero_and_no_gradient():
    model, idx = tiny_model().train(), tokens(2, 8)
    loss = model(idx, torch.full_like(idx, -1))[1]
    loss.backward()
    assert loss == 0 and all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())
