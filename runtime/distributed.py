"""Distributed training: process groups, FSDP2 shards of a model, and sharded checkpoints.

`train.py --shard=True` applies torch's fully_shard (FSDP2). Every parameter becomes a DTensor, sharded along its first
dim: a rank holds 1 / W of a matrix's output rows or of a layer's experts, with the same shard of gradient and momentum.
FSDP2 all-gathers a layer's shards before its forward and backward pass, frees them afterward, and reduce-scatters the
gradients.

torch.distributed.checkpoint writes the shards as safetensors files and reads those that a rank needs, for any world
size. A sharded checkpoint is a folder of these files and run.pt, which holds everything else. It is as safe as a single
file (runtime/checkpoint.py): checksums, fsync before the rename, the previous checkpoint kept. No file holds code:
torch's default format has a pickled index, so the shards are safetensors.

Legend:  W world size (number of processes)   k matrices of one shape, m x n each   N experts
"""
import os
import shutil
import warnings
import zlib

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import package
from runtime.device import pick_device
from validate import reading


# ---- processes ----

def start_processes(config):
    """Join torchrun's process group, if there is one. Return this process's device. config: train.TrainConfig."""
    world = int(os.environ.get('WORLD_SIZE', 1))
    if world > 1 and torch.cuda.is_available():                 # before any allocation, which would be on GPU 0
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    device = pick_device(config.device)
    if config.shard and 'RANK' not in os.environ:
        raise ValueError('shard splits a model over processes: start it by torchrun --nproc_per_node=8 train.py ...')
    if world > 1 or config.shard:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    if config.grad_accum % world:
        raise ValueError(f'grad_accum ({config.grad_accum}) must be a multiple of the {world} processes')
    return device


def stop_processes():
    """Leave torchrun's process group, if there is one, when all ranks are done: one that ended earlier could abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_rank0():
    """Return whether this process has rank 0 or is the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def print0(text):
    """Print on rank 0 only, above a progress bar if there is one."""
    if is_rank0():
        tqdm.write(text)


def gather_lists(items):
    """Concatenate the lists of all ranks. Every rank gets the result."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def broadcast_from_rank0(function):
    """Call function() on rank 0 and return its result on all ranks."""
    result = [function() if is_rank0() else None]
    dist.broadcast_object_list(result)
    return result[0]


# ---- sharded tensors ----

def shard(model, device, dtype):
    """Shard a Zaya that was built on 'meta', and allocate this rank's shards on device, uninitialized.

    The experts (91 % of the parameters of the 8B model) are all-gathered in dtype, that of their matrix products. They
    are a group of their own because the rest of a layer is all-gathered in float32, in which much of it is used. The
    embedding belongs to no layer and stays gathered for the whole step."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard        # imported here: it takes a second
    if dist.get_world_size() > model.config.n_expert:           # a rank without an expert would hold an empty shard
        raise ValueError(f'shard splits the {model.config.n_expert} experts: take at most n_expert processes')
    # FSDP2 warns if a layer returns a view, as the router state may be; no view is modified in place here.
    warnings.filterwarnings('ignore', '.*returned a view tensor')
    in_dtype = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer.moe.experts, mp_policy=in_dtype)
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()


def is_sharded(tensor):
    return hasattr(tensor, 'placements')


def local_part(tensor):
    """Return this rank's shard of a DTensor, or any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def distribute_like(value, like):
    """Return this rank's part of the full tensor `value`, sharded as `like` is; value itself if like is not sharded."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def copy_into(p, value):
    """Copy the full tensor `value` into p, or this rank's shard of it."""
    p.copy_(distribute_like(value, p))


def gather_full(tensor, here):
    """All-gather a sharded tensor. Return it on the CPU where `here` is true, else None; all ranks must call this.
    Return any other tensor unchanged but contiguous."""
    if not is_sharded(tensor):
        return tensor.contiguous()
    full = tensor.full_tensor()
    return full.cpu() if here else None


