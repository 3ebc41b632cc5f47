"""Invariants of CCA (cca.py), step by step, then of the whole layer and of the cache (cache.py)."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from cca import CCA, merge_convolutions, mix, norm, qk_mean, rope, rope_table
from common import randomize, tiny_config, tiny_model, tokens

heads = st.sampled_from([(4, 1, 8), (4, 2, 8), (6, 3, 4), (2, 2, 12)])          # Hq, Hk, d
seeds = st.integers(0, 10**6)


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(Hq, Hk, d, seed=0, dtype=torch.float32):
    return randomize(CCA(tiny_config(n_head=Hq, n_kv_head=Hk, head_dim=d), 0), seed).to(dtype)


def run(cca, x):
    return cca(x, *rope_table(torch.arange(x.shape[1])[None], 2, 10_000.0))


# ---- reference: the two convolutions and the steps of the paper, which merge_convolutions and mix must equal ----

def conv_depthwise(before, now, weight, bias):
    """y_t = w_0 x_{t-1} + w_1 x_t + b, within each channel. before = x_{t-1}, now = x_t: (B, S, C) -> (B, S, C)."""
    w_before, w_now = weight[:, 0].unbind(-1)                                   # (C) each
    return before * w_before + (now * w_now + bias)


def conv_grouped(before, now, weight, bias):
    """y_t = W_0 x_{t-1} + W_1 x_t + b, within the channels of each head."""
    C, d, _ = weight.shape
    x = torch.stack([before, now], 2).unflatten(-1, (C // d, d))                # (B, S, 2, H, d)
    w = weight.view(C // d, d, d, 2)                                            # (head, out, in, time)
    return torch.einsum('bsthi,hoit->bsho', x, w).flatten(-2) + bias


def before(x):
    """Return x_{t-1}, zero at t = 0."""
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


def both_convolutions(x, w1, b1, w2, b2):
    """Apply both. x (B, S + 2, C), starting with two past tokens -> (B, S, C)."""
    x = conv_depthwise(x[:, :-1], x[:, 1:], w1, b1)
    return conv_grouped(x[:, :-1], x[:, 1:], w2, b2)


def mix_step_by_step(qk, past, w1, b1, w2, b2, temperature, cos, sin, start=None):
    """cca.mix by the paper's equations: two convolutions, one document at a time, one head at a time."""
    (B, S, C), d, Hk = qk.shape, w2.shape[1], len(temperature)
    Hq = C // d - Hk
    past = qk.new_zeros(B, 2, C) if past is None else past
    rows = []
    for b in range(B):
        begins = [] if start is None else [s for s in range(S) if start[b, s]]
        cuts = [*dict.fromkeys([0, *begins]), S]
        rows.append(torch.cat([both_convolutions(torch.cat([torch.zeros_like(past[b]) if s0 in begins else past[b],
                                                            qk[b, s0:s1]])[None], w1, b1, w2, b2)
                               for s0, s1 in zip(cuts, cuts[1:])], 1))
    split = lambda x: x.unflatten(-1, (Hq + Hk, d)).unbind(2)                   # heads, (B, S, d) each
    heads, latents, G, out = split(torch.cat(rows)), split(qk), Hq // Hk, []
    m_q = [(latents[h] + latents[Hq + h // G]) / 2 for h in range(Hq)]
    m_k = [sum(m_q[h * G:(h + 1) * G]) / G for h in range(Hk)]
    size = [d ** 0.5] * Hq + [t * d ** 0.5 for t in temperature]
    for z, m, length in zip(heads, m_q + m_k, size):
        y = length * F.normalize(z + m, dim=-1)
        n = cos.shape[-1]
        one, two, rest = y.split([n, n, d - 2 * n], -1)
        out.append(torch.cat([one * cos - two * sin, two * cos + one * sin, rest], -1))
    return torch.stack(out[:Hq], 1), torch.stack(out[Hq:], 1)


def check_causal(f, x, t):
    """Changing x at time t changes f(x) at t and not before."""
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
    assert (a[:, :t] - b[:, :t]).abs().max() < 1e-5 if t else True      # not bit-equal: expert slices differ in size
    assert (a[:, t] - b[:, t]).abs().max() > 1e-4


# ---- convolutions ----

def weights_of_convolutions(Hq, Hk, d, seed, dtype=torch.float64):
    C = (Hq + Hk) * d
    return [random(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate([(C, 1, 2), (C,), (C, d, 2), (C,)], 1)]


@given(heads, st.integers(1, 9), seeds)
def test_convolutions_equal_conv1d_over_two_padded_zeros(shape, S, seed):
    Hq, Hk, d = shape
    C = (Hq + Hk) * d
    x, (w1, b1, w2, b2) = random(2, S, C, seed=seed), weights_of_convolutions(*shape, seed, torch.float32)
    ours = both_convolutions(F.pad(x, (0, 0, 2, 0)), w1, b1, w2, b2)
    theirs = F.conv1d(F.conv1d(F.pad(x.mT, (2, 0)), w1, b1, groups=C), w2, b2, groups=Hq + Hk).mT
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@given(heads, st.integers(1, 9), seeds)
def test_the_merged_convolution_equals_the_two(shape, S, seed):
    Hq, Hk, d = shape
    C, H = (Hq + Hk) * d, Hq + Hk
    x, weights = random(2, S + 2, C, seed=seed, dtype=torch.float64), weights_of_convolutions(*shape, seed)
    w, b = merge_convolutions(*weights)
    assert w.shape == (H, d, 3 * d) and b.shape == (H, d)
    kernel = w.unflatten(-1, (3, d)).permute(0, 1, 3, 2).flatten(0, 1)          # as in nn.Conv1d: (C, d, 3)
    merged = F.conv1d(x.mT, kernel, b.flatten(), groups=H).mT
    torch.testing.assert_close(merged, both_convolutions(x, *weights))


@given(heads, st.integers(1, 7), st.booleans(), st.booleans(), seeds)
def test_mix_equals_the_steps_one_by_one_with_its_gradients(shape, S, has_past, packed, seed):
    """For whole sequences, continued sequences, and windows in which documents start at any token."""
    Hq, Hk, d = shape
    C, g = (Hq + Hk) * d, torch.Generator().manual_seed(seed)
    start = torch.rand(2, S, generator=g) < 0.4 if packed else None
    table = [t.double() for t in rope_table(torch.arange(S)[None] + seed % 100, d // 2 // 2 * 2, 10_000.0)]
    inputs = [random(2, S, C, seed=seed, dtype=torch.float64), random(2, 2, C, seed=seed + 9, dtype=torch.float64),
              *weights_of_convolutions(*shape, seed), random(Hk, seed=seed + 8, dtype=torch.float64)]
    leaves = [t.requires_grad_() for t in inputs]
    arguments = leaves if has_past else [leaves[0], None, *leaves[2:]]
    ours, theirs = (torch.cat(f(*arguments, *table, start), 1) for f in (mix, mix_step_by_step))
    torch.testing.assert_close(ours, theirs)
    weight = random(*ours.shape, seed=seed, dtype=torch.float64)
    grads = [torch.autograd.grad(y, leaves, weight, materialize_grads=True) for y in (ours, theirs)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_mix_of_zeros_is_zero_with_finite_gradients():
    x, w1, w2, b = torch.zeros(1, 3, 24).requires_grad_(), torch.ones(24, 1, 2), torch.ones(24, 8, 2), torch.zeros(24)
    q, k = mix(x, None, w1, b, w2, b, torch.ones(1), *rope_table(torch.arange(3)[None], 4, 1e4))
    (q.sum() + k.sum()).backward()
    assert q.eq(0).all() and k.eq(0).all() and x.grad.isfinite().all()


# ---- QK-mean, norm, RoPE, value shift ----

@given(heads, seeds)
def test_qk_mean_is_the_paper_s_head_by_head(shape, seed):
    Hq, Hk, d = shape
    q, k = random(Hq, 2, 3, d, seed=seed), random(Hk, 2, 3, d, seed=seed + 1)
    m_q, m_k = qk_mean(q, k)
    G = Hq // Hk
    for h in range(Hq):
        torch.testing.assert_close(m_q[h], (q[h] + k[h // G]) / 2)
    for h in range(Hk):
        torch.testing.assert_close(m_k[h], sum(m_q[h * G + i] for i in range(G)) / G)


@given(heads, seeds)
def test_norm_gives_each_head_its_length_and_keeps_its_direction(shape, seed):
    Hq, Hk, d = shape
    size, x = random(Hq + Hk, seed=seed), random(Hq + Hk, 2, 3, d, seed=seed)
    y = norm(x, size)
    torch.testing.assert_close(y.norm(dim=-1), size.abs()[:, None, None].expand(-1, 2, 3))
    torch.testing.assert_close(F.cosine_similarity(x, y, dim=-1), size.sign()[:, None, None].expand(-1, 2, 3))


def test_queries_have_length_sqrt_d_and_keys_t_sqrt_d(monkeypatch):
    cca, seen = layer(4, 2, 8), {}
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, **_: seen.update(q=q, k=k) or q)
    run(cca, random(2, 5, 32, seed=1))
    torch.testing.assert_close(seen['q'].norm(dim=-1), torch.full((2, 4, 5), 8 ** 0.5))
    torch.testing.assert_close(seen['k'].norm(dim=-1), (cca.temperature.abs() * 8 ** 0.5)[:, None].expand(2, 2, 5))


def test_norm_of_zero_is_zero():
    assert norm(torch.zeros(2, 1, 1, 8), torch.ones(2)).eq(0).all()


@given(st.integers(0, 10**5), seeds)
def test_rope_keeps_norms_and_the_unrotated_dims(position, seed):
    x = random(4, 2, 3, 16, seed=seed)
    y = rope(x, *rope_table(position + torch.arange(3)[None], 8, 10_000.0))
    torch.testing.assert_close(x.norm(dim=-1), y.norm(dim=-1))
    assert torch.equal(x[..., 8:], y[..., 8:])
    assert not torch.equal(x[:, :, 1:, :8], y[:, :, 1:, :8])


@given(st.integers(0, 500), seeds)
def test_rope_turns_dims_i_and_i_plus_n_by_the_angle(position, seed):
    x, table = random(2, 1, 3, 12, seed=seed), rope_table(position + torch.arange(3)[None], 8, 10_000.0)
    points = lambda x: torch.complex(x[..., :4], x[..., 4:8])                   # a rotation is a complex product
    torch.testing.assert_close(points(rope(x, *table)), points(x) * torch.complex(*table))


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
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, **_: v)      # return the values
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
    """Each step appends n_new[b] >= 0 tokens to sequence b; the rest of the chunk is padding with random tokens."""
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
def test_removing_sequences_does_not_change_the_others():
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
    lists = [value for value in vars(cache).values() if isinstance(value, list) and torch.is_tensor(value[0])]
    stored = sum(t.numel() for tensors in lists for t in tensors)
    assert stored == 2 * L * (11 * 2 * Hk * d + 2 * (Hq + Hk) * d + Hk * d // 2)        # 11: one position for padding


@torch.no_grad()
def test_padding_leaves_no_trace_even_if_it_is_not_a_number():
    """With equal real tokens and different padding, the cached tensors and the logits are equal."""
    model, idx = tiny_model(), tokens(2, 4)
    other, kept = idx.clone(), []
    other[0, 2:] = 7
    for padded in idx, other:
        cache = model.make_cache(2, 6)
        model(padded, cache=cache, n_new=[2, 4])
        logits = model(idx[:, :1], cache=cache)[0]
        kept.append([[t[:, :, :-1] for t in cache.k + cache.v], cache.qk + cache.v_last, logits])
    torch.testing.assert_close(*kept, rtol=0, atol=0)
    for t in cache.k + cache.v:
        t[:, :, -1] = float('nan')                              # the position of padding tokens
    assert model(idx[:, :1], cache=cache)[0].isfinite().all()


def test_exceeding_the_capacity_raises():
    model = tiny_model()
    with pytest.raises(ValueError, match='capacity'):
        model(tokens(1, 5), cache=model.make_cache(1, 4))
