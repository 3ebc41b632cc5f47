"""Devices and dtypes: which device, which dtype of matrix products, and the device's peak."""
import time

import torch


def pick_device(name):
    """'auto' or the name of a torch device -> torch.device. Raises ValueError if it is not there."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:                # torch has no one way to say no
        reason = str(error).splitlines()[0]
        raise ValueError(f'device {name!r} cannot be used here ({reason}); try --device=cpu') from None


def pick_dtype(name, device, width=256):
    """'auto', 'float32' or 'bfloat16' -> the torch.dtype of matrix products. 'auto': bfloat16 on cuda, and on a CPU
    that is at least 1.5 times as fast with it, which a product of a model's width shows in some 20 ms."""
    if name != 'auto' or device.type not in ('cpu', 'cuda'):
        return torch.bfloat16 if name == 'bfloat16' else torch.float32
    if device.type == 'cuda':
        return torch.bfloat16
    width, seconds, results = max(width, 256), {torch.float32: [], torch.bfloat16: []}, {}
    x, W = torch.randn(512, width), torch.randn(width, 2 * width)
    for dtype in 10 * list(seconds):                            # in turns, and the best counts: the machine may be busy
        products_in(dtype, device)
        began = time.perf_counter()
        results[dtype] = x @ W
        seconds[dtype].append(time.perf_counter() - began)
    differ = not results[torch.float32].equal(results[torch.bfloat16])          # or it has no bf16 units
    choice = torch.tensor(int(differ and min(seconds[torch.float32]) > 1.5 * min(seconds[torch.bfloat16])))
    if torch.distributed.is_initialized():                      # all processes do as the first: its measurement counts
        torch.distributed.broadcast(choice, 0)
    return torch.bfloat16 if choice else torch.float32


# Dense bf16 peak of a few GPUs in FLOP/s, from their data sheets, for the model FLOPs utilisation (MFU).
PEAK_FLOPS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'MI300X': 1307e12, 'MI325X': 1307e12, '4090': 165e12}


def name_and_peak(device, dtype):
    """-> the device's name, and its peak in FLOP/s in dtype if it is known, else None."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    return name, next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name and dtype == torch.bfloat16), None)


def products_in(dtype, device):
    """Let matrix products multiply in dtype (torch.float32 or bfloat16) from now on, sums in float32. Return the
    context for a model's forward. On a CPU its tensors stay float32, and their products round inside."""
    torch.set_float32_matmul_precision('medium' if dtype == torch.bfloat16 else 'highest')
    return torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16 and device.type != 'cpu')
