"""Choose the device and the dtype of matrix products; copy batches to the device."""
import time

import torch


def pick_device(name):
    """Return the torch.device of that name; 'auto': cuda, else mps, else cpu. Raise ValueError if it cannot be used."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:                # torch raises any of these
        reason = str(error).splitlines()[0]
        raise ValueError(f'device {name!r} cannot be used here ({reason}); try --device=cpu') from None


def pick_dtype(name, device, width=256):
    """Return the torch.dtype of matrix products for 'auto', 'float32' or 'bfloat16'. 'auto' is bfloat16 on a GPU that
    has bf16 units (not on a T4 or a GTX 1080, where torch emulates bf16). On a CPU it is bfloat16 if a product of the
    model's width runs at least 1.5 times as fast with it, measured in 20 ms."""
    if name != 'auto' or device.type not in ('cpu', 'cuda'):
        return torch.bfloat16 if name == 'bfloat16' else torch.float32
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    before = torch.get_float32_matmul_precision()
    width, seconds, results = max(width, 256), {torch.float32: [], torch.bfloat16: []}, {}
    x, W = torch.randn(512, width), torch.randn(width, 2 * width)
    for dtype in 10 * list(seconds):                            # interleaved; the minimum is robust to other load
        matmuls_in(dtype, device)
        began = time.perf_counter()
        results[dtype] = x @ W
        seconds[dtype].append(time.perf_counter() - began)
    torch.set_float32_matmul_precision(before)
    differ = not results[torch.float32].equal(results[torch.bfloat16])          # equal: the CPU has no bf16 units
    choice = torch.tensor(int(differ and min(seconds[torch.float32]) > 1.5 * min(seconds[torch.bfloat16])))
    if torch.distributed.is_initialized():                      # the measurement of rank 0 decides for all ranks
        torch.distributed.broadcast(choice, 0)
    return torch.bfloat16 if choice else torch.float32


def expert_path(device, dtype):
    """Return a note for the start-up line: whether F.grouped_mm is one launch on a GPU; '' on other devices. This needs
    bf16 and compute capability 9 or 10 (torch 2.13). Otherwise the host synchronizes to read the ends of the experts'
    slices, and launches one matmul per expert."""
    if device.type != 'cuda':
        return ''
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and dtype == torch.bfloat16 and major in (9, 10):
        return f'; experts: one grouped matmul for all (bf16 on SM{major}{minor})'
    reason = f'{str(dtype)[6:]} on ' + ('ROCm' if torch.version.hip else f'SM{major}{minor}')
    return f'; experts: one matmul each, with a host sync ({reason}; a grouped matmul needs bf16 on SM9x or SM10x)'


def to_device(batch, device):
    """Return a list: each tensor of a loader's batch on `device`; None stays None. On a GPU, a copy from pinned memory
    is queued after the step before, and the host does not wait for it."""
    on_gpu = device.type == 'cuda'
    return [t if t is None else (t.pin_memory() if on_gpu else t).to(device, non_blocking=on_gpu) for t in batch]


# Dense bf16 peak of some GPUs in FLOP/s (data sheets), for the model FLOPs utilization (MFU).
PEAK_FLOPS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'MI300X': 1307e12, 'MI325X': 1307e12, '4090': 165e12}


def name_and_peak(device, dtype):
    """Return the device's name and its peak in FLOP/s in dtype, or None where that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    return name, next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name and dtype == torch.bfloat16), None)


def matmuls_in(dtype, device):
    """Set torch's global matmul precision so that products of float32 tensors round their inputs to dtype (float32 or
    bfloat16) and accumulate in float32, and return the autocast context for the forward pass.

    On a CPU the precision does all of it and autocast stays off: tensors remain float32. On other devices, autocast
    makes the products bf16. The precision stays set after the context, since backward and optimizer need it as well."""
    torch.set_float32_matmul_precision('medium' if dtype == torch.bfloat16 else 'highest')
    return torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16 and device.type != 'cpu')
