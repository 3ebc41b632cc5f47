"""A run's checkpoints: ckpt.pt, the one before it, and log.csv, so that a crash at any moment leaves a whole one.

A checkpoint of `train.py --shard=True` is a folder of that name, which any number of processes can read, one as well
(runtime/distributed.py).

Nothing in a file is ever executed. A file that cannot be used is a ValueError that names it.
"""
import contextlib
import csv
import os
import pickle                                                   # for the name of an error only: see load_checkpoint
import platform
import re
import sys
import zipfile
from dataclasses import asdict, fields

import torch

from data.tokenizer import digest, load_tokenizer
from model import Zaya, ZayaConfig
from runtime.distributed import (broadcast_from_rank0, checksum_of, distribute_like, file_of, gather_lists,
                                 is_rank0, is_sharded, local_part, read_shards, remove, save_and_sync, write_shards)
from runtime.language import run_language
from validate import check, read_bytes

# What a checkpoint must be: at least to take its weights, and to go on from it (see validate.py).
kinds = {field.name: field.type for field in fields(ZayaConfig)}
WEIGHTS = {'model': {str: torch.Tensor}, 'step': range(2 ** 63), 'tokenizer?': str,
           'model_config': {'vocab_size': int} | {f'{key}?': kind for key, kind in kinds.items()}}
ADAMW = {'step': torch.Tensor, 'exp_avg': torch.Tensor, 'exp_avg_sq': torch.Tensor}
RESUMABLE = WEIGHTS | {'config': {str: (bool, int, float, str)}, 'balancer': {'state': {int: ADAMW}},
                       'optimizers': [{'state': {int: {'momentum': torch.Tensor}}}, {'state': {int: ADAMW}}]}


@contextlib.contextmanager
def exclusive_lock(path):
    """Hold a file for this process alone, and write into it who that is. The operating system lets go of it when the
    process ends, however it ends. Raise ValueError if another process holds it."""
    with open(path, 'a+', encoding='utf-8') as file:
        try:
            import fcntl                                        # Windows has none, and does without
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f'{path}: {file.read(99).strip() or "another process"} is at work here: wait for it, stop '
                             'it, or use another folder') from None
        except (ImportError, OSError):                          # a disk without locks
            pass
        file.truncate(0)
        file.write(f'process {os.getpid()} on {platform.node()}\n')
        file.flush()
        yield


def save_checkpoint(folder, state):
    """Write `state` (tensors, numbers, strings, lists and dicts of them) so that a crash at any moment leaves a whole
    checkpoint behind: under a temporary name, onto the disk (fsync), and only then under its own. All processes call
    this where tensors are sharded. Raises OSError if the disk is full, say, ValueError if a weight is not finite; the
    checkpoints already there are then untouched."""
    weights = state.get('model', {})
    sharded = any(map(is_sharded, weights.values()))
    bad = [name for name, tensor in weights.items() if not local_part(tensor).isfinite().all()]
    if bad := gather_lists(bad) if sharded else bad:
        raise ValueError(f'{bad[0]} is not finite after step {state["step"]}, and not saved; try a smaller lr')
    new, current, previous = (os.path.join(folder, name) for name in ('ckpt.tmp', 'ckpt.pt', 'ckpt_previous.pt'))
    try:
        if is_rank0():
            remove(new)
        (write_shards if sharded else save_and_sync)(new, state)
    except BaseException as error:                              # a full disk, Ctrl-C: leave no half file behind
        if is_rank0():
            remove(new)
        if isinstance(error, (OSError, RuntimeError)):          # torch reports a failed write as either of them
            cause = error if isinstance(error, OSError) else error.__context__
            raise OSError(f'{new}: cannot be written ({getattr(cause, "strerror", None) or error})') from None
        raise
    if not sharded or is_rank0():
        # A damaged one must not push out a good one; a folder is not read again for that, it would take minutes.
        if os.path.isdir(current) or os.path.exists(current) and damage(current) is None:
            remove(previous)
            os.replace(current, previous)
        if sharded:                                             # a folder cannot take the place of a file
            remove(current)
        os.replace(new, current)                                # killed before this line: ckpt_previous.pt is whole


