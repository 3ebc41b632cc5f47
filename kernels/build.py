"""Compile cca.hip for this machine: `python -m kernels.build`, for its GPU if there is one, else for the CPU.

Three ways to a library, all with the same binding.cpp:
    ROCm     torch.utils.cpp_extension: hipcc compiles cca.hip
    CUDA     torch.utils.cpp_extension: it takes no .hip, so nvcc compiles a .cu of one line, #include "cca.hip"
    CPU      g++, called directly: cpp_extension would need ninja, and has nothing to add

Libraries are kept in TORCH_EXTENSIONS_DIR (default ~/.cache/torch_extensions), in folders named by a hash of the
sources and versions: a change of either builds anew, and two processes never disturb each other.
"""
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = 'cca.hip', 'cca.h', 'portable.h', 'binding.cpp'
# Builds for the CPU: as on an AMD GPU; with NVIDIA's lanes and register layout; with AddressSanitizer.
CPU_FLAGS = {'cpu': ['-O1'], 'cpu_nvidia': ['-O0', '-DIMITATE_NVIDIA'],
             'cpu_asan': ['-O0', '-g1', '-fsanitize=address']}


def command(arguments):
    """Run a compiler. Returns its output; raises RuntimeError with it, should it fail."""
    done = subprocess.run(list(map(str, arguments)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f'{Path(arguments[0]).name} failed:\n{done.stdout.strip()[-4000:]}')
    return done.stdout


def cache_folder(kind):
    """Where the library of this kind ('cuda', 'rocm', a key of CPU_FLAGS) belongs."""
    digest = hashlib.sha256(f'{kind} {torch.__version__} {sys.version}'.encode())
    for name in (*SOURCES, 'build.py'):
        digest.update((HERE / name).read_bytes())
    root = os.environ.get('TORCH_EXTENSIONS_DIR') or Path.home() / '.cache' / 'torch_extensions'
    return Path(root) / f'nanozaya_{kind}_{digest.hexdigest()[:16]}'


def cpu_library(kind='cpu'):
    """Path of the library for the CPU, built if need be. Raises RuntimeError if that fails."""
    path = cache_folder(kind) / 'library.so'
    if path.exists():
        return path
    compiler = shutil.which(os.environ.get('CXX', 'g++'))
    if compiler is None:
        raise RuntimeError('the kernel for the CPU needs g++, which is not installed (Debian: apt install g++)')
    from torch.utils import cpp_extension
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        folder = Path(folder)
        includes = [f'-isystem{p}' for p in cpp_extension.include_paths()]
        binding = cache_folder('binding') / 'binding.o'                         # the same for every kind
        if not binding.exists():
            binding.parent.mkdir(parents=True, exist_ok=True)
            command([compiler, '-std=c++20', '-fPIC', '-DFOR_CPU', *includes, '-c', HERE / 'binding.cpp',
                     '-o', folder / 'binding.o'])
            os.replace(folder / 'binding.o', binding)
        # Low optimization: most of the time goes into compiling. -x c++: g++ does not know .hip.
        command([compiler, '-std=c++17', '-fPIC', '-Wall', '-Wextra', '-Werror', '-Wno-unknown-pragmas',
                 *CPU_FLAGS[kind], '-x', 'c++', '-c', HERE / 'cca.hip', '-o', folder / 'cca.o'])
        libraries = cpp_extension.library_paths()[0]
        command([compiler, '-shared', *CPU_FLAGS[kind], binding, folder / 'cca.o', f'-L{libraries}', '-ltorch_cpu',
                 '-lc10', '-o', folder / 'library.so'])
        os.replace(folder / 'library.so', path)                 # whole or not at all, whoever else builds it just now
    return path


def gpu_trouble():
    """Why the kernel cannot run on this machine's GPU, or None."""
    if not torch.cuda.is_available():
        return 'torch sees no GPU of NVIDIA or AMD'
    if torch.version.hip:
        arch = torch.cuda.get_device_properties().gcnArchName.split(':')[0]
        return None if arch == 'gfx942' else f'it is written for gfx942 (MI300), this GPU is {arch}'
    return None if torch.cuda.get_device_capability() >= (8, 0) else 'it needs an NVIDIA GPU of Ampere or newer'


def load_for_gpu():
    """Build the library for this machine's GPU if need be, and load it. Raises RuntimeError if that fails."""
    if trouble := gpu_trouble():
        raise RuntimeError(trouble)
    from torch.utils import cpp_extension
    rocm = bool(torch.version.hip)
    folder = cache_folder('rocm' if rocm else 'cuda')
    folder.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:                                        # for ROCm, torch writes translations beside them
        if not (folder / name).exists() or (folder / name).read_bytes() != (HERE / name).read_bytes():
            shutil.copy(HERE / name, folder)
    device_source = folder / 'cca.hip'
    if not rocm:
        device_source = folder / 'cca_nvidia.cu'
        if not device_source.exists():
            device_source.write_text('#include "cca.hip"\n')
    try:
        cpp_extension.load(folder.name, [str(folder / 'binding.cpp'), str(device_source)], is_python_module=False,
                           extra_cflags=['-O2'], build_directory=str(folder),
                           extra_cuda_cflags=['-O3', '-std=c++17', *(['--offload-arch=gfx942'] if rocm else [])])
    except Exception as error:                                  # no compiler, no ninja, a failed build: in many ways
        raise RuntimeError(f'the kernel could not be built: {error}') from error


@functools.cache
def load(device):
    """Make the operators work for tensors on 'cpu' or 'cuda' (ROCm too), building them at first use.
    Raises RuntimeError if that is not possible, with the reason."""
    if device == 'cuda':
        load_for_gpu()
    elif device == 'cpu':
        torch.ops.load_library(cpu_library(os.environ.get('NANOZAYA_CPU_BUILD', 'cpu')))
    else:
        raise RuntimeError(f'there is no kernel for the device {device!r}, only for cuda (NVIDIA, AMD) and cpu')


if __name__ == '__main__':
    if sys.argv[1:]:
        sys.exit('kernels.build takes no options; what the compilers make of the kernel: python -m tests.assembly')
    try:
        load('cpu' if (trouble := gpu_trouble()) else 'cuda')
        print(f'built for the CPU, for checking only ({trouble})' if trouble else
              f'built for {torch.cuda.get_device_name()}')
    except (RuntimeError, ValueError) as error:
        sys.exit(f'kernels.build: {error}')
