"""Time the kernel against PyTorch, at the 8B model's shape: `python -m kernels.bench`, on a GPU.

Compared are cca.mix (eager), torch.compile(cca.mix), and cca_mix, in bfloat16: forward, forward with backward, and
decoding steps of one token for 1 and 64 sequences. Each is checked against float64 before it is timed. Long runs are
timed one by one with GPU events, the caches flushed before each; decoding as many calls in a row, as generation does
it, launches and all. Bytes: what must be read and written at least, see README.md; 'of copy' is their rate as a share
of the rate of a large tensor's copy, measured in the same run.
"""
import statistics
import sys
from functools import partial

import torch

from cca import mix, rope_table
from kernels import cca_mix, load
from kernels.build import gpu_trouble

HQ, HK, D, N = 8, 2, 128, 32                                    # the 8B model (report, Table I); N rotated pairs
C = (HQ + HK) * D


def milliseconds(call, flush, repeats=30):
    """Median time of one call on the GPU, its caches full of other things before."""
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()                                           # takes long: the launches below queue up meanwhile
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def milliseconds_in_a_row(call, calls=200, repeats=5):
    """Time of one of many calls in a row, the processor's share included."""
    times = []
    for _ in range(repeats + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times[1:])                                    # the first warms up


def problem(B, S, past=False):
    """Arguments of mix and cca_mix, and gradients of q and k: bfloat16 as in a bf16 model; the tables are float32."""
    torch.manual_seed(0)
    random = lambda *shape: torch.randn(shape, device='cuda', dtype=torch.bfloat16)
    inputs = [random(B, S, C), random(B, 2, C) if past else None, random(C, 1, 2), random(C),
              random(C, D, 2) / D ** 0.5, random(C), random(HK),
              *rope_table(torch.arange(S, device='cuda')[None], 2 * N, 10_000.0)]
    return inputs, (random(B, HQ, S, D), random(B, HK, S, D))


def with_backward(f, inputs, gradients):
    leaves = [t.detach().requires_grad_() if t is not None and t.dtype == torch.bfloat16 else t for t in inputs]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return lambda: torch.autograd.grad(f(*leaves), wanted, gradients)


def check(inputs, gradients=None):
    """Raises ValueError if the kernel's results are off, or its gradients, if asked for. The bounds are those of
    tests/test_kernels.py."""
    double = [t if t is None else t.double() for t in inputs]
    leaves = [t.requires_grad_() if t is not None and i < 7 else t for i, t in enumerate(double)]
    q, k = mix(*leaves)
    for name, a, b in zip(('q', 'k'), cca_mix(*inputs), (q, k)):
        compare(name, a, b)
    if gradients is None:
        return
    wanted = torch.autograd.grad((q, k), [t for t in leaves[:7] if t is not None], [g.double() for g in gradients])
    found = with_backward(cca_mix, inputs, gradients)()
    for i, (a, b) in enumerate(zip(found, wanted)):
        compare(f'gradient {i}', a, b)


def compare(name, found, wanted):
    error = ((found.double() - wanted).norm() / wanted.norm()).item()
    if not error < 1e-2:
        raise ValueError(f'the kernel is wrong: {name} is off by {error:.1e}')


def main():
    if trouble := gpu_trouble():
        raise ValueError(f'no GPU to measure on: {trouble}')
    load('cuda')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}; Hq {HQ}, Hk {HK}, d {D}, bfloat16')
    flush = torch.empty(1 << 30, dtype=torch.uint8, device='cuda')
    copy = 2 * flush.numel() / milliseconds(partial(flush.copy_, torch.empty_like(flush)), flush) / 1e6
    print(f'copy: {copy:,.0f} GB/s\n')
    compiled = torch.compile(mix, dynamic=False)
    print('| what | eager, ms | compiled, ms | kernel, ms | over eager | over compiled | GB/s | of copy |')
    print('| --- ' * 8 + '|')

    def row(what, timer, calls, bytes_):
        eager, compiled_, kernel = (timer(call) for call in calls)
        rate = bytes_ / kernel / 1e6
        print(f'| {what} | {eager:.3f} | {compiled_:.3f} | {kernel:.3f} | {eager / kernel:.1f}x '
              f'| {compiled_ / kernel:.1f}x | {rate:,.0f} | {rate / copy:.0%} |', flush=True)

    weights = 2 * C * D * 2                                     # bytes of the grouped convolution's, the largest
    for S in 1024, 4096, 16384:
        inputs, gradients = problem(1, S)
        check(inputs, gradients)
        calls = [lambda f=f: f(*inputs) for f in (mix, compiled, cca_mix)]
        with torch.no_grad():
            row(f'forward, S {S}', lambda call: milliseconds(call, flush), calls, 2 * C * 2 * S + weights)
        calls = [with_backward(f, inputs, gradients) for f in (mix, compiled, cca_mix)]
        row(f'forward and backward, S {S}', lambda call: milliseconds(call, flush), calls, 5 * C * 2 * S + 3 * weights)
    for B in 1, 64:
        inputs, _ = problem(B, 1, past=True)
        check(inputs)                                           # one token: its temperature gradient is all rounding
        with torch.no_grad():
            calls = [lambda f=f: f(*inputs) for f in (mix, compiled, cca_mix)]
            row(f'decoding, B {B}', milliseconds_in_a_row, calls, 4 * C * 2 * B + weights)


if __name__ == '__main__':
    try:
        main()
    except (RuntimeError, ValueError) as error:
        sys.exit(f'kernels.bench: {error}')
