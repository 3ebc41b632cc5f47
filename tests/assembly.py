"""What the compilers make of kernels/cca.hip: `python -m tests.assembly`, no GPU needed.

Says what this machine can build and run; compiles for MI300 and H100 where their compilers are, and prints registers,
shared memory and occupancy. tests/test_kernels.py checks the same.
"""
import re
import shutil
import tempfile
from pathlib import Path

import torch

from kernels.build import HERE, command, gpu_trouble, load

GFX942_LDS = 65536              # bytes of shared memory (LDS) that a compute unit has
GFX942_REGISTERS = 512          # vector registers, of 64 lanes, that a SIMD shares out to its waves, in eights
MFMA = {'float32': 'v_mfma_f32_16x16x4_f32', 'bf16': 'v_mfma_f32_16x16x16_bf16', 'fp16': 'v_mfma_f32_16x16x16_f16'}


def gfx942_assembly():
    """cca.hip in gfx942's assembly language. Raises FileNotFoundError without a compiler, RuntimeError if it fails."""
    flags = ['-x', 'hip', '--offload-arch=gfx942', '--cuda-device-only', '-std=c++17', '-O3', '-S', HERE / 'cca.hip',
             '-o']
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if Path('/opt/rocm/llvm/bin/clang++').exists():
            command(['/opt/rocm/llvm/bin/clang++', *flags, folder / 'cca.s'])
        elif (clang := shutil.which('clang++-19')) and (bitcode := debian_bitcode()):
            # Debian 12's device library is older than gfx942. It has gfx940, whose file says the same of that ISA.
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
            'spills': number('vgpr_spill_count') + number('sgpr_spill_count'),
            'scratch': number('private_segment_fixed_size'),
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
    """Raise ValueError where a kernel would not run well: spilled registers, scratch, too much LDS, no matrix units."""
    for k in kernels:
        if k['spills'] or k['scratch'] or k['lds'] > GFX942_LDS or not k['mfma']:
            raise ValueError(f'gfx942: {k["kernel"]} in {k["dtype"]} has {k["spills"]} spilled registers, '
                             f'{k["scratch"]} bytes of scratch, {k["lds"]} bytes of LDS of {GFX942_LDS}, '
                             f'{k["mfma"]} {MFMA[k["dtype"]]}')


def find_nvcc():
    return shutil.which('nvcc') or next((str(p) for p in [Path('/usr/local/cuda/bin/nvcc')] if p.exists()), None)


def sm_90_kernels():
    """Compile cca.hip for H100 -> what each kernel uses: (name, 'Used 128 registers'). Raises as gfx942_assembly."""
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
