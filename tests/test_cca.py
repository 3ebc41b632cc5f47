"""Invariants of CCA (cca.py), piece by piece, then of the whole layer and its cache."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from cca import CCA, conv_depthwise, conv_grouped, convolve, norm, one_convolution, qk_mean, rope, rope_table
from common import randomize, tiny_config, tiny_model, tokens

heads = st.sampled_from([(4, 1, 8), (4, 2, 8), (6, 3, 4), (2, 2, 12)])          # Hq, Hk, d
seeds = st.integers(0, 10**6)


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(Hq, Hk, d, seed=0, dtype=torch.float32):
    return randomize(CCA(tiny_config(n_head=Hq, n_kv_head=Hk, head_dim=d), 0), seed).to(dtype)


def run(cca, x):
    return cca(x, *rope_table(torch.arange(x.shape[1])[None], 2, 10_000.0))


def before(x):
    """x_{t-1}, zero at t = 0."""
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


def both_convolutions(x, w1, b1, w2, b2):
    """Over x (B, S, C) and the padding before it, as in CCA.forward."""
    x = F.pad(x, (0, 0, 2, 0))
    x = conv_depthwise(x[:, :-1], x[:, 1:], w1, b1)
    return conv_grouped(x[:, :-1], x[:, 1:], w2, b2)


def check_causal(f, x, t):
    """Changing x at time t changes f(x) at t, and nothing before."""
    changed = x.clone()
    changed[:, t] += 1
    a, b = f(x), f(changed)
    assert torch.equal(a[:, :t], b[:, :t])
    assert not torch.equal(a[:, t], b[:, t])


# ---- causality ----

@given(st.integers(1, 12), st.data(), seeds)
def test_convolutions_are_causal(S, data, seed):
    t = data.draw(st.integers(0, S - 1))
    x = random(2, S, 12, seed=seed)
    check_causal(lambda x: conv_depthwise(before(x), x, random(12, 1, 2, seed=1), random(12, seed=2)), x, t)
    check_causal(lambda x: conv_grouped(before(x), x, random(12, 4, 2, seed=1), random(12, seed=2)), x, t)


@given(heads, st.integers(1, 12), st.data(), seeds)
def test_cca_is_causal(shape, S, data, seed):
    cca = layer(*shape, seed)
    check_causal(lambda x: run(cca, x), random(2, S, 32, seed=seed), data.draw(st.integers(0, S - 1)))


@given(st.integers(1, 12), st.data(), seeds)
def test_the_whole_model_is_causal(S, data, seed):
    model, idx, t = tiny_model(seed), tokens(2, S, seed=seed), data.draw(st.integers(0, S - 1))
    changed = idx.clone()
    changed[:, t] = (changed[:, t] + 1) % 50
    with torch.no_grad():
        a, b = model(idx)[0], model(changed)[0]
    assert (a[:, :t] - b[:, :t]).abs().max() < 1e-5 if t else True              # expert slices change size: not bit-equal
    assert (a[:, t] - b[:, t]).abs().max() > 1e-4


# ---- convolutions ----

@given(heads, st.integers(1, 9), seeds)
def test_convolutions_equal_conv1d_over_two_padded_zeros(shape, S, seed):
    Hq, Hk, d = shape
    C = (Hq + Hk) * d
    x = random(2, S, C, seed=seed)
    w1, b1 = random(C, 1, 2, seed=seed + 1), random(C, seed=seed + 2)
    w2, b2 = random(C, d, 2, seed=seed + 3), random(C, seed=seed + 4)
    ours = both_convolutions(x, w1, b1, w2, b2)
    theirs = F.conv1d(F.conv1d(F.pad(x.mT, (2, 0)), w1, b1, groups=C), w2, b2, groups=Hq + Hk).mT
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@given(heads, st.integers(1, 9), st.data(), seeds)
def test_one_convolution_equals_the_two_with_their_gradients_also_at_document_starts(shape, S, data, seed):
    Hq, Hk, d = shape
    C = (Hq + Hk) * d
    start = torch.tensor([data.draw(st.lists(st.booleans(), min_size=S, max_size=S)) for _ in range(2)])
    start[:, 0] = True                                                          # the padding's two columns are no document

    def two(x, w1, b1, w2, b2):
        """The definition, each document alone."""
        rows = []
        for row, begins in zip(x[:, 2:], start):
            lengths = torch.diff(begins.nonzero()[:, 0], append=torch.tensor([S])).tolist()
            rows.append(torch.cat([both_convolutions(part[None], w1, b1, w2, b2) for part in row.split(lengths)], 1))
        return torch.cat(rows)
    values = [random(*s, seed=seed + i, dtype=torch.float64).requires_grad_()
              for i, s in enumerate([(2, S + 2, C), (C, 1, 2), (C,), (C, d, 2), (C,)])]
    ours, theirs = convolve(values[0], *one_convolution(*values[1:]), start), two(*values)
    torch.testing.assert_close(ours, theirs)
    g = random(2, S, C, seed=seed, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, values, g), torch.autograd.grad(theirs, values, g)):
        torch.testing.assert_close(a, b)


@given(heads, st.integers(1, 9), seeds)
def test_one_convolution_continues_from_the_past(shape, S, seed):
    Hq, Hk, d = shape
    C = (Hq + Hk) * d
    x, *weights = (random(*s, seed=seed + i, dtype=torch.float64)
                   for i, s in enumerate([(2, S + 2, C), (C, 1, 2), (C,), (C, d, 2), (C,)]))
    y = conv_depthwise(x[:, :-1], x[:, 1:], *weights[:2])                       # the two columns of past are not zeros
    torch.testing.assert_close(convolve(x, *one_convolution(*weights)), conv_grouped(y[:, :-1], y[:, 1:], *weights[2:]))
    w, b = one_convolution(*weights)
    assert w.shape == (Hq + Hk, d, 3 * d) and b.shape == (Hq + Hk, d)


# ---- QK-mean, norm, RoPE, value shift ----

@given(heads, seeds)
def test_qk_mean_is_the_paper_s_head_by_head(shape, seed):
    Hq, Hk, d = shape
    q, k = random(2, 3, Hq, d, seed=seed), random(2, 3, Hk, d, seed=seed + 1)
    m_q, m_k = qk_mean(q, k)
    G = Hq // Hk
    for h in range(Hq):
        torch.testing.assert_close(m_q[:, :, h], (q[:, :, h] + k[:, :, h // G]) / 2)
    for h in range(Hk):
        torch.testing.assert_close(m_k[:, :, h], sum(m_q[:, :, h * G + i] for i in range(G)) / G)


@given(heads, seeds)
def test_norm_gives_each_head_its_length_and_keeps_its_direction(shape, seed):
    Hq, Hk, d = shape
    length, x = random(Hq + Hk, seed=seed), random(2, 3, Hq + Hk, d, seed=seed)
    y = norm(x, length)
    torch.testing.assert_close(y.norm(dim=-1), length.abs().expand(2, 3, -1))
    torch.testing.assert_close(F.cosine_similarity(x, y, dim=-1), length.sign().expand(2, 3, -1))


def test_queries_have_length_sqrt_d_and_keys_t_sqrt_d(monkeypatch):
    cca, seen = layer(4, 2, 8), {}
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, **_: seen.update(q=q, k=k) or q)
    run(cca, random(2, 5, 32, seed=1))
    torch.testing.assert_close(seen['q'].norm(dim=-1), torch.full((2, 4, 5), 8 ** 0.5))
    torch.testing.assert_close(seen['k'].norm(dim=-1), (cca.temperature.abs() * 8 ** 0.5)[:, None].expand(2, 2, 5))


def test_norm_of_zero_is_zero():
    assert norm(torch.zeros(1, 1, 2, 8), torch.ones(2)).eq(0).all()


@given(st.integers(0, 10**5), seeds)
def test_rope_keeps_norms_and_the_unrotated_dims(position, seed):
    x = random(2, 3, 4, 16, seed=seed)
    y = rope(x, *rope_table(position + torch.arange(3)[None], 8, 10_000.0))
    torch.testing.assert_close(x.norm(dim=-1), y.norm(dim=-1))
    assert torch.equal(x[..., 8:], y[..., 8:])
    assert not torch.equal(x[:, 1:, :, :8], y[:, 1:, :, :8])


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), seeds)
def test_rope_depends_on_distance_only(m, n, shift, seed):
    q, k = random(1, 1, 1, 8, seed=seed), random(1, 1, 1, 8, seed=seed + 1)
    at = lambda x, position: rope(x, *rope_table(torch.tensor([[position]]), 8, 10_000.0))
    dot = lambda a, b: (at(q, a) * at(k, b)).sum()
    torch.testing.assert_close(dot(m, n), dot(m + shift, n + shift), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_with_two_kv_heads_one_value_head_sees_this_token_and_one_the_token_before(monkeypatch):
    cca, x = layer(2, 2, 8), random(1, 5, 32, seed=1)
    cca.o_proj = torch.nn.Identity()
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, **_: v)      # lay the values bare
    y = run(cca, x)
    torch.testing.assert_close(y[..., :8], cca.v_proj(x))
    torch.testing.assert_close(y[:, 1:, 8:], cca.v_proj_delayed(x)[:, :-1])
    assert y[:, 0, 8:].eq(0).all()


def test_gradients_of_cca_are_right():
    cca = layer(4, 2, 4, dtype=torch.float64)
    names, parameters = zip(*cca.named_parameters())
    table = rope_table(torch.arange(5)[None], 2, 10_000.0)

    def f(x, *values):
        return torch.func.functional_call(cca, dict(zip(names, values)), (x, *table))
    x = random(1, 5, 32, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(f, (x, *(p.detach().clone().requires_grad_() for p in parameters)), fast_mode=True)


# ---- documents packed into one window ----

@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), seeds)
def test_a_packed_window_has_the_loss_and_gradients_of_its_documents_alone(lengths, seed):
    model, S = tiny_model(seed), sum(lengths)
    idx, targets = tokens(1, S, seed=seed), tokens(1, S, seed=seed + 1)
    start = torch.zeros(1, S, dtype=torch.bool)
    start[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    logits, loss = model(idx, start=start)[0], model(idx, targets, start=start)[1]
    loss.backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for x, y, n, there in zip(idx.split(lengths, 1), targets.split(lengths, 1), lengths, logits.split(lengths, 1)):
        alone, loss_alone = model(x)[0], model(x, y)[1]
        assert (alone - there).abs().max() < 1e-4
        (loss_alone * n / S).backward()
        loss = loss - loss_alone * n / S
    assert loss.abs() < 1e-5
    total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    for a, p in zip(packed, model.parameters()):
        assert (a - p.grad).norm() < 1e-3 * p.grad.norm() + 1e-6 * total


# ---- the cache ----

chunkings = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@torch.no_grad()
@given(chunkings, st.sampled_from([(4, 1), (4, 2), (4, 4)]), seeds)
def test_cached_forward_equals_the_full_forward_for_any_split(chunks, shape, seed):
    model, idx = tiny_model(seed, n_head=shape[0], n_kv_head=shape[1]), tokens(2, sum(chunks), seed=seed)
    cache = model.make_cache(2, sum(chunks))
    logits = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, 1)], 1)
    full = model(idx)[0]
    assert (logits - full).abs().max() < 1e-4
    assert logits.argmax(-1).equal(full.argmax(-1))


@torch.no_grad()
@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any), min_size=1, max_size=4), seeds)
def test_rows_of_different_lengths_get_what_they_get_alone(steps, seed):
    """Each step gives row b n_new[b] tokens, some none at all, the rest of the chunk being padding of random ids."""
    model, past = tiny_model(seed), [[], [], []]
    cache = model.make_cache(3, 5 * len(steps))
    for i, n_new in enumerate(steps):
        idx = tokens(3, max(n_new), seed=seed + i)
        logits, _ = model(idx, cache=cache, n_new=n_new)
        for b, n in enumerate(n_new):
            past[b] += idx[b, :n].tolist()
            if n:
                alone = model(torch.tensor([past[b]]))[0][0, -n:]
                assert (logits[b, :n] - alone).abs().max() < 1e-4
    assert cache.lengths == [len(p) for p in past]


@torch.no_grad()
def test_rows_that_leave_do_not_disturb_the_others():
    model, idx = tiny_model(), tokens(3, 9)
    cache = model.make_cache(3, 9)
    model(idx[:, :4], cache=cache)
    cache.keep([2, 0])
    logits = torch.cat([model(idx[[2, 0], t:t + 1], cache=cache)[0] for t in range(4, 9)], 1)
    assert (logits - model(idx[[2, 0]])[0][:, 4:]).abs().max() < 1e-4


def test_cache_holds_nothing_but_the_compressed_state():
    config = tiny_config()
    cache = tiny_model().make_cache(2, 10)
    L, d, Hq, Hk = config.n_layer, config.head_dim, config.n_head, config.n_kv_head
    stored = sum(t.numel() for t in vars(cache).values() if torch.is_tensor(t))
    assert stored == 2 * L * (10 * 2 * Hk * d + 2 * (Hq + Hk) * d + Hk * d // 2)


def test_a_full_cache_says_so():
    model = tiny_model()
    with pytest.raises(ValueError, match='capacity'):
        model(tokens(1, 5), cache=model.make_cache(1, 4))
