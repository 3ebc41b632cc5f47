"""The kernel of kernels/ compared with float64, on a GPU emulated on the CPU (emulated_gpu.h); and its code for GPUs.

NANOZAYA_CPU_BUILD selects a build for the CPU (emulated_gpu.py); tests marked with `every_build` run with all.
"""
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import assembly
import emulated_gpu
import kernels
from cca import mix
from common import ENV, ROOT, tiny_model, tokens
from kernels import build

BUILD = os.environ.get('NANOZAYA_CPU_BUILD', 'cpu')
every_build = settings(max_examples=30 if BUILD == 'cpu' else 4)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SMALL, LARGE = 1, 2                                             # tiles, as in cca.h

heads = st.sampled_from([(1, 1, 64), (4, 2, 64), (6, 2, 64), (2, 1, 128), (3, 3, 128)])          # Hq, Hk, d
dtypes = st.sampled_from(list(BOUND))
seeds = st.integers(0, 10**6)


@pytest.fixture(scope='module', autouse=True)
def library():
    """kernels.load also works for the CPU."""
    if shutil.which(os.environ.get('CXX', 'g++')) is None:
        pytest.skip('no g++ to build the kernel for the CPU')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, 'load', emulated_gpu.load)
        kernels.load('cpu')
        yield
    kernels.trouble.cache_clear()


@pytest.fixture(autouse=True)
def poison():
    """Uninitialized tensors are NaN, so that a kernel which leaves part of a result or workspace unwritten fails."""
    torch.use_deterministic_algorithms(True)                    # fill_uninitialized_memory, on by default, needs it
    yield
    torch.use_deterministic_algorithms(False)


def table(positions, n):
    angle = positions[..., None] * 10_000.0 ** -(torch.arange(n, dtype=torch.float64) / n)
    return angle.cos().float(), angle.sin().float()


