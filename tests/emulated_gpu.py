"""The kernel of kernels/ compiled for the CPU, with emulated_gpu.h in place of a GPU. g++ suffices."""
import functools
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

from assembly import command
from kernels import build

HERE = Path(__file__).parent
# With AMD's lanes and register layout; with NVIDIA's; with AddressSanitizer. Most of the time goes into compiling, so
# optimization is low.
FLAGS = {'cpu': ['-O1'], 'cpu_nvidia': ['-O0', '-DEMULATE_NVIDIA'], 'cpu_asan': ['-O0', '-g1', '-fsanitize=address']}


def library(kind='cpu'):
    """Return the path of the library, built if needed. Raise RuntimeError if that fails. kind: a key of FLAGS."""
    files = [*build.SOURCES, HERE / 'emulated_gpu.h', Path(__file__)]
    path = build.cache_folder(kind, files) / 'library.so'
    if path.exists():
        return path
    compiler = shutil.which(os.environ.get('CXX', 'g++'))
    if compiler is None:
        raise RuntimeError('the kernel for the CPU needs g++, which is not installed (Debian: apt install g++)')
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        folder = Path(folder)
        binding = build.cache_folder('binding', files) / 'binding.o'                    # the same for every kind
        if not binding.exists():
            binding.parent.mkdir(parents=True, exist_ok=True)
            includes = [f'-isystem{p}' for p in cpp_extension.include_paths()]
            command([compiler, '-std=c++20', '-fPIC', '-DFOR_CPU', *includes, '-c', build.HERE / 'binding.cpp',
                     '-o', folder / 'binding.o'])
            os.replace(folder / 'binding.o', binding)
        # -x c++: g++ does not know .hip.
        command([compiler, '-std=c++17', '-fPIC', '-Wall', '-Wextra', '-Werror', '-Wno-unknown-pragmas', f'-I{HERE}',
                 *FLAGS[kind], '-x', 'c++', '-c', build.HERE / 'cca.hip', '-o', folder / 'cca.o'])
        libraries = cpp_extension.library_paths()[0]
        command([compiler, '-shared', *FLAGS[kind], binding, folder / 'cca.o', f'-L{libraries}', '-ltorch_cpu',
                 '-lc10', '-o', folder / 'library.so'])
        os.replace(folder / 'library.so', path)                 # atomic: another process may build it at the same time
    return path


load_for_gpu = build.load


@functools.cache
def load(device):
    """build.load, for the device 'cpu' in addition. NANOZAYA_CPU_BUILD selects a key of FLAGS."""
    if device != 'cpu':
        return load_for_gpu(device)
    torch.ops.load_library(library(os.environ.get('NANOZAYA_CPU_BUILD', 'cpu')))
