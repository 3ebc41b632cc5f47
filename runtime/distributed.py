"""Tensors in parts: how `train.py --shard=True` spreads a model over processes, and its checkpoints over files.

torch's own engines do the work. fully_shard (FSDP2) makes each parameter a DTensor: each process holds 1 / W of its
rows, or of its experts, and the same part of gradient and momentum. Before a layer runs, forward or backward, its parts
are gathered from all processes, and let go of after; gradients are added up, and each process keeps its part of the
sum.
torch.distributed.checkpoint writes the parts, as safetensors, and reads those that a process wants, on however many
processes: a folder of them and run.pt, which holds all that is not in parts.

A checkpoint is as safe as that of one process: files with checksums, a name only when all are on the disk, the one
before kept. No file holds code: the parts are safetensors, where torch's usual format has a pickle for its index.

Legend:  W processes   k matrices of one shape, m x n each   N experts
"""
import os
import shutil
import warnings
import zlib

import torch

from configurator import package
from validate import reading


def shard(model, device, dtype):
    """Give each process its part of a Zaya that was made on 'meta', without values yet. The experts, 91 % of the 8B
    model, are gathered in dtype, that of their products, and so apart from the rest of their layer, which is gathered
    in float32, since much of it is used so. The embedding, which belongs to no layer, is whole until a step is over."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard        # here and below: takes a second
    # FSDP warns of a layer whose output is a view, as a router's state may be: nothing here changes it in place.
    warnings.filterwarnings('ignore', '.*returned a view tensor')
    in_dtype = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer.moe.experts, mp_policy=in_dtype)
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()


# ---- a tensor, whole or in parts ----

def is_sharded(tensor):
    return hasattr(tensor, 'placements')


def local_part(tensor):
    return tensor.to_local() if is_sharded(tensor) else tensor


def distribute_like(value, like):
    """A whole tensor in the way in which `like` is there: as it is, or this process's part of it."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gather_full(tensor, here):
    """The whole tensor, on the CPU if it was in parts, and only where `here` is true. All processes call this."""
    if not is_sharded(tensor):
        return tensor.contiguous()
    whole = tensor.full_tensor()
    return whole.cpu() if here else None


def is_rank0():
    """Whether this is the first process, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def gather_lists(items):
    """All processes' lists in one, the same in each."""
    lists = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def broadcast_from_rank0(function):
    """What function() returns in the first process, in all of them."""
    result = [function() if is_rank0() else None]
    torch.distributed.broadcast_object_list(result)
    return result[0]


def copy_into(p, value):
    """Store a whole value in p, or this process's part of it."""
    p.copy_(distribute_like(value, p))


def orthogonalize_shards(orthogonalize, G):
    """orthogonalize (optim.py) for stacks in parts, so that it is the second dim that is split: G (k, m, n), of which a
    process holds some rows of each matrix, or G (1, N, m, n), some experts. Rows come together by one all-to-all, so
    that every process works on k / W of the matrices, and go back by another; an expert is whole where it is.

    A process sends about 8 k m n / W bytes a step: of the 8B model on 8, 0.2 GB, beside 32 GB of weights that it
    receives in forward and backward of each micro-batch (evidence/paper.py)."""
    from torch.distributed.tensor import DTensor, Shard
    whole = G.redistribute(placements=[Shard(0)]) if G.ndim == 3 else G
    X = DTensor.from_local(orthogonalize(whole.to_local()), G.device_mesh, whole.placements, run_check=False,
                           shape=G.shape, stride=G.stride())
    return X.redistribute(placements=G.placements)


# ---- checkpoints in files ----

def save_and_sync(path, state):
    with open(path, 'wb') as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def remove(path):
    """Remove a file, or a folder with all that is in it, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def walk(state, visit, path=''):
    """`state` with visit(path, tensor) in place of each tensor; a path is its keys, joined by '/'."""
    if isinstance(state, torch.Tensor):
        return visit(path, state)
    if isinstance(state, (dict, list)):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        new = {key: walk(value, visit, f'{path}/{key}'.lstrip('/')) for key, value in pairs}
        return new if isinstance(state, dict) else list(new.values())
    return state


def file_of(path):
    """Where the values of a checkpoint are that are not sharded."""
    return os.path.join(path, 'run.pt') if os.path.isdir(path) else path


def checksum_of(path):
    checksum = 0
    with open(path, 'rb') as file:
        while piece := file.read(2 ** 24):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def write_shards(path, state):
    """Write the sharded tensors as safetensors, each process its parts, and run.pt: all else, with the checksums of
    those files, and in place of each sharded tensor one without memory, on 'meta'. All processes must see one disk.
    Raises OSError if it cannot be written."""
    import torch.distributed as dist
    from torch.distributed import checkpoint as dcp
    package('safetensors')
    rank, world, tensors = dist.get_rank(), dist.get_world_size(), {}

    def shape_of(path, tensor):
        if is_sharded(tensor):
            tensors[path] = tensor
            return torch.empty(tensor.shape, dtype=tensor.dtype, device='meta')
        return tensor
    rest = walk(state, shape_of)
    broadcast_from_rank0(lambda: os.makedirs(path))
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(path, save_distributed=True))     # with fsync
    except dcp.api.CheckpointException as error:                # no Exception, to torch
        raise OSError(str(next(iter(error.failures.values()))[0])) from None
    names = broadcast_from_rank0(lambda: sorted(os.listdir(path)))
    checksums = gather_lists([(name, checksum_of(os.path.join(path, name))) for name in names[rank::world]])
    if rank == 0:
        save_and_sync(os.path.join(path, 'run.pt'), rest | {'checksums': dict(checksums)})


def read_shards(path, state, kind, like):
    """Fill in the tensors that run.pt left out, of the keys in `kind`. like: {path: tensor} says which parts of them
    this process wants; a tensor whose path is not there is wanted like that of the path above it. None: all of each."""
    from torch.distributed import checkpoint as dcp
    package('safetensors')
    tensors, wanted = {}, {key.removesuffix('?') for key in kind}

    def room(name, tensor):
        if tensor.is_meta:
            other = torch.empty(tensor.shape, dtype=tensor.dtype) if like is None else \
                like.get(name, like.get(name.rpartition('/')[0]))               # a momentum is split as its parameter
            if other is None or other.shape != tensor.shape:    # of another model: resume will say so
                return tensor
            tensors[name] = torch.zeros_like(other)
        return tensors.get(name, tensor)
    state = walk({key: value for key, value in state.items() if key in wanted}, room)
    with reading(path), warnings.catch_warnings():
        warnings.simplefilter('ignore')                         # 'assuming the intent is to load in a single process'
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(path), no_dist=like is None)
    return state