def problem(dtype, B, S, Hq, Hk, d, past, start, own_positions, seed=0):
    """Return random arguments of the operators as a dict; biases and temperature are random, too."""
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    C = (Hq + Hk) * d
    positions = torch.randint(5000, (B if own_positions else 1, 1), generator=g) + torch.arange(S)
    cos, sin = table(positions, d // 4)
    return dict(qk=random(B, S, C), past=random(B, 2, C) if past else None, w1=random(C, 1, 2), b1=random(C),
                w2=random(C, d, 2) / d ** 0.5, b2=random(C), temperature=random(Hk), cos=cos, sin=sin,
                start=torch.rand(B, S, generator=g) < 0.3 if start else None)


def reference(qk, past, w1, b1, w2, b2, temperature, cos, sin, start):
    """Compute q and k from the equations, one document at a time, with conv1d. temperature (B, S, Hk): one per token,
    see `exact`."""
    B, S, C = qk.shape
    d, Hk = w2.shape[1], temperature.shape[-1]
    Hq, G, n = C // d - Hk, (C // d - Hk) // Hk, cos.shape[-1]
    mixed = []
    for b in range(B):
        starts = [0] + [s for s in range(1, S) if start is not None and start[b, s]] + [S]
        for s0, s1 in zip(starts, starts[1:]):
            continues = s0 == 0 and past is not None and not (start is not None and start[b, 0])
            x = torch.cat([past[b] if continues else qk.new_zeros(2, C), qk[b, s0:s1]]).T[None]
            mixed.append(F.conv1d(F.conv1d(x, w1, b1, groups=C), w2, b2, groups=C // d)[0].T)
    split = lambda x: x.view(B, S, Hq + Hk, d).split([Hq, Hk], 2)
    (q, k), (q0, k0) = split(torch.cat(mixed)), split(qk)
    m_q = (q0 + k0.repeat_interleave(G, 2)) / 2
    q, k = q + m_q, k + m_q.unflatten(2, (Hk, G)).mean(3)
    q, k = d ** 0.5 * F.normalize(q, dim=-1), temperature[..., None] * d ** 0.5 * F.normalize(k, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]

    def rotate(x):
        first, second, rest = x.split([n, n, d - 2 * n], -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).transpose(1, 2)
    return rotate(q), rotate(k)


def exact(p, dq, dk):
    """Return q, k and the gradients of all float arguments in float64. The temperature's gradient is per token: its sum
    over tokens may nearly cancel, and rounding errors are small relative to the terms, not to the sum."""
    p = {name: t if t is None or t.dtype == torch.bool else t.double() for name, t in p.items()}
    p['temperature'] = p['temperature'].expand(*p['qk'].shape[:2], -1)
    leaves = {name: p[name] for name in ('qk', 'past', 'w1', 'b1', 'w2', 'b2', 'temperature') if p[name] is not None}
    for t in leaves.values():
        t.requires_grad_()
    q, k = reference(**p)
    gradients = torch.autograd.grad((q, k), list(leaves.values()), (dq.double(), dk.double()),
                                    materialize_grads=True)     # a past that no document reads has the gradient 0
    return q.detach(), k.detach(), dict(zip(leaves, gradients))


def forward(p, tile=0):
    return torch.ops.nanozaya.cca_forward(*p.values(), tile)


def backward(dq, dk, p, tile=0):
    """Return the gradients by name; without a past, it has none."""
    names = 'qk', 'past', 'w1', 'b1', 'w2', 'b2', 'temperature'
    found = zip(names, torch.ops.nanozaya.cca_backward(dq, dk, *p.values(), tile))
    return {name: g for name, g in found if p[name] is not None}


def check(p, tile, seed=0):
    bound, (B, S, _), d, Hk = BOUND[p['qk'].dtype], p['qk'].shape, p['w2'].shape[1], len(p['temperature'])
    g = torch.Generator().manual_seed(seed + 1)
    dq, dk = (torch.randn(B, H, S, d, generator=g).to(p['qk']) for H in (p['qk'].shape[2] // d - Hk, Hk))
    q, k, wanted = exact(p, dq, dk)
    for found, true in zip(forward(p, tile), (q, k)):
        assert found.dtype == p['qk'].dtype
        assert (found.double() - true).norm() <= bound * true.norm()
    for name, found in backward(dq, dk, p, tile).items():
        true, size = wanted[name], wanted[name].norm()
        if name == 'temperature':
            true = true.sum((0, 1))
        assert found.shape == p[name].shape and (found.double() - true).norm() <= bound * size, name


# ---- correctness ----

@every_build
@given(dtypes, st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 5, 13, 16, 17, 31, 33, 40]), heads, st.booleans(),
       st.booleans(), st.booleans(), st.sampled_from([SMALL, LARGE]), seeds)
def test_forward_and_backward_equal_float64(dtype, B, S, shape, past, start, own_positions, tile, seed):
    check(problem(dtype, B, S, *shape, past, start, own_positions, seed), tile, seed)


@pytest.mark.parametrize('S', [63, 64, 65, 130])
@pytest.mark.parametrize('dtype', BOUND)
def test_adjacent_tiles_fit_together(dtype, S):
    """A tile has 16, 32 or 64 tokens; in cca_backward_input 32, of which it computes 30."""
    check(problem(dtype, 1, S, 2, 1, 64, True, False, False), LARGE)


@pytest.mark.parametrize('tile', [SMALL, LARGE])
def test_a_document_may_start_at_any_token_even_after_a_cached_past(tile):
    """All 16 patterns of starts in four tokens, one per sequence."""
    p = problem(torch.float32, 16, 4, 1, 1, 64, True, False, False)
    p['start'] = torch.arange(16)[:, None] >> torch.arange(4) & 1 == 1
    check(p, tile)


def test_the_tile_that_the_kernel_chooses_for_many_tokens_is_correct():
    """1,030 tokens: large tiles, and three splits for the gradient of the grouped convolution's weight."""
    check(problem(torch.bfloat16, 2, 515, 1, 1, 64, False, False, False), 0)


def test_the_depthwise_bias_applies_to_the_padded_position():
    """With zero input and zero past, the grouped convolution of the first token still reads a_{-1} = b1."""
    p = problem(torch.float32, 1, 2, 1, 1, 64, False, False, False)
    p['qk'].zero_()
    check(p, 0)
    y = torch.einsum('oit,i->o', p['w2'][:64], p['b1'][:64]) + p['b2'][:64]     # equal for both tokens
    q = forward(p | {'cos': torch.ones(1, 2, 16), 'sin': torch.zeros(1, 2, 16)})[0]
    torch.testing.assert_close(q[0, 0], 8 * F.normalize(y, dim=0).expand(2, -1))


@given(dtypes, st.lists(st.integers(1, 9), min_size=1, max_size=5), seeds)
@settings(max_examples=10)
def test_chunks_with_a_cached_past_equal_the_whole_bitwise(dtype, chunks, seed):
    """Prefill, then decoding: a token's result depends on itself and the two tokens before it only."""
    p = problem(dtype, 2, sum(chunks), 2, 1, 64, True, False, True, seed)
    whole, columns, at = forward(p, LARGE), torch.cat([p['past'], p['qk']], 1), 0
    for n in chunks:
        new = slice(at, at + n)
        part = p | {'qk': p['qk'][:, new].contiguous(), 'past': columns[:, at:at + 2],
                    'cos': p['cos'][:, new], 'sin': p['sin'][:, new]}
        assert all(torch.equal(a, b[:, :, new]) for a, b in zip(forward(part), whole))
        at += n


@given(seeds)
@settings(max_examples=5)
def test_results_are_deterministic_and_independent_of_the_batch(seed):
    p = problem(torch.bfloat16, 3, 21, 2, 1, 64, True, True, True, seed)
    dq, dk = torch.randn(3, 2, 21, 64).bfloat16(), torch.randn(3, 1, 21, 64).bfloat16()
    once, again = (forward(p) + tuple(backward(dq, dk, p).values()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    alone = {name: t[1:2] if name in ('qk', 'past', 'cos', 'sin', 'start') else t for name, t in p.items()}
    assert all(torch.equal(a, b[1:2]) for a, b in zip(forward(alone), once))
    gradients = list(backward(dq[1:2], dk[1:2], alone).values())[:2]
    assert all(torch.equal(g, once[2 + i][1:2]) for i, g in enumerate(gradients))


@given(dtypes, st.integers(0, 20), seeds)
@settings(max_examples=5)
def test_nan_reaches_its_own_token_and_the_next_two_only(dtype, t, seed):
    p = problem(dtype, 2, 21, 2, 1, 64, True, False, False, seed)
    p['qk'][1, t] = float('nan')
    for x in forward(p):
        hit = x.isnan().any(-1).all(1)                          # (B, S)
        assert not hit[0].any() and hit[1].nonzero()[:, 0].tolist() == [s for s in (t, t + 1, t + 2) if s < 21]
        assert not x[1, :, hit[1].logical_not()].isnan().any()


def test_a_zero_vector_stays_zero_and_its_gradient_is_finite():
    p = problem(torch.float32, 1, 3, 2, 1, 64, False, False, False)
    for name in ('qk', 'b1', 'b2'):
        p[name].zero_()
    assert all(x.eq(0).all() for x in forward(p))
    dq, dk = torch.randn(1, 2, 3, 64), torch.randn(1, 1, 3, 64)
    assert all(g.isfinite().all() for g in backward(dq, dk, p).values())


@given(dtypes, st.integers(1, 3), st.integers(1, 5))
@settings(max_examples=5)
def test_a_slice_of_a_wider_tensor_and_gradients_of_any_stride_are_read_in_place(dtype, B, S):
    """qk may be a slice of a wider projection; gradients from attention may be transposed or expanded."""
    p = problem(dtype, B, S, 2, 1, 64, False, False, False)
    wide = torch.cat([p['qk'], torch.full((B, S, 64), float('nan'), dtype=dtype)], -1)
    part = p | {'qk': wide[..., :192]}
    assert all(torch.equal(a, b) for a, b in zip(forward(part), forward(p)))
    dq, dk = torch.randn(B, S, 2, 64).to(dtype).transpose(1, 2), torch.ones(1, dtype=dtype).expand(B, 1, S, 64)
    plain = backward(dq.contiguous(), dk.contiguous(), p)
    assert all(torch.equal(g, plain[name]) for name, g in backward(dq, dk, part).items())


@pytest.mark.skipif(build.gpu_trouble() is not None, reason=str(build.gpu_trouble()))
@given(dtypes, st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 31, 64, 65, 200, 1500]), heads, st.booleans(),
       st.booleans(), st.booleans(), st.sampled_from([0, SMALL, LARGE]), seeds)
@settings(max_examples=60)
def test_a_gpu_equals_float64(dtype, B, S, shape, past, start, own_positions, tile, seed):
    kernels.load('cuda')
    p = problem(dtype, B, S, *shape, past, start, own_positions, seed)
    p = {name: t if t is None else t.cuda() for name, t in p.items()}
    check(p, tile, seed)
    assert all(torch.equal(a, b) for a, b in zip(forward(p, tile), forward(p, tile)))


# ---- autograd, opcheck, torch.compile ----

def arguments(p, leaves=('qk', 'w1', 'b1', 'w2', 'b2', 'temperature')):
    return [t.clone().requires_grad_() if name in leaves else t for name, t in p.items()]


def test_autograd_returns_the_gradients_of_the_backward_operator_in_the_parameters_dtype():
    p = problem(torch.bfloat16, 2, 5, 2, 1, 64, True, True, False)
    masters = 'w1', 'b1', 'w2', 'b2', 'temperature'
    p = {name: t.float() if name in masters else t for name, t in p.items()}
    inputs = arguments(p, ('qk', 'past', 'w1', 'b1', 'w2', 'b2', 'temperature'))
    q, k = kernels.cca_mix(*inputs)
    dq, dk = torch.randn_like(q), torch.randn_like(k)
    torch.autograd.backward((q, k), (dq, dk))
    for t, g in zip(inputs, backward(dq, dk, p).values()):
        assert t.grad.dtype == t.dtype and torch.equal(t.grad, g.to(t.dtype))


@pytest.mark.parametrize('past', [False, True])
def test_the_operator_passes_opcheck(past):
    p = problem(torch.float32, 1, 3, 2, 1, 64, past, True, False)
    torch.library.opcheck(torch.ops.nanozaya.cca_forward.default, arguments(p))


def test_torch_compile_has_no_graph_break():
    inputs = arguments(problem(torch.float32, 2, 5, 2, 1, 64, False, False, False))

    def f(*inputs):
        return sum(x.square().sin().sum() for x in kernels.cca_mix(*inputs))
    plain = torch.autograd.grad(f(*inputs), inputs[0])
    compiled = torch.autograd.grad(torch.compile(f, fullgraph=True, backend='aot_eager')(*inputs), inputs[0])
    torch.testing.assert_close(plain, compiled)


# ---- bad input ----

BAD = {                                                         # name: (what is wrong, exception, part of the message)
    'float64': (lambda p: p | {'qk': p['qk'].double()}, TypeError, 'float32, bfloat16 or float16'),
    'integers': (lambda p: p | {'qk': p['qk'].long()}, TypeError, 'float32, bfloat16 or float16'),
    'two dims': (lambda p: p | {'qk': p['qk'][0]}, ValueError, r'shape \(B, S, C\)'),
    'S = 0': (lambda p: p | {'qk': p['qk'][:, :0]}, ValueError, 'B and S at least 1'),
    'B = 0': (lambda p: p | {'qk': p['qk'][:0]}, ValueError, 'B and S at least 1'),
    'head dim': (lambda p: p | {'w2': p['w2'][:, :32]}, ValueError, 'head dim must be 64 or 128'),
    'channels': (lambda p: p | {'qk': p['qk'][..., :-8].contiguous()}, ValueError, "qk's 184 channels"),
    'no query head': (lambda p: p | {'qk': p['qk'][..., :64].contiguous()}, ValueError, "qk's 64 channels"),
    'heads in groups': (lambda p: p | {'temperature': torch.ones(2)}, ValueError, 'a multiple of 2'),
    'no temperature': (lambda p: p | {'temperature': torch.ones(0)}, ValueError, 'a multiple of 0'),
    'w1': (lambda p: p | {'w1': p['w1'][:, 0]}, ValueError, r'conv_depthwise_weight must have the shape \[192, 1, 2\]'),
    'b1': (lambda p: p | {'b1': p['b1'][:-1]}, ValueError, 'conv_depthwise_bias'),
    'w2': (lambda p: p | {'w2': p['w2'][:-1]}, ValueError, 'conv_grouped_weight'),
    'b2': (lambda p: p | {'b2': p['b2'][None]}, ValueError, 'conv_grouped_bias'),
    'integer bias': (lambda p: p | {'b2': p['b2'].long()}, TypeError, 'must be floats'),
    'past shape': (lambda p: p | {'past': p['qk'][:, :1]}, ValueError, r'past must have the shape \[2, 2, 192\]'),
    'past dtype': (lambda p: p | {'past': p['qk'][:, :2].bfloat16()}, TypeError, "qk's dtype"),
    'start shape': (lambda p: p | {'start': torch.ones(2, 1).bool()}, ValueError, 'start must have the shape'),
    'start dtype': (lambda p: p | {'start': torch.ones(2, 4)}, TypeError, 'start must be bool'),
    'cos': (lambda p: p | {'cos': p['cos'][:, :-1]}, ValueError, 'cos must have the shape'),
    'cos batch': (lambda p: p | {'cos': p['cos'].expand(3, -1, -1)}, ValueError, 'cos must have the shape'),
    'sin': (lambda p: p | {'sin': p['sin'][..., :8]}, ValueError, 'sin must have the shape'),
    'odd rotation': (lambda p: p | {name: p[name][..., :12] for name in ('cos', 'sin')}, ValueError, 'multiple of 8'),
    'rotates too much': (lambda p: p | {name: p[name].repeat(1, 1, 3) for name in ('cos', 'sin')},
                         ValueError, '2n of 64'),
    'column stride': (lambda p: p | {'qk': p['qk'].mT.contiguous().mT}, ValueError, 'contiguous'),
    'alignment': (lambda p: p | {'qk': F.pad(p['qk'], (1, 0))[..., 1:]}, ValueError, '16 bytes'),
    'uneven stride': (lambda p: p | {'qk': F.pad(p['qk'], (0, 0, 0, 1))[:, :4]}, ValueError, 'equal strides'),
    'device': (lambda p: p | {'b1': p['b1'].to('meta')}, ValueError, "on qk's device"),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_an_exception_that_says_what_was_expected(name):
    change, error, message = BAD[name]
    p = problem(torch.float32, 2, 4, 2, 1, 64, False, False, False)
    forward(p)
    with pytest.raises(error, match='cca_mix: .*' + message):
        kernels.cca_mix(*change(p).values())


def test_gradients_of_a_wrong_shape_are_refused():
    p = problem(torch.float32, 2, 4, 2, 1, 64, False, False, False)
    q, k = forward(p)
    with pytest.raises(ValueError, match='the gradient of q'):
        backward(q[:, :1], k, p)
    with pytest.raises(ValueError, match='the gradient of k'):
        backward(q, k[..., :32], p)


def test_other_devices_are_refused():
    p = problem(torch.float32, 2, 4, 2, 1, 64, False, False, False)
    with pytest.raises(RuntimeError, match="no kernel for the device 'meta'"):
        kernels.cca_mix(*(t if t is None else t.to('meta') for t in p.values()))


# ---- in the model ----

@given(dtypes, st.integers(1, 2), st.integers(1, 20), heads, st.booleans(), st.booleans(), seeds)
@settings(max_examples=10)
def test_the_kernel_equals_cca_mix(dtype, B, S, shape, past, start, seed):
    p = problem(dtype, B, S, *shape, past, start, True, seed)
    plain = mix(*(t if t is None or t.dtype == torch.bool else t.float() for t in p.values()))
    for a, b in zip(forward(p), plain):
        assert (a.float() - b).norm() <= BOUND[dtype] * b.norm()


@pytest.mark.parametrize('packed', [False, True])
def test_the_model_has_the_same_loss_and_gradients_with_the_kernel(packed):
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, head_dim=64)
    idx, start = tokens(2, 12), None
    if packed:
        start = torch.zeros(2, 12, dtype=torch.bool)
        start[:, 0] = start[0, 5] = start[1, [1, 2, 9]] = True
    model, plain = tiny_model(**shape), tiny_model(**shape)
    kernels.use(model, 'hip', torch.float32)
    losses = [m(idx, idx.roll(-1, 1), start)[1] for m in (model, plain)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters()):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm(), name


@torch.no_grad()
def test_the_model_with_the_kernel_continues_a_cache_with_sequences_of_any_length():
    model, plain = (tiny_model(n_layer=2, n_head=2, n_kv_head=1, head_dim=64) for _ in range(2))
    kernels.use(model, 'hip', torch.float32)
    caches = [m.make_cache(2, 12) for m in (model, plain)]
    for seed, n_new in enumerate(([3, 5], [1, 1], [0, 2], [4, 1])):
        a, b = (m(tokens(2, max(n_new), seed=seed), cache=cache, n_new=n_new)[0]
                for m, cache in zip((model, plain), caches))
        assert all((a[i, :n] - b[i, :n]).abs().max() < 1e-4 for i, n in enumerate(n_new) if n)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match='must be one of'):
        kernels.use(tiny_model(), 'cuda', torch.float32)


# ---- selecting the kernel ----

def model_of(head_dim=64, device='cuda'):
    """Return a stand-in with the attributes of a model that kernels.use reads; 'cuda' needs no GPU."""
    config = SimpleNamespace(head_dim=head_dim, rope_dim=head_dim // 2)
    return SimpleNamespace(device=SimpleNamespace(type=device), config=config,
                           layers=[SimpleNamespace(attn=SimpleNamespace(mix=mix)) for _ in range(2)])


def mixers(model):
    return {layer.attn.mix for layer in model.layers}


@pytest.fixture
def forget():
    """Clear what kernels has cached about a kernel that a test breaks, before and after."""
    kernels.trouble.cache_clear()
    kernels.warn_once.cache_clear()
    yield
    kernels.trouble.cache_clear()
    kernels.warn_once.cache_clear()


def test_it_is_used_where_requested_and_available(monkeypatch, forget):
    monkeypatch.setattr(kernels, 'load', lambda device: None)
    monkeypatch.setattr(kernels, 'difference', lambda *args: 0.001)
    for kernel, expected in ('torch', mix), ('auto', kernels.cca_mix), ('hip', kernels.cca_mix):
        model = model_of()
        kernels.use(model, kernel, torch.bfloat16)
        assert mixers(model) == {expected}


def test_auto_never_fails_and_hip_says_why(monkeypatch, capsys, forget):
    def broken(device):
        raise RuntimeError('the kernel could not be built: no compiler\nmore')
    monkeypatch.setattr(kernels, 'load', broken)
    model, cpu = model_of(), model_of(device='cpu')
    kernels.use(model, 'torch', torch.bfloat16)
    kernels.use(cpu, 'auto', torch.float32)                     # never used on a CPU: no message
    assert capsys.readouterr().err == ''
    for _ in range(2):
        kernels.use(model, 'auto', torch.bfloat16)
    once = 'CCA runs without its kernel: the kernel could not be built: no compiler\n'
    assert capsys.readouterr().err == once
    kernels.use(small := model_of(32), 'auto', torch.bfloat16)
    assert 'not torch.bfloat16, 32 and 16' in capsys.readouterr().err
    with pytest.raises(ValueError, match='no compiler') as error:
        kernels.use(model, 'hip', torch.bfloat16)
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='head_dim 64 or 128'):
        kernels.use(model_of(32, 'cpu'), 'hip', torch.float32)
    monkeypatch.setattr(kernels, 'load', emulated_gpu.load_for_gpu)
    with pytest.raises(ValueError, match="no kernel for the device 'cpu'"):
        kernels.use(cpu, 'hip', torch.float32)
    assert mixers(model) == mixers(cpu) == mixers(small) == {mix}


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(RuntimeError, match='needs g\\+\\+'):
        emulated_gpu.library()
    monkeypatch.setenv('CXX', 'false')
    with pytest.raises(RuntimeError, match='false failed'):
        emulated_gpu.library()


# ---- other builds ----

@pytest.mark.skipif(BUILD != 'cpu', reason='runs the other builds itself')
@pytest.mark.parametrize('kind', ['cpu_nvidia', 'cpu_asan'])
def test_nvidia_s_register_layout_is_correct_and_no_access_is_out_of_bounds(kind):
    environment = ENV | {'NANOZAYA_CPU_BUILD': kind}
    emulated_gpu.library(kind)
    if kind == 'cpu_asan':                                 # its runtime must be loaded first, and needs that of C++
        runtime = [subprocess.run(['g++', f'-print-file-name={name}'], capture_output=True, text=True).stdout.strip()
                   for name in ('libasan.so', 'libstdc++.so')]
        environment |= {'LD_PRELOAD': ' '.join(runtime), 'ASAN_OPTIONS': 'detect_leaks=0'}
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-s', '-p', 'no:cacheprovider', __file__, '-k',
                           'backward_equal_float64 or adjacent_tiles and 65'], env=environment, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.skipif(BUILD != 'cpu', reason='once is enough')
def test_gfx942_code_spills_no_register_fits_the_lds_and_uses_mfma():
    try:
        code = assembly.gfx942_assembly()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    found = assembly.gfx942_kernels(code)
    assert len(found) == 36 and {k['dtype'] for k in found} == {'float32', 'bf16', 'fp16'}      # all instantiations
    assembly.check_gfx942(found)
    for wrong in ({'spills': 1}, {'scratch': 4}, {'lds': 70_000}, {'mfma': 0}):
        with pytest.raises(ValueError, match='gfx942: cca_tile'):
            assembly.check_gfx942([found[0] | wrong])


@pytest.mark.skipif(BUILD != 'cpu', reason='once is enough')
def test_nvcc_compiles_it_for_sm_90():
    try:
        assert len(assembly.sm_90_kernels()) == 36
    except FileNotFoundError as error:
        pytest.skip(str(error))


QUICK = ((2, 21),)                                               # the emulation is slow


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_self_check_passes_a_correct_kernel_and_detects_a_wrong_one(monkeypatch, dtype):
    assert kernels.difference('cpu', dtype, 64, 16, QUICK) < 0.02
    right = kernels.cca_mix

    def wrong(*args, **options):
        q, k = right(*args, **options)
        return q, k * 1.05
    monkeypatch.setattr(kernels, 'cca_mix', wrong)
    assert kernels.difference('cpu', dtype, 64, 16, QUICK) > 0.02


@pytest.mark.parametrize('broken', [SMALL, LARGE, 'past', 'start', 'gradient', 'nan'])
def test_the_self_check_covers_every_variant(monkeypatch, broken):
    """It detects a kernel that is wrong in one tile only, after a cached past, in packed windows, or in backward."""
    right = kernels.cca_mix

    def wrong(*args, tile=0):
        q, k = right(*args, tile=tile)
        if broken == 'nan':
            return q, k * float('nan')
        if broken == 'gradient':
            return q, k.detach() * 0.1 + k * 0.9                # the results are right, the gradient of k is 0.9 of it
        hit = args[1] is not None if broken == 'past' else args[9] is not None if broken == 'start' else tile == broken
        return q, k * 1.05 if hit else k
    monkeypatch.setattr(kernels, 'cca_mix', wrong)
    assert not kernels.difference('cpu', torch.float32, 64, 16, QUICK) <= 0.02


def test_the_sizes_of_the_self_check_cover_each_choice_of_the_kernel():
    """Few tokens: small tiles. More: large tiles with one head per block, then, from 512 blocks, one KV group."""
    calls = []

    def record(inputs, tile):
        calls.append((tuple(inputs[0].shape[:2]), tile))
        return 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, 'error', record)
        kernels.difference('cpu', torch.bfloat16, 64, 16)
    sizes = {B * S for (B, S), tile in calls if tile == 0}
    blocks = lambda n: -(-n // 32) * 2                          # tiles of 32 tokens times 2 KV heads
    assert min(sizes) <= 1024 and any(n > 1024 and blocks(n) < 512 for n in sizes)
    assert any(blocks(n) >= 512 for n in sizes)
    assert {tile for _, tile in calls} == {0, SMALL, LARGE}


def test_a_kernel_that_is_wrong_on_this_gpu_is_not_used(monkeypatch, capsys, forget):
    monkeypatch.setattr(kernels, 'load', lambda device: None)
    for worst in 0.5, float('nan'):
        monkeypatch.setattr(kernels, 'difference', lambda *args: worst)
        kernels.trouble.cache_clear()
        kernels.use(model := model_of(), 'auto', torch.bfloat16)
        assert f'{worst:.0%} off' in capsys.readouterr().err and mixers(model) == {mix}
        with pytest.raises(ValueError, match=f'{worst:.0%} off'):
            kernels.use(model, 'hip', torch.bfloat16)
