"""Compile cca.hip for this machine: for its GPU, or for the CPU; and inspect what the compilers make of it.

    python -m kernels.build            build for the GPU if there is one, else for the CPU
    python -m kernels.build --check    say what this machine can build and run; compile for MI300 and H100 where their
                                       compilers are, no GPU needed, and print registers, shared memory and occupancy

Three ways to a library, all with the same binding.cpp:
    ROCm     torch.utils.cpp_extension: hipcc compiles cca.hip
    CUDA     torch.utils.cpp_extension: it takes no .hip, so nvcc compiles a .cu of one line, #include "cca.hip"
    CPU      g++, called directly: cpp_extension would need ninja, and has nothing to add

Libraries are kept in TORCH_EXTENSIONS_DIR (default ~/.cache/torch_extensions), in folders named by a hash of the sources
and versions: a change of either builds anew, and two processes never disturb each other.
"""
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = 'cca.hip', 'cca.h', 'portable.h', 'binding.cpp'
# Builds for the CPU: as on an AMD GPU; with NVIDIA's lanes and register layout; with AddressSanitizer.
CPU_FLAGS = {'cpu': ['-O1'], 'cpu_nvidia': ['-O0', '-DIMITATE_NVIDIA'], 'cpu_asan': ['-O0', '-g1', '-fsanitize=address']}
GFX942_LDS = 65536              # bytes of shared memory (LDS) that a compute unit has
GFX942_REGISTERS = 512          # vector registers, of 64 lanes, that a SIMD shares out to its waves, in eights
MFMA = {'float32': 'v_mfma_f32_16x16x4_f32', 'bf16': 'v_mfma_f32_16x16x16_bf16', 'fp16': 'v_mfma_f32_16x16x16_f16'}


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
        command([compiler, '-std=c++17', '-fPIC', '-Wall', '-Wextra', '-Werror', '-Wno-unknown-pragmas', *CPU_FLAGS[kind],
                 '-x', 'c++', '-c', HERE / 'cca.hip', '-o', folder / 'cca.o'])
        libraries = cpp_extension.library_paths()[0]
        command([compiler, '-shared', *CPU_FLAGS[kind], binding, folder / 'cca.o', f'-L{libraries}', '-ltorch_cpu', '-lc10',
                 '-o', folder / 'library.so'])
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
    for name in SOURCES:                                        # copies: for ROCm, torch writes translated ones beside them
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
    except Exception as error:                                  # no compiler, no ninja, a failed build: torch has many ways
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


# ---- what the compilers make of it ----

def gfx942_assembly():
    """cca.hip in gfx942's assembly language. Raises FileNotFoundError without a compiler for it, RuntimeError if it fails."""
    flags = ['-x', 'hip', '--offload-arch=gfx942', '--cuda-device-only', '-std=c++17', '-O3', '-S', HERE / 'cca.hip', '-o']
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if Path('/opt/rocm/llvm/bin/clang++').exists():
            command(['/opt/rocm/llvm/bin/clang++', *flags, folder / 'cca.s'])
        elif (clang := shutil.which('clang++-19')) and (bitcode := debian_bitcode()):
            # Debian 12's device library is older than gfx942. It has gfx940, whose file says the same of that ISA.
            shutil.copytree(bitcode, folder / 'bitcode')
            if not (folder / 'bitcode' / 'oclc_isa_version_942.bc').exists():
                shutil.copy(folder / 'bitcode' / 'oclc_isa_version_940.bc', folder / 'bitcode' / 'oclc_isa_version_942.bc')
            command([clang, f'--rocm-device-lib-path={folder / "bitcode"}', *flags, folder / 'cca.s'])
        else:
            raise FileNotFoundError('no compiler for gfx942: it needs ROCm, or on Debian the packages '
                                    'clang-19 lld-19 libamdhip64-dev rocm-device-libs')
        return (folder / 'cca.s').read_text()


def debian_bitcode():
    folder = Path('/usr/lib/x86_64-linux-gnu/amdgcn/bitcode')
    return folder if folder.exists() and Path('/usr/include/hip/hip_runtime.h').exists() else None


