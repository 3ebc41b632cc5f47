"""Build and call int4.cpp: y = x W^T on a CPU, W in int4 or int8 blocks (quantize.py).

The library is compiled at first use, in some seconds, for the instruction set that torch uses, which the environment
variable ATEN_CPU_CAPABILITY=avx2 or =default lowers. It is stored where build.py stores the GPU kernel. Its OpenMP
calls go to the runtime, and the thread pool, that torch has loaded.
"""
import ctypes
import functools
import os
import platform
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from kernels.build import cache_folder

SOURCES = [Path(__file__).with_name(name) for name in ('decode.cpp', 'int4.cpp')]       # the first includes the second
POINTER, INT = ctypes.c_void_p, ctypes.c_int
DTYPES = torch.float32, torch.bfloat16                          # of inputs, and of the weights that are not quantized
ARGUMENTS = {'product': [INT, POINTER, INT, *[POINTER] * 4, *[ctypes.c_int64] * 4],
             'decode': [INT, *[POINTER] * 6, ctypes.c_float]}


def instruction_set():
    """Return the compiler flags of the best instruction set that int4.cpp and this CPU have."""
    has = getattr(torch.cpu, 'get_capabilities', dict)()        # from torch 2.12 on
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == 'AVX512' and has.get('avx512_vnni'):
        return ['-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512vnni', '-mfma']
    if capability in ('AVX2', 'AVX512'):
        return ['-mavx2', '-mfma']
    return ['-march=armv8.2-a+dotprod'] if has.get('dot') else []


@functools.cache
def load():
    """Return the functions of the library, product and decode, which is built at first use. Raise RuntimeError with the
    reason if that is not possible."""
    flags = instruction_set()
    path = cache_folder('int4_' + ''.join(flags).replace('-m', '_'), [*SOURCES, Path(__file__)]) / 'int4.so'
    try:
        if not path.exists():
            build(path, flags)
        return functions(path)
    except Exception as error:                                  # no compiler, no ninja, a failed build: many types
        raise RuntimeError(f'kernels/int4.cpp could not be built ({str(error).partition(chr(10))[0]})') from error


def functions(path):
    """Return the functions of a library."""
    library, found = ctypes.CDLL(str(path)), SimpleNamespace()
    for name, arguments in ARGUMENTS.items():
        function = getattr(library, f'nanozaya_{name}')
        function.argtypes, function.restype = arguments, None
        setattr(found, name, function)
    return found


def build(path, flags):
    """Compile int4.cpp to the library `path`. Processes that do so at the same time do not wait for each other."""
    from torch.utils import cpp_extension                       # takes a second to import
    openmp = ['-Xpreprocessor', '-fopenmp'] if platform.system() == 'Darwin' else ['-fopenmp']
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        cpp_extension.load('int4', [str(SOURCES[0])], build_directory=folder, is_python_module=False,
                           extra_cflags=['-O3', '-std=c++17', '-Wno-psabi', *openmp, *flags])
        os.replace(next(Path(folder).glob('*.so')), path)      # torch numbers them within a process


def product(x, blocks, scale, out, expert=None):
    """Return x W^T (T, out) in x's dtype. x (T, 32 G); blocks (R, G, bytes) uint8 of quantize.interleave; scale (out)
    float32, with int8, else None. With expert (T) int64, blocks and scale have a leading dim of several matrices, of
    which expert[t] selects token t's; an index of N or more yields zeros. blocks and scale are contiguous. Raise
    ValueError for other shapes, and for tensors that are not on the CPU."""
    if x.device.type != 'cpu' or blocks.device.type != 'cpu':
        raise ValueError('a quantized model stays on the device that it was loaded to: name it when loading')
    if x.shape[1] != 32 * blocks.shape[-2] or expert is not None and expert.shape != x.shape[:1]:
        raise ValueError(f'x has shape {list(x.shape)}, the blocks ask for {32 * blocks.shape[-2]} inputs per token')
    if x.dtype not in DTYPES:
        return product(x.float(), blocks, scale, out, expert).to(x.dtype)
    x, expert = x.contiguous(), None if expert is None else expert.contiguous()
    y = x.new_empty(len(x), out)
    scale = None if scale is None else scale.float()            # model.bfloat16() converts it, too
    pointers = [None if t is None else t.data_ptr() for t in (blocks, scale, expert, y)]
    N, bits = 1 if expert is None else len(blocks), 8 if blocks.shape[-1] == 256 else 4
    load().product(bits, x.data_ptr(), x.dtype == torch.bfloat16, *pointers, len(x), N, out, 32 * blocks.shape[-2])
    return y
