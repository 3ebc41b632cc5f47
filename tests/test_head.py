"""The output head's products from bf16 parts (kernels/head.py), emulated on a CPU: a bf16 product with a float32 result
is the product of the upcast parts."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from kernels import head
from layers import float32_matmuls
from model import CrossEntropy, logits


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def emulated(out, a, b):
    assert a.dtype == b.dtype == torch.bfloat16
    with float32_matmuls():
        out.addmm_(a.float(), b.float())


@pytest.fixture
def gpu(monkeypatch):
    """Use the parts on the CPU, in a bf16 run."""
    monkeypatch.setattr(head, 'accumulate', emulated)
    monkeypatch.setattr(head, 'usable', lambda device: True)
    torch.set_float32_matmul_precision('medium')                # conftest.py resets it


def split_product(a, b):
    """Return head.mm of the two parts of a and of b."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, 'accumulate', emulated)
        return head.mm(head.split_bf16(a), head.split_bf16(b))


def rms_error(product, exact):
    """The RMS error of a product, relative to the RMS of the exact one."""
    return ((product.double() - exact).norm() / exact.norm()).item()


def test_the_rms_error_is_what_the_docstring_says():
    a, b = random(256, 1024), random(1024, 256, seed=1)
    exact = a.double() @ b.double()
    assert 4e-6 < rms_error(split_product(a, b), exact) < 5e-6
    assert 1e-7 < rms_error(a @ b, exact) < 4e-7
    assert 1e-3 < rms_error(a.bfloat16().float() @ b.bfloat16().float(), exact) < 3e-3
    to_tf32 = lambda x: ((x.view(torch.int32) + 0x1000) & ~0x1fff).view(torch.float32)          # 10 bits of mantissa
    assert 2e-4 < rms_error(to_tf32(a) @ to_tf32(b), exact) < 4e-4


@given(st.integers(0, 10**6), st.integers(-30, 30), st.integers(-30, 30))
def test_each_element_is_within_the_bound(seed, i, j):
    worst = torch.full((1, 40), 1 + 2.0 ** -8)                  # its low part squared, which is dropped, is 2^-16
    a = torch.cat([random(8, 40, seed=seed), worst]) * 2.0 ** i
    b = torch.cat([random(40, 6, seed=seed + 1), worst.T], 1) * 2.0 ** j
    exact, size = a.double() @ b.double(), a.abs().double() @ b.abs().double()
    error = (split_product(a, b).double() - exact).abs()
    assert (error <= (2 ** -15 + 42 * 2 ** -24) * size).all()   # 42: accumulation of 40 products in float32
    assert error[-1, -1] > 3 * 2 ** -18 * size[-1, -1]          # so a tighter bound would not hold


def test_nonfinite_inputs_give_nonfinite_outputs():
    a, b = random(3, 8), random(8, 4)
    a[0, 0], a[1, 1] = float('nan'), float('inf')
    assert split_product(a, b).isfinite().all(1).tolist() == [False, False, True]


def loss_and_gradients(loss, *leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def test_the_loss_and_its_gradients_are_as_accurate_as_the_products(gpu):
    """In three chunks, against float64. The errors of products in bf16 are over a hundred times as large."""
    x, W, targets = random(1200, 64), random(2000, 64, seed=1), torch.arange(1200) % 1999 - 1
    exact = loss_and_gradients(lambda x, W: F.cross_entropy(x @ W.T, targets, ignore_index=-1), x.double(), W.double())
    ours = loss_and_gradients(lambda x, W: CrossEntropy.apply(x, W, targets), x, W)
    for value, reference in zip(ours, exact):
        assert value.dtype == torch.float32 and rms_error(value, reference) < 2e-5
    bf16 = lambda x, W: F.cross_entropy((x.bfloat16() @ W.bfloat16().T).float(), targets, ignore_index=-1)
    assert rms_error(loss_and_gradients(bf16, x, W)[2], exact[2]) > 2e-3


def test_the_weights_are_split_once(gpu, monkeypatch):
    shapes, split = [], head.split_bf16
    monkeypatch.setattr(head, 'split_bf16', lambda x: [shapes.append(x.shape), split(x)][1])
    CrossEntropy.apply(random(1200, 64).requires_grad_(), random(2000, 64), torch.arange(1200))
    pieces = [(size, n) for size in (512, 512, 176) for n in (64, 2000, 64)]
    assert shapes == [(2000, 64), *pieces]


def test_in_float32_runs_the_loss_has_plain_products(gpu, monkeypatch):
    monkeypatch.setattr(head, 'accumulate', None)
    torch.set_float32_matmul_precision('highest')
    assert CrossEntropy.apply(random(9, 16), random(30, 16), torch.arange(9)).isfinite()


@pytest.mark.parametrize('shape', [(64,), (3, 64), (2, 3, 64)])
def test_logits_of_bf16_weights_are_float32_without_a_copy_of_the_weights(gpu, shape):
    x, W = random(*shape), random(100, 64, seed=1).bfloat16()
    with torch.no_grad():
        y = logits(x, W)
    assert y.dtype == torch.float32 and y.shape == (*shape[:-1], 100)
    assert rms_error(y, x.double() @ W.double().T) < 5e-6
    x.requires_grad_()
    logits(x, W).sum().backward()                               # products of parts have no gradient: W is upcast
    torch.testing.assert_close(x.grad, W.float().sum(0).expand(shape))


@pytest.mark.parametrize('V', [1, 50_000, 262_272, 10**8])
def test_the_logits_of_a_piece_take_at_most_256_mib_on_a_gpu(gpu, V):
    size = head.products(SimpleNamespace(device=torch.device('cuda'), dtype=torch.float32), V, True)[3]
    assert size == 1 or 4 * size * V <= 2 ** 28 < 4 * (size + 1) * V


def test_a_device_is_usable_if_it_has_bf16_units_and_torch_gives_float32_results(monkeypatch):
    cpu, cuda, usable, ones = torch.device('cpu'), torch.device('cuda'), head.usable.__wrapped__, torch.ones
    monkeypatch.setattr(torch, 'ones', lambda *shape, device, **options: ones(*shape, **options))
    for units, accumulate, expected in ((True, emulated, True), (False, emulated, False),
                                        (True, head.accumulate, False),         # as under ROCm: it raises
                                        (True, lambda out, a, b: out.fill_(16), False)):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: units)
        monkeypatch.setattr(head, 'accumulate', accumulate)
        assert usable(cuda) is expected and usable(cpu) is False