def damage(path):
    """What is wrong with a file or folder that save_checkpoint wrote, or None. torch.save writes a zip archive with a
    checksum for each part; torch.load ignores them."""
    try:
        with zipfile.ZipFile(file_of(path)) as archive:
            if part := archive.testzip():
                return f'its part {part} is corrupt'
        if os.path.isdir(path):
            for name, checksum in torch.load(file_of(path), weights_only=True)['checksums'].items():
                if os.path.basename(name) != name or checksum_of(os.path.join(path, name)) != checksum:
                    return f'its {name} is corrupt'
    except Exception as error:                                  # whatever a damaged file makes zipfile say
        return str(error)


def load_checkpoint(folder, kind=WEIGHTS, like=None):
    """The newest undamaged checkpoint of a run, on the CPU, or None if it has none at all. A damaged one, or one that
    is not of that kind, is reported and its predecessor used. like: see read_shards; all processes call this then, and
    the first looks for damage. Raises ValueError if every one there is damaged."""
    paths = [os.path.join(folder, name) for name in ('ckpt.pt', 'ckpt_previous.pt')]
    paths = [path for path in paths if os.path.exists(path)]
    for path in paths:
        what = damage(path) if like is None else broadcast_from_rank0(lambda: damage(path))
        try:
            if what is None:
                state = torch.load(file_of(path), map_location='cpu', weights_only=True, mmap=like is not None)
                check(state, kind, 'it is no checkpoint of train.py')
                return read_shards(path, state, kind, like) if os.path.isdir(path) else state
        except MemoryError:
            raise
        except pickle.UnpicklingError:                          # weights_only: nothing in the file is ever executed
            what = 'it holds more than tensors and plain values'
        except Exception as error:                              # whatever else a damaged file makes torch say
            what = (str(error).splitlines() or [type(error).__name__])[0]
        if like is None or is_rank0():
            print(f'{path} is damaged ({what}): not used', file=sys.stderr)
    if paths:
        raise ValueError(f'{folder}: every checkpoint is damaged ({", ".join(paths)}); remove them to start anew')


def compare(model, tensors, folder):
    """Raise ValueError if a checkpoint's weights are not exactly those of this model, which may be on 'meta'."""
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        a, b = own.get(name), tensors.get(name)
        if a is None or b is None or (a.shape, a.dtype, a.layout) != (b.shape, b.dtype, b.layout):
            say = lambda t: 'nothing' if t is None else f'{list(t.shape)} {str(t.dtype)[6:]}'
            raise ValueError(f'{folder}: the checkpoint has {say(b)} as {name}, its model {say(a)}')


def fill(model, tensors, folder):
    """Copy a checkpoint's weights into the model. Raises ValueError as compare does."""
    compare(model, tensors, folder)
    model.load_state_dict({name: distribute_like(tensors[name], own) for name, own in model.state_dict().items()})


def restore(optimizers, states, folder):
    """Take up what optimizers had learned (momenta), not their old settings: those may have been changed. Raises
    ValueError if it was of other parameters."""
    for optimizer, state in zip(optimizers, (state['state'] for state in states)):
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        for i, momenta in state.items():
            if len(state) != len(parameters) or i not in range(len(parameters)) or any(
                    t.shape != (() if name == 'step' else parameters[i].shape) for name, t in momenta.items()):
                raise ValueError(f"{folder}: the checkpoint's optimizers are not those of its model")
        state = {i: {name: t if name == 'step' else distribute_like(t, parameters[i]) for name, t in momenta.items()}
                 for i, momenta in state.items()}
        optimizer.load_state_dict(optimizer.state_dict() | {'state': state})