def gfx942_kernels(assembly):
    """What each kernel uses, from the metadata at the assembly's end: a list of dicts."""
    kernels = []
    for entry in assembly.split('.amdhsa_kernel')[-1].split('  - .agpr_count:')[1:]:
        number = lambda key: int(re.search(rf'\.{key}: +(\d+)', entry).group(1))
        symbol = re.search(r'\.name: +(\S+)', entry).group(1)
        body = assembly[assembly.index(f'\n{symbol}:'):]
        body = body[:body.index('s_endpgm')]
        registers, lds = number('vgpr_count'), number('group_segment_fixed_size')
        name, dtype = describe(symbol)
        kernels.append({
            'kernel': name, 'dtype': dtype, 'vgprs': registers, 'lds': lds,
            'spills': number('vgpr_spill_count') + number('sgpr_spill_count'), 'scratch': number('private_segment_fixed_size'),
            'mfma': body.count(MFMA[dtype]),
            # A block of 256 threads puts one wave on each of the 4 SIMDs, so waves a SIMD = blocks a compute unit.
            'waves': min(8, GFX942_REGISTERS // (-(-registers // 8) * 8), GFX942_LDS // lds)})
    return kernels


def describe(symbol):
    """_Z8cca_rowsIfLi64ELi16ELb0EEv4Argsi -> 'cca_rows, D 64, 16 rows, forward', 'float32'"""
    name, dtype, parameters = re.match(r'_Z\d+([a-z_]+)I(f|4bf16|3f16)(.*?)EEv', symbol).groups()
    D, *rows_and_pass = re.findall(r'L[ib](\d+)', parameters)
    if rows_and_pass:
        rows, backward = rows_and_pass
        name = f'{name}, D {D}, {rows} rows, {"backward" if backward == "1" else "forward"}'
    else:
        name = f'{name}, D {D}'
    return name, {'f': 'float32', '4bf16': 'bf16', '3f16': 'fp16'}[dtype]


def check_gfx942(kernels):
    """Raises ValueError where a kernel would not run well: spilled registers, scratch memory, too much LDS, no matrix units."""
    for k in kernels:
        if k['spills'] or k['scratch'] or k['lds'] > GFX942_LDS or not k['mfma']:
            raise ValueError(f'gfx942: {k["kernel"]} in {k["dtype"]} has {k["spills"]} spilled registers, '
                             f'{k["scratch"]} bytes of scratch, {k["lds"]} bytes of LDS of {GFX942_LDS}, {k["mfma"]} {MFMA[k["dtype"]]}')


def find_nvcc():
    return shutil.which('nvcc') or next((str(p) for p in [Path('/usr/local/cuda/bin/nvcc')] if p.exists()), None)


def sm_90_kernels():
    """Compile cca.hip for H100; what each kernel uses: (name, 'Used 128 registers, ...'). Raises like gfx942_assembly."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError('no compiler for sm_90: it needs nvcc, of the CUDA toolkit')
    with tempfile.TemporaryDirectory() as folder:
        output = command([nvcc, '-x', 'cu', '-std=c++17', '-O3', '-arch=sm_90', '-Xptxas', '-v', '-c', HERE / 'cca.hip',
                          '-o', Path(folder) / 'cca.o'])
    return [(' '.join(describe(symbol)), used) for symbol, used
            in re.findall(r"Compiling entry function '(\w+)'.*?(Used \d+ registers[^\n]*)", output, re.S)]


def report():
    """Print what this machine can build and run."""
    print(f'torch {torch.__version__}')
    trouble = gpu_trouble()
    print('GPU:', trouble or f'{torch.cuda.get_device_name()}, the kernel is made for it')
    for kind in ('cuda', 'cpu'):
        if kind == 'cpu' or not trouble:
            try:
                load(kind)
                print(f'{kind}: built and loaded')
            except RuntimeError as error:
                print(f'{kind}: {error}')
    try:
        kernels = gfx942_kernels(gfx942_assembly())
        print('gfx942 (MI300), compiled only; waves: how many a SIMD can hold at once, at most 8\n')
        print('| kernel | dtype | VGPRs | LDS, bytes | waves | MFMA | spills, scratch |\n| --- | --- | --- | --- | --- | --- | --- |')
        for k in kernels:
            print(f'| {k["kernel"]} | {k["dtype"]} | {k["vgprs"]} | {k["lds"]:,} | {k["waves"]} | {k["mfma"]} '
                  f'| {k["spills"]}, {k["scratch"]} |')
        check_gfx942(kernels)
    except (FileNotFoundError, RuntimeError) as error:
        print(f'gfx942 (MI300): {error}')
    try:
        print('sm_90 (H100), compiled only')
        for name, used in sm_90_kernels():
            print(f'  {name}: {used}')
    except (FileNotFoundError, RuntimeError) as error:
        print(f'sm_90 (H100): {error}')


if __name__ == '__main__':
    if sys.argv[1:] not in ([], ['--check']):
        sys.exit('kernels.build: the only option is --check')
    try:
        if sys.argv[1:]:
            report()
        else:
            load('cpu' if (trouble := gpu_trouble()) else 'cuda')
            print(f'built for the CPU, for checking only ({trouble})' if trouble else f'built for {torch.cuda.get_device_name()}')
    except (RuntimeError, ValueError) as error:
        sys.exit(f'kernels.build: {error}')
