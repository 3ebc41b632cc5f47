"""What the compilers make of kernels/cca.hip: `python -m tests.assembly`, no GPU needed.

Compiles for MI300 and H100 where their compilers are installed, and prints registers, shared memory and occupancy of
each kernel. tests/test_kernels.py checks the same.
"""
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from kernels.build import HERE, gpu_trouble, load

GFX942_LDS = 65536              # bytes of shared memory (LDS) per compute unit
GFX942_REGISTERS = 512          # vector registers per SIMD, allocated to waves in multiples of 8
MFMA = {'float32': 'v_mfma_f32_16x16x4_f32', 'bf16': 'v_mfma_f32_16x16x16_bf16', 'fp16': 'v_mfma_f32_16x16x16_f16'}


def command(arguments):
    """Run a compiler and return its output. Raise RuntimeError with the output if it fails."""
    done = subprocess.run(list(map(str, arguments)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f'{Path(arguments[0]).name} failed:\n{done.stdout.strip()[-4000:]}')
    return done.stdout


def gfx942_assembly():
    """Compile cca.hip to gfx942 assembly and return its text. Raise FileNotFoundError without a compiler, RuntimeError
    if it fails."""
    flags = ['-x', 'hip', '--offload-arch=gfx942', '--cuda-device-only', '-std=c++17', '-O3', '-S', HERE / 'cca.hip',
             '-o']
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if Path('/opt/rocm/llvm/bin/clang++').exists():
            command(['/opt/rocm/llvm/bin/clang++', *flags, folder / 'cca.s'])
        elif (clang := shutil.which('clang++-19')) and (bitcode := debian_bitcode()):
            # Debian 12's device library predates gfx942. The file of gfx940 is equivalent for this ISA.
            shutil.copytree(bitcode, folder / 'bitcode')
            if not (folder / 'bitcode' / 'oclc_isa_version_942.bc').exists():
                shutil.copy(folder / 'bitcode' / 'oclc_isa_version_940.bc',
                            folder / 'bitcode' / 'oclc_isa_version_942.bc')
            command([clang, f'--rocm-device-lib-path={folder / "bitcode"}', *flags, folder / 'cca.s'])
        else:
            raise FileNotFoundError('no compiler for gfx942: it needs ROCm, or on Debian the packages '
                                    'clang-19 lld-19 libamdhip64-dev rocm-device-libs')
        return (folder / 'cca.s').read_text()


def debian_bitcode():
    folder = Path('/usr/lib/x86_64-linux-gnu/amdgcn/bitcode')
    return folder if folder.exists() and Path('/usr/include/hip/hip_runtime.h').exists() else None


def gfx942_kernels(assembly):
    """Return the resource usage of each kernel as a list of dicts, from the metadata at the end of the assembly."""
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
            'spills': number('vgpr_spill_count') + number('sgpr_spill_count'),
            'scratch': number('private_segment_fixed_size'),
            'mfma': body.count(MFMA[dtype]),
            # 256 threads are one wave on each of the 4 SIMDs, so waves per SIMD = thread blocks per CU.
            'waves': min(8, GFX942_REGISTERS // (-(-registers // 8) * 8), GFX942_LDS // lds)})
    return kernels


def describe(symbol):
    """_Z8cca_tileIfLi64ELi16ELb0EEv4Argsi -> 'cca_tile, D 64, 16 rows, forward', 'float32'"""
    name, dtype, parameters = re.match(r'_Z\d+([a-z_]+)I(f|4bf16|3f16)(.*?)EEv', symbol).groups()
    D, *rows_and_pass = re.findall(r'L[ib](\d+)', parameters)
    if rows_and_pass:
        rows, backward = rows_and_pass
        name = f'{name}, D {D}, {rows} rows, {"backward" if backward == "1" else "forward"}'
    else:
        name = f'{name}, D {D}'
    return name, {'f': 'float32', '4bf16': 'bf16', '3f16': 'fp16'}[dtype]


def check_gfx942(kernels):
    """Raise ValueError if a kernel spills registers, uses scratch or too much LDS, or has no MFMA instruction."""
    for k in kernels:
        if k['spills'] or k['scratch'] or k['lds'] > GFX942_LDS or not k['mfma']:
            raise ValueError(f'gfx942: {k["kernel"]} in {k["dtype"]} has {k["spills"]} spilled registers, '
                             f'{k["scratch"]} bytes of scratch, {k["lds"]} bytes of LDS of {GFX942_LDS}, '
                             f'{k["mfma"]} {MFMA[k["dtype"]]}')


def find_nvcc():
    return shutil.which('nvcc') or next((str(p) for p in [Path('/usr/local/cuda/bin/nvcc')] if p.exists()), None)


def sm_90_kernels():
    """Compile cca.hip for H100 and return each kernel's (name, 'Used 128 registers'). Raise like gfx942_assembly."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError('no compiler for sm_90: it needs nvcc, from the CUDA toolkit')
    with tempfile.TemporaryDirectory() as folder:
        output = command([nvcc, '-x', 'cu', '-std=c++17', '-O3', '-arch=sm_90', '-Xptxas', '-v', '-c', HERE / 'cca.hip',
                          '-o', Path(folder) / 'cca.o'])
    return [(' '.join(describe(symbol)), used) for symbol, used
            in re.findall(r"Compiling entry function '(\w+)'.*?(Used \d+ registers[^\n]*)", output, re.S)]


def report():
    """Print the resource usage of every kernel, for each compiler that is installed."""
    print(f'torch {torch.__version__}')
    trouble = gpu_trouble()
    try:
        if not trouble:
            load()
        print('GPU:', trouble or f'built and loaded for {torch.cuda.get_device_name()}')
    except RuntimeError as error:
        print(f'GPU: {error}')
    try:
        kernels = gfx942_kernels(gfx942_assembly())
        print('gfx942 (MI300), compiled only; waves: occupancy, waves per SIMD, at most 8\n')
        print('| kernel | dtype | VGPRs | LDS, bytes | waves | MFMA | spills, scratch |\n' + '| --- ' * 7 + '|')
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
    report()