def resume(config, model, optimizers, balancer, tokenizer, say):
    """Continue the run in config.out_dir; or begin with the weights of config.init_from; or begin anew. Return the step
    to go on from. Raises ValueError if the model or the tokenizer of that run is another."""
    like = None
    if config.shard:                                            # each process reads its part only
        like = {f'model/{name}': tensor for name, tensor in model.state_dict().items()}
        for o, optimizer in enumerate(optimizers):
            parameters = [p for group in optimizer.param_groups for p in group['params']]
            like |= {f'optimizers/{o}/state/{i}': p for i, p in enumerate(parameters)}
    checkpoint = load_checkpoint(config.out_dir, RESUMABLE, like)
    folder = config.out_dir if checkpoint else config.init_from
    if not folder:
        return 0
    saved = checkpoint or load_checkpoint(folder, like=like)
    if saved is None:
        raise ValueError(f'init_from: {folder} holds no checkpoint of train.py')
    free = () if checkpoint else ('context', 'rope_base', 'init_std')           # what weights do not depend on
    for key, value in asdict(model.config).items():
        if key not in free and saved['model_config'].get(key) != value:
            raise ValueError(f"{key} is {value}, but {folder} was trained with {saved['model_config'].get(key)}: "
                             'use it, or another folder')
    used = digest(load_tokenizer(os.path.join(folder, 'bpe.json')))
    if {used, saved.get('tokenizer', used)} != {digest(tokenizer)}:
        raise ValueError(f'{folder} was trained with another tokenizer than that of {config.dataset}: '
                         'use the dataset it was trained on, or another out_dir')
    fill(model, saved['model'], folder)
    if not checkpoint:
        say(f"starting from the weights of {folder} after {saved['step']} steps")
        return 0
    restore([*optimizers, balancer.adamw], [*saved['optimizers'], saved['balancer']], folder)
    if config.dtype == 'auto' and not config.shard:             # measured once, for all of the run
        config.dtype = saved['config'].get('dtype', 'auto')
    changed = [f'{key} {saved["config"].get(key)} -> {value}' for key, value in asdict(config).items()
               if saved['config'].get(key) != value]
    say(f'continuing {folder} at step {saved["step"]} of {config.max_steps}'
        + (f'; changed: {", ".join(changed)}' if changed else ''))
    return saved['step']


def write_log(folder, row, columns, keep_until=None):
    """Append a row (a dict, or None) to a run's log.csv. keep_until: first drop what is there of later steps. They were
    taken after the last checkpoint of a run that was then stopped, and will be taken again. Raises ValueError for a
    log.csv of something else."""
    path = os.path.join(folder, 'log.csv')
    if keep_until is not None:
        head, *lines = read_bytes(path).decode('ascii', 'replace').split('\n') if os.path.exists(path) else ['']
        head, rows = head.strip().split(','), [line.strip().split(',') for line in lines]
        if head[0] not in ('', 'step'):
            raise ValueError(f'{path} was not written by train.py: move it, or name another out_dir')
        kept = [dict(zip(head, fields)) for fields in rows      # a kill or a full disk may have cut the last line short
                if len(fields) == len(head) and re.fullmatch(r'\d{1,18}', fields[0]) and int(fields[0]) <= keep_until]
        with open(path + '.tmp', 'w', newline='') as file:
            writer = csv.DictWriter(file, columns, extrasaction='ignore')
            writer.writeheader()
            writer.writerows(kept)
        os.replace(path + '.tmp', path)                         # a kill before this line leaves the old log whole
    if row:
        with open(path, 'a', newline='') as file:
            csv.DictWriter(file, columns).writerow(row)


def config_of(sizes, where):
    try:
        return ZayaConfig(**sizes)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None


def load_run(folder, device='cpu'):
    """Read a run -> the model, in eval mode, and its Language. Raises ValueError if the folder holds none."""
    checkpoint = load_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f'{folder}: holds neither a checkpoint of train.py (ckpt.pt) nor a released model '
                         '(config.json)')
    language, config = run_language(folder), checkpoint['model_config']
    config.pop('kernel', None)                                  # runs of earlier versions have it
    if language.vocab_size != config['vocab_size'] or checkpoint.get('tokenizer', language.digest) != language.digest:
        raise ValueError(f'{folder}: bpe.json is not the tokenizer that this run was trained with')
    if unknown := config.keys() - kinds.keys():
        raise ValueError(f'{folder}: the checkpoint has a setting {min(unknown)!r}, which this version does not know')
    config = config_of(config, folder)
    with torch.device('meta'):                                  # a damaged size must not take memory
        compare(Zaya(config), checkpoint['model'], folder)
    model = Zaya(config).to(device).eval()
    model.load_state_dict(checkpoint['model'])
    return model, language
