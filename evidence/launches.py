"""Count the operators that a training and a decode step launch on a GPU, without one: `python -m evidence.launches`.

Every PyTorch operator that is not a view costs a launch, a few microseconds of the host. Reading a value on the host
(`item`, `tolist`) synchronizes: the host waits for the GPU, which then waits for the next launch. Both are visible
without a GPU: on fake tensors (shapes and dtypes, no values) the code runs as on 'cuda', and operators are counted.

Not counted: the head's three bf16 products (kernels/head.py; a plain one is counted), writes by copy_,
the kernels of one operator (the optimizers' foreach and fused operators launch several for many tensors, a grouped
product on old GPUs one per expert), what torch.compile fuses, CUDA graphs.
"""
import contextlib
import sys
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import configurator
import torch
from torch import nn
import torch.utils._foreach_utils as foreach_utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import decode
from bench import MEDIUM
from model import Zaya, ZayaConfig
from optim import make_optimizers
from router import Balancer
from sample import sample_from_logits
from train import Run, TrainConfig, train_step

CUDA, ROOT = torch.device('cuda', 0), Path(__file__).parent.parent
READS = {torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__,
         torch.Tensor.__index__, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__format__}


def is_cuda(device):
    return device is not None and torch.device(device).type == 'cuda'


def launches(function):
    """Return whether an operator launches a kernel: not if it returns a view or (by name) only allocates."""
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
    name = function.overloadpacket.__name__
    return not (views or name.startswith(('device', 'empty', 'new_empty', '_unsafe_view', 'sym_', 'detach', 'lift')))


class Operators(TorchDispatchMode):
    """Counts, by name, the operators on fake tensors that launch a kernel. inside: torch executes one."""

    def __init__(self):
        super().__init__()
        self.count, self.inside = Counter(), False

    @contextlib.contextmanager
    def in_torch(self):
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if FakeTensor in types and launches(function):
            self.count[str(function.overloadpacket)] += 1
        with self.in_torch():
            return function(*args, **(kwargs or {}))


class FakeGPU(TorchFunctionMode):
    """In this context, tensors on the device 'cuda' are fake: they have no values. Others are real.

    operators: Counter of the operators on fake tensors. reads, copies: Counters of the places, 'FILE: LINE OF CODE' of
    this project, where the host reads a value of a fake tensor (ones are returned), and where it waits for a copy to
    the device (from memory that is not pinned). Other data-dependent operators raise errors: indexing with a mask,
    nonzero, a tensor where an operator needs a number."""

    def __init__(self):
        super().__init__()
        self.fake, self.counting = FakeTensorMode(allow_non_fake_inputs=True), Operators()
        self.operators, self.reads, self.copies = self.counting.count, Counter(), Counter()

    def __enter__(self):
        real = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
        self.stack = contextlib.ExitStack()
        # torch sees fake tensors on 'cpu', the project on 'cuda'. Autocast and foreach treat the CPU as a GPU.
        real_device = FakeTensor.device
        device = property(lambda tensor: real_device.fget(tensor) if self.counting.inside else CUDA)
        for target, name, value in (
                (FakeTensor, 'device', device), (FakeTensor, 'tolist', lambda tensor: self.read_list(tensor)),
                (torch, 'autocast', lambda device, *args, **options: real[0]('cpu', *args, **options)),
                (torch, 'is_autocast_enabled', lambda device: real[1]('cpu')),
                (torch, 'get_autocast_dtype', lambda device: real[2]('cpu')),
                (foreach_utils, '_foreach_supported_types', [torch.Tensor, FakeTensor]),
                (foreach_utils, '_get_foreach_kernels_supported_devices', lambda: ['cpu', 'cuda'])):
            self.stack.enter_context(mock.patch.object(target, name, value))
        self.stack.enter_context(self.counting)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    def model(self, config, dtype=torch.float32):
        """Return a Zaya on this device, its parameters and buffers in dtype."""
        with torch.device('meta'):
            model = Zaya(config)
        with self.fake, self.counting.in_torch():
            for module in model.modules():
                for tensors in module._parameters, module._buffers:
                    for name, t in tensors.items():
                        if t is not None:
                            fake = torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype)
                            tensors[name] = nn.Parameter(fake) if isinstance(t, nn.Parameter) else fake
        return model

    def fake_copy(self, tensor):
        with self.counting.in_torch():
            return self.fake.from_tensor(tensor)

    def read_list(self, tensor):
        """Return tensor.tolist(), which torch would do element by element."""
        self.reads[here()] += 1
        return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, first = dict(kwargs or {}), args[0] if args else None
        is_fake = isinstance(first, FakeTensor)
        if function == torch.Tensor.is_cuda.__get__ and is_fake:
            return True
        if function == torch.Tensor.pin_memory:
            first.is_pinned_here = True
            return first
        if function == torch.Tensor.to and not is_fake:
            return self.copy_to(first, args[1:], kwargs)
        to_host = function == torch.Tensor.to and 'cpu' in map(str, args[1:]) and not in_torch(sys._getframe(1))
        if is_fake and (function in READS or to_host):
            self.reads[here()] += 1
            return function(torch.ones(first.shape, dtype=first.dtype), *args[1:], **kwargs)
        if function == torch.Tensor.__getitem__ and is_fake and host_index(args[1]):
            self.copies[here()] += 1
        if is_cuda(kwargs.get('device')):
            kwargs['device'] = 'cpu'
            if not any(isinstance(x, FakeTensor) for x in args):        # a new tensor
                if function == torch.tensor:
                    self.copies[here()] += 1
                self.operators[function.__name__] += function not in (torch.empty, torch.tensor)
                return self.fake_copy(function(*args, **kwargs))
        if is_fake and function == torch.Tensor.to:
            args = [torch.device('cpu') if isinstance(x, torch.device) else x for x in args]
        return function(*args, **kwargs)

    def copy_to(self, tensor, args, kwargs):
        """Return tensor.to(*args, **kwargs) of a real tensor."""
        device = kwargs.pop('device', next((x for x in args if isinstance(x, (torch.device, str))), None))
        if not is_cuda(device):
            return tensor.to(*args, **kwargs)
        if not (kwargs.pop('non_blocking', False) and getattr(tensor, 'is_pinned_here', False)):
            self.copies[here()] += 1
        rest = [x for x in args if x is not device]
        return self.fake_copy(tensor.to(*rest, **kwargs) if rest or kwargs else tensor)


