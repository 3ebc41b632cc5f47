"""Benchmark the kernel against PyTorch at the shape of the 8B model: `python -m kernels.bench`, on a GPU.

Compares cca.mix (eager), torch.compile(cca.mix) and cca_mix in bfloat16: forward, forward with backward, and decoding
(one token per sequence, 1 and 64 sequences). Each case is compared with float64 before it is timed. Prefill calls are
timed one at a time with GPU events, after flushing the caches; decoding as many calls in a row, launch overhead
included. GB/s counts the bytes that must be read and written (see README.md); 'of copy' is this rate relative to that
of copying a large tensor, measured in the same run.
"""
import statistics
import sys
from functools import partial

import torch

from cca import mix, rope_table
from kernels import cca_mix, error, load

HQ, HK, D, N = 8, 2, 128, 32                                    # the 8B model (report, Table I); N rotated pairs
C = (HQ + HK) * D


def milliseconds(call, calls, repeats, flush=None):
    """Return the median time per call of `repeats` series of `calls` calls. flush: a tensor that fills the caches."""
    times = []
    for _ in range(repeats + 5):                                # the first five warm up
        torch.cuda.synchronize()
        if flush is not None:
            flush.zero_()                                       # slow: the launches below queue up meanwhile
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times[5:])


def problem(B, S, past=False):
    """Return bfloat16 arguments of mix and cca_mix, compared with float64, and gradients of q and k. cos and sin are
    float32. Raise ValueError if the kernel is wrong."""
    torch.manual_seed(0)
    random = lambda *shape: torch.randn(shape, device='cuda', dtype=torch.bfloat16)
    inputs = [random(B, S, C), random(B, 2, C) if past else None, random(C, 1, 2), random(C),
              random(C, D, 2) / D ** 0.5, random(C), random(HK),
              *rope_table(torch.arange(S, device='cuda')[None], 2 * N, 10_000.0)]
    if not (worst := error([*inputs, None], exact=torch.float64)) < 1e-2:               # as in tests/test_kernels.py
        raise ValueError(f'the kernel is wrong: its relative error is {worst:.1e} for {B} sequences of {S} tokens')
    return inputs, (random(B, HQ, S, D), random(B, HK, S, D))


def with_backward(f, inputs, gradients):
    """Return a function that calls f and computes the gradients of all bfloat16 inputs."""
    leaves = [t.detach().requires_grad_() if t is not None and t.dtype == torch.bfloat16 else t for t in inputs]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return lambda: torch.autograd.grad(f(*leaves), wanted, gradients)


def main():
    load('cuda')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}; Hq {HQ}, Hk {HK}, d {D}, bfloat16')
    flush = torch.empty(1 << 30, dtype=torch.uint8, device='cuda')
    one_at_a_time = partial(milliseconds, calls=1, repeats=30, flush=flush)
    in_a_row = partial(milliseconds, calls=200, repeats=5)
    copy = 2 * flush.numel() / one_at_a_time(partial(flush.copy_, torch.empty_like(flush))) / 1e6
    print(f'copy: {copy:,.0f} GB/s\n')
    print('| what | eager, ms | compiled, ms | kernel, ms | over eager | over compiled | GB/s | of copy |')
    print('| --- ' * 8 + '|')
    functions = mix, torch.compile(mix, dynamic=False), cca_mix

    def row(what, timer, calls, bytes_):
        eager, compiled, kernel = map(timer, calls)
        rate = bytes_ / kernel / 1e6
        print(f'| {what} | {eager:.3f} | {compiled:.3f} | {kernel:.3f} | {eager / kernel:.1f}x '
              f'| {compiled / kernel:.1f}x | {rate:,.0f} | {rate / copy:.0%} |', flush=True)

    weights = 2 * C * D * 2                                     # bytes of the grouped convolution, the largest
    for S in 1024, 4096, 16384:
        inputs, gradients = problem(1, S)
        with torch.no_grad():
            row(f'forward, S {S}', one_at_a_time, [partial(f, *inputs) for f in functions], 2 * C * 2 * S + weights)
        row(f'forward and backward, S {S}', one_at_a_time, [with_backward(f, inputs, gradients) for f in functions],
            5 * C * 2 * S + 3 * weights)
    for B in 1, 64:
        inputs, _ = problem(B, 1, past=True)
        with torch.no_grad():
            row(f'decoding, B {B}', in_a_row, [partial(f, *inputs) for f in functions], 4 * C * 2 * B + weights)


if __name__ == '__main__':
    if {'-h', '--help'} & set(sys.argv):
        sys.exit(print(__doc__))
    try:
        main()
    except (RuntimeError, ValueError) as reason:
        sys.exit(f'kernels.bench: {reason}')
