"""kernels/int4.cpp: each instruction set against the definition, within the bound that rounding x to int8 has."""
import platform
import shutil
import struct
import subprocess

import pytest
import torch
from hypothesis import given, settings, strategies as st

import quantize
from common import ROOT
from kernels import int4

INTEL = platform.machine() == 'x86_64'
capabilities = getattr(torch.cpu, 'get_capabilities', dict)()
VARIANTS = {'plain': ([], True), 'avx2': (['-mavx2', '-mfma'], INTEL and capabilities.get('avx2')),
            'vnni': (['-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512vnni', '-mfma'],
                     INTEL and capabilities.get('avx512_vnni')),
            'neon': (['-march=armv8.2-a+dotprod', '-static'], shutil.which('qemu-aarch64') and shutil.which(
                'aarch64-linux-gnu-g++'))}


@pytest.fixture(scope='module', params=VARIANTS)
def run(request, tmp_path_factory):
    """A function with the arguments of int4.product: that of one instruction set."""
    flags, available = VARIANTS[request.param]
    if not available or not shutil.which('g++'):
        pytest.skip(f'no {request.param} here')
    folder = tmp_path_factory.mktemp('int4')
    if request.param == 'neon':                                 # another machine, emulated
        program = folder / 'int4'
        subprocess.run(['aarch64-linux-gnu-g++', '-O3', '-std=c++17', *flags, ROOT / 'tests' / 'int4_stdin.cpp', '-o',
                        program], check=True)
        return lambda *arguments: emulated(program, *arguments)
    int4.build(folder / 'int4.so', flags)
    functions = int4.functions(folder / 'int4.so')

    def product(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(int4, 'load', lambda: functions)
            return int4.product(*arguments)
    return product


def emulated(program, x, blocks, scale, out, expert=None):
    data = lambda t: b'' if t is None else t.contiguous().view(torch.uint8).numpy().tobytes()
    bits, N = 4 if scale is None else 8, len(blocks) if blocks.ndim == 4 else 1
    header = struct.pack('<7q', bits, x.dtype == torch.bfloat16, expert is not None, len(x), N, out, x.shape[1])
    y = subprocess.run(['qemu-aarch64', program], capture_output=True, check=True,
                       input=header + b''.join(map(data, (x, blocks, scale, expert)))).stdout
    return torch.frombuffer(bytearray(y), dtype=x.dtype).view(len(x), out)


def random_matrices(seed, bits, N, out, groups):
    """N quantized matrices: as dicts (quantize.quantize), and as blocks and scale."""
    generator = torch.Generator().manual_seed(seed)
    found = [quantize.quantize(torch.randn(out, 32 * groups, generator=generator) + 0.3, bits) for _ in range(N)]
    scale = torch.stack([q['scale'][:, 0] for q in found]) if bits == 8 else None
    return found, torch.stack([quantize.interleave(**q) for q in found]), scale


KINDS = {'normal': 1.0, 'zero': 0.0, 'large': 1e30, 'small': 1e-20, 'denormal': 1e-40}


def exact_and_bound(x, q):
    """Return x W^T and the bound of its error: per group, half a step d of x times the sum of |s (c - 8)| or |s c|."""
    W, groups = quantize.dequantize(**q).double(), x.double().unflatten(-1, (-1, 32))
    d = groups.abs().amax(-1) / 127                                             # (T, G)
    multiplied = W if q.get('offset') is None else W - q['offset'].double().repeat_interleave(32, 1)
    return x.double() @ W.T, (d / 2) @ multiplied.abs().unflatten(-1, (-1, 32)).sum(-1).T


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([4, 8]), st.integers(1, 20), st.integers(1, 3), st.integers(1, 64),
       st.sampled_from([*KINDS]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_error_is_within_the_bound_of_rounding_x(run, seed, bits, out, groups, T, kind, dtype):
    (q,), blocks, scale = random_matrices(seed, bits, 1, out, groups)
    x = (torch.randn(T, 32 * groups, generator=torch.Generator().manual_seed(seed)) * KINDS[kind]).to(dtype)
    y = run(x, blocks[0], None if scale is None else scale[0], out)
    exact, bound = exact_and_bound(x, q)
    rounding = 2 ** (-8 if dtype == torch.bfloat16 else -20) * (x.double().abs() @ quantize.dequantize(
        **q).double().abs().T)
    assert y.dtype == dtype and ((y.double() - exact).abs() <= 1.01 * bound + rounding + 1e-30).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([4, 8]), st.lists(st.integers(0, 3), min_size=1, max_size=12),
       st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.data())
def test_tokens_do_not_affect_each_other_and_not_finite_ones_stay_so(run, seed, bits, experts, bad, data):
    """Each token with its expert gives the same bits as alone, even if others are not finite. Expert 3: none."""
    _, blocks, scale = random_matrices(seed, bits, 3, 13, 2)
    x, expert = torch.randn(len(experts), 64, generator=torch.Generator().manual_seed(seed)), torch.tensor(experts)
    spoiled = data.draw(st.integers(0, len(experts) - 1))
    x[spoiled, data.draw(st.integers(0, 63))] = bad
    y = run(x, blocks, scale, 13, expert)
    for t, e in enumerate(experts):
        if e == 3:
            assert not y[t].any()
        elif t == spoiled:
            assert not y[t].isfinite().any()
        else:
            alone = run(x[t:t + 1], blocks[e], None if scale is None else scale[e], 13)
            assert torch.equal(y[t], alone[0])


@pytest.mark.parametrize('bits', [4, 8])
def test_results_do_not_depend_on_threads_or_strides(run, bits):
    _, blocks, scale = random_matrices(0, bits, 1, 300, 4)
    x, before, found = torch.randn(40, 128).T.contiguous().T, torch.get_num_threads(), []
    for threads in 1, 2, 3, 4:
        torch.set_num_threads(threads)
        found += [run(x, blocks[0], None if scale is None else scale[0], 300)]
    torch.set_num_threads(before)
    assert not x.is_contiguous() and all(torch.equal(found[0], y) for y in found)
    assert torch.equal(found[0], run(x.contiguous(), blocks[0], None if scale is None else scale[0], 300))


# ---- the choice ----

def test_without_a_compiler_there_is_a_reason_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    monkeypatch.setenv('CXX', str(tmp_path / 'no-compiler'))
    int4.load.cache_clear(), quantize.why_unusable.cache_clear()
    reason = quantize.why_unusable(4)
    int4.load.cache_clear(), quantize.why_unusable.cache_clear()
    assert 'could not be built' in reason and '\n' not in reason and not list(tmp_path.rglob('*.so'))


def test_a_library_with_wrong_results_is_not_used(monkeypatch):
    right = int4.product
    monkeypatch.setattr(int4, 'product', lambda *arguments: right(*arguments) * 1.1)
    quantize.why_unusable.cache_clear()
    assert '10% off' in quantize.why_unusable(4)
    quantize.why_unusable.cache_clear()
    monkeypatch.setattr(int4, 'product', lambda *arguments: right(*arguments) * torch.nan)
    assert 'nan% off' in quantize.why_unusable(4)
    quantize.why_unusable.cache_clear()


@pytest.mark.parametrize('bits', [4, 8])
def test_the_faster_product_is_taken(monkeypatch, bits):
    experts = quantize.Matrix(bits, 64, 64, 2)
    experts.blocks.random_(0, 5)
    seconds = iter(range(1000))
    monkeypatch.setattr(quantize.time, 'perf_counter', lambda: next(seconds))
    assert quantize.why_slower(experts, torch.float32) is None      # each takes one tick of this clock
    right = int4.product
    monkeypatch.setattr(int4, 'product', lambda *arguments: (next(seconds), right(*arguments))[1])
    assert 'times as long' in quantize.why_slower(experts, torch.float32)