def host_index(index):
    """Return whether an index holds a list or a CPU tensor, which is copied to the device."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(x, list) or isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) for x in parts)


def in_torch(frame):
    """Return whether a frame runs torch's own code, to which a fake tensor is on the CPU."""
    return Path(frame.f_code.co_filename).is_relative_to(Path(torch.__file__).parent)


def here():
    """Return the place of the innermost call from a file of this project other than this one: 'FILE: LINE OF CODE'."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and '.venv' not in path.parts and path != Path(__file__) \
                and 'tests' not in path.parts:
            return f'{path.relative_to(ROOT)}: {frame.line}'
    return 'tests'


class ZeroBatches:
    """A loader whose batches hold token 0; packed: with document starts."""

    def __init__(self, batch_size, context, packed):
        self.shape, self.packed = (batch_size, context), packed

    def batch(self, index):
        x = torch.zeros(self.shape, dtype=torch.int64)
        return x, x.clone(), torch.ones(self.shape, dtype=torch.bool) if self.packed else None


def make_run(gpu, model_config, packed=False, **settings):
    """Return a Run of train.py on a FakeGPU, in bf16."""
    config = TrainConfig(**settings)
    model = gpu.model(model_config)
    balancer = Balancer(model.routers, config.balancer, config.balancer_lr)
    loader = ZeroBatches(config.batch_size, model_config.context, packed)
    return Run(config, model, model, make_optimizers(model, config.lr), balancer, loader, loader,
               autocast=torch.autocast('cuda', torch.bfloat16), tokens_per_step=1)


def count_training(model_config, packed=False, **settings):
    """Return the FakeGPU after the second training step (the first allocates the optimizers' state)."""
    with FakeGPU() as gpu:
        run = make_run(gpu, model_config, packed, **settings)
        train_step(run)                                         # the optimizers' state is allocated
        for counter in gpu.operators, gpu.reads, gpu.copies:
            counter.clear()
        train_step(run)
    return gpu


def count_decoding(model_config, B=8):
    """Return the FakeGPU after one decode step, of B sequences, with sampling."""
    with FakeGPU() as gpu, torch.no_grad():
        model = gpu.model(model_config, torch.bfloat16).eval()
        step, cache = decode.folded(model), model.make_cache(B, 16)
        tokens, u = torch.zeros(B, dtype=torch.int64, device=CUDA), torch.zeros(B, device=CUDA)
        for counter in gpu.operators, gpu.reads, gpu.copies:
            counter.clear()
        sample_from_logits(step(cache, tokens), u, top_p=0.95)
    return gpu


def main():
    print(f'{"model":<8}{"layers":>8}{"training step":>16}{"decode step":>14}   operators that launch something')
    for name, config, batch_size in ('small', ZayaConfig(), 16), ('medium', MEDIUM, 32):       # batch sizes of config/
        training, decoding = count_training(config, batch_size=batch_size), count_decoding(config)
        print(f'{name:<8}{config.n_layer:>8}{training.operators.total():>16,}{decoding.operators.total():>14,}')
        for kind, gpu in ('training', training), ('decoding', decoding):
            print(f'    {kind}: ' + ', '.join(f'{name[5:] if name.startswith("aten.") else name} {n}'
                                              for name, n in gpu.operators.most_common(8)))
            print(f'    host syncs and copies: {dict(gpu.reads + gpu.copies) or "nothing"}')


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.launches'):
        configurator.read(sys.argv[1:])                         # it has no settings
        main()
