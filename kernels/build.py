"""Compile cca.hip for this machine's GPU and load it: `python -m kernels.build`.

    ROCm     torch.utils.cpp_extension: hipcc compiles cca.hip
    CUDA     torch.utils.cpp_extension: it does not accept .hip, so nvcc compiles a one-line .cu, #include "cca.hip"

Both use the same binding.cpp. Libraries are stored in TORCH_EXTENSIONS_DIR (default ~/.cache/torch_extensions), in
folders named by a hash of the sources and versions, so that any change triggers a new build.
"""
import functools
import hashlib
import os
import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = [HERE / name for name in ('cca.hip', 'cca.h', 'portable.h', 'binding.cpp')]


def cache_folder(kind, files):
    """Return the folder for the library of this kind ('cuda', 'rocm'), compiled from these files."""
    digest = hashlib.sha256(f'{kind} {torch.__version__} {sys.version}'.encode())
    for path in files:
        digest.update(path.read_bytes())
    root = os.environ.get('TORCH_EXTENSIONS_DIR') or Path.home() / '.cache' / 'torch_extensions'
    return Path(root) / f'nanozaya_{kind}_{digest.hexdigest()[:16]}'


def gpu_trouble():
    """Return why the kernel cannot run on this machine's GPU, or None."""
    if not torch.cuda.is_available():
        return 'torch finds no NVIDIA or AMD GPU'
    if torch.version.hip:
        arch = torch.cuda.get_device_properties().gcnArchName.split(':')[0]
        return None if arch == 'gfx942' else f'it is written for gfx942 (MI300), this GPU is {arch}'
    return None if torch.cuda.get_device_capability() >= (8, 0) else 'it needs an NVIDIA GPU of Ampere or newer'


@functools.cache
def load(device='cuda'):
    """Load the library that makes the operators work on `device`, building it at first use. Raise RuntimeError with the
    reason if that is not possible. ROCm's device is 'cuda', too."""
    if device != 'cuda':
        raise RuntimeError(f'there is no kernel for the device {device!r}, only for cuda (NVIDIA, AMD)')
    if trouble := gpu_trouble():
        raise RuntimeError(trouble)
    from torch.utils import cpp_extension
    rocm = bool(torch.version.hip)
    folder = cache_folder('rocm' if rocm else 'cuda', [*SOURCES, Path(__file__)])
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:                                      # for ROCm, torch writes translated files next to them
        if not (folder / source.name).exists() or (folder / source.name).read_bytes() != source.read_bytes():
            shutil.copy(source, folder)
    device_source = folder / ('cca.hip' if rocm else 'cca_nvidia.cu')
    if not device_source.exists():
        device_source.write_text('#include "cca.hip"\n')
    try:
        cpp_extension.load(folder.name, [str(folder / 'binding.cpp'), str(device_source)], is_python_module=False,
                           extra_cflags=['-O2'], build_directory=str(folder),
                           extra_cuda_cflags=['-O3', '-std=c++17', *(['--offload-arch=gfx942'] if rocm else [])])
    except Exception as error:                                  # no compiler, no ninja, a failed build: many types
        raise RuntimeError(f'the kernel could not be built: {error}') from error


if __name__ == '__main__':
    if {'-h', '--help'} & set(sys.argv):
        sys.exit(print(__doc__))
    if sys.argv[1:]:
        sys.exit('kernels.build takes no options; what the compilers make of the kernel: python -m tests.assembly')
    if trouble := gpu_trouble():
        sys.exit(f'kernels.build: no GPU to build for ({trouble}); to check the kernel on the CPU: '
                 'python -m pytest tests/test_kernels.py')
    try:
        load()
        print(f'built for {torch.cuda.get_device_name()}')
    except RuntimeError as error:
        sys.exit(f'kernels.build: {error}')