def orthogonalize_shards(orthogonalize, G):
    """Apply orthogonalize (optim.py) to stacks of matrices that are sharded along their second dim.

    G (k, m, n), matrix rows sharded: one all-to-all gives each rank k / W full matrices, a second one returns the
    results. G (1, N, m, n), experts sharded: each expert's matrix is already complete on its rank.
    A rank sends about 8 k m n / W bytes per step: 0.2 GB for the 8B model on 8 GPUs, compared with 32 GB of weights
    that it receives in the forward and backward pass of each micro-batch (evidence/paper.py)."""
    from torch.distributed.tensor import DTensor, Shard
    whole = G.redistribute(placements=[Shard(0)]) if G.ndim == 3 else G
    X = DTensor.from_local(orthogonalize(whole.to_local()), G.device_mesh, whole.placements, run_check=False,
                           shape=G.shape, stride=G.stride())
    return X.redistribute(placements=G.placements)


# ---- checkpoint files ----

def save_and_sync(path, state):
    """Write state with torch.save, and return when it is on the disk (fsync)."""
    with open(path, 'wb') as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def remove(path):
    """Remove a file or a folder with its contents, if it exists."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def walk(state, visit, path=''):
    """Return a copy of nested `state`, each tensor replaced by visit(path, tensor). A path joins keys by '/'."""
    if isinstance(state, torch.Tensor):
        return visit(path, state)
    if isinstance(state, (dict, list)):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        new = {key: walk(value, visit, f'{path}/{key}'.lstrip('/')) for key, value in pairs}
        return new if isinstance(state, dict) else list(new.values())
    return state


def file_of(path):
    """Return the file that holds a checkpoint's unsharded values."""
    return os.path.join(path, 'run.pt') if os.path.isdir(path) else path


def checksum_of(path):
    checksum = 0
    with open(path, 'rb') as file:
        while chunk := file.read(2 ** 24):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def write_shards(path, state):
    """Write a sharded checkpoint: each rank its shards, rank 0 run.pt with all other values, the checksums, and an
    empty 'meta' tensor in place of each sharded one. All ranks must share a file system. Raise OSError if a write
    fails."""
    from torch.distributed import checkpoint as dcp
    package('safetensors')
    tensors = {}

    def replace_sharded(name, tensor):
        if not is_sharded(tensor):
            return tensor
        tensors[name] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device='meta')
    rest = walk(state, replace_sharded)
    broadcast_from_rank0(lambda: os.makedirs(path))
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(path, save_distributed=True))     # with fsync
    except dcp.api.CheckpointException as error:                # a BaseException
        raise OSError(str(next(iter(error.failures.values()))[0])) from None
    names = broadcast_from_rank0(lambda: sorted(os.listdir(path)))
    mine = names[dist.get_rank()::dist.get_world_size()]        # each rank reads a share of the files
    checksums = gather_lists([(name, checksum_of(os.path.join(path, name))) for name in mine])
    if is_rank0():
        save_and_sync(os.path.join(path, 'run.pt'), rest | {'checksums': dict(checksums)})


def read_shards(path, state, schema, like):
    """Return state, the content of run.pt, with the sharded tensors under the keys of `schema` read from their files.

    like: {path: tensor} says how this rank's tensors are sharded; a path that is missing, as that of a momentum, has
    the sharding of its parent path. None: read all tensors in full."""
    from torch.distributed import checkpoint as dcp
    package('safetensors')
    tensors, wanted = {}, {key.removesuffix('?') for key in schema}

    def allocate(name, tensor):
        if tensor.is_meta:
            other = torch.empty(tensor.shape, dtype=tensor.dtype) if like is None else \
                like.get(name, like.get(name.rpartition('/')[0]))
            if other is None or other.shape != tensor.shape:    # of another model, which `resume` reports
                return tensor
            tensors[name] = torch.zeros_like(other)
        return tensors.get(name, tensor)
    state = walk({key: value for key, value in state.items() if key in wanted}, allocate)
    with reading(path), warnings.catch_warnings():
        warnings.simplefilter('ignore')                         # 'assuming the intent is to load in a single process'
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(path), no_dist=like is None)
    return state
