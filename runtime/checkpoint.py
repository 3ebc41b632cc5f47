"""The files of a run: checkpoints, of which a crash at any moment leaves a complete one, and log.csv.

ckpt.pt is the last checkpoint, ckpt_previous.pt the one before it. Both are files of torch.save, or, for `train.py
--shard=True`, folders that any number of processes can read (runtime/distributed.py).

Reading a file never executes code. A file that cannot be used raises a ValueError that names it.
"""
import contextlib
import csv
import math
import os
import pickle                                                   # only for its exception, see load_checkpoint
import platform
import re
import sys
import zipfile
from dataclasses import asdict, fields

import torch

from configurator import package
from data.tokenizer import digest, load_tokenizer
from model import Zaya, ZayaConfig
from runtime.distributed import (broadcast_from_rank0, checksum_of, distribute_like, file_of, gather_lists, is_rank0,
                                 is_sharded, local_part, print0, read_shards, remove, save_and_sync, write_shards)
from runtime.language import run_language
from validate import check, read_bytes

# Schemas (see validate.py) of a checkpoint: what loading its weights needs, and what resuming needs in addition.
SIZES = {field.name: field.type for field in fields(ZayaConfig)}
WEIGHTS = {'step': range(2 ** 63), 'model': {str: torch.Tensor}, 'model_config': SIZES, 'tokenizer?': str,
           'packed?': bool}
MUON = {'state': {int: {'momentum': torch.Tensor}}}
ADAMW = {'state': {int: {'step': torch.Tensor, 'exp_avg': torch.Tensor, 'exp_avg_sq': torch.Tensor}}}
RESUMABLE = WEIGHTS | {'config': {str: (bool, int, float, str)}, 'optimizers': [MUON, ADAMW], 'balancer': ADAMW}


# ---- writing ----

@contextlib.contextmanager
def exclusive_lock(path):
    """Lock a file for this process, and write into it which process that is. The operating system releases the lock
    when the process ends. Raise ValueError if another process holds it."""
    with open(path, 'a+', encoding='utf-8') as file:
        try:
            import fcntl                                        # not on Windows, which gets no lock
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f'{path}: in use by {file.read(99).strip() or "another process"}: wait for it, stop it, '
                             'or use another folder or file') from None
        except (ImportError, OSError):                          # a file system without locks
            pass
        file.truncate(0)
        file.write(f'process {os.getpid()} on {platform.node()}\n')
        file.flush()
        yield


def save_checkpoint(folder, state):
    """Write the nested `state` as ckpt.pt, so that a crash at any moment leaves a complete checkpoint: under a
    temporary name, with fsync, then rename. All ranks call this if tensors are sharded. Raise OSError if a write fails,
    as on a full disk, and ValueError if a weight is not finite; existing checkpoints are then unchanged."""
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
    except BaseException as error:                              # also Ctrl-C: remove the incomplete file
        if is_rank0():
            remove(new)
        if isinstance(error, (OSError, RuntimeError)):          # torch reports a failed write as either
            cause = error if isinstance(error, OSError) else error.__context__
            raise OSError(f'{new}: cannot be written ({getattr(cause, "strerror", None) or error})') from None
        raise
    if not sharded or is_rank0():
        # A damaged file must not replace a good previous one. Folders are not checked: that would take minutes.
        if os.path.isdir(current) or os.path.exists(current) and damage(current) is None:
            remove(previous)
            os.replace(current, previous)
        if sharded:                                             # os.replace cannot replace a file by a folder
            remove(current)
        os.replace(new, current)                                # before this line, ckpt_previous.pt is complete


def log_columns(config):
    """Return the columns of train.py's log.csv. config: ZayaConfig. load_l_e is the load fraction of expert e of layer
    l in this step, bias_l_e its balancing bias after the step."""
    layers, experts = range(config.n_layer), range(config.n_expert)
    return ['step', 'tokens', 'loss', 'val_loss', 'grad_norm', 'lr', 'tokens_per_s', 'mfu', 'entropy',
            *(f'{kind}_{layer}' for kind in ('entropy', 'residual') for layer in layers),
            *(f'{kind}_{layer}_{e}' for kind in ('load', 'bias') for layer in layers for e in experts)]


def write_log(folder, row, columns, keep_until=None):
    """Append a row (a dict, or None) to log.csv. keep_until: first drop the rows of later steps, which a resumed run
    takes again. Raise ValueError if the existing log.csv is of another program."""
    path = os.path.join(folder, 'log.csv')
    if keep_until is not None:
        head, *lines = read_bytes(path).decode('ascii', 'replace').split('\n') if os.path.exists(path) else ['']
        head, rows = head.strip().split(','), [line.strip().split(',') for line in lines]
        if head[0] not in ('', 'step'):
            raise ValueError(f'{path} was not written by train.py: move it, or name another out_dir')
        kept = [dict(zip(head, values)) for values in rows      # the last line may be incomplete
                if len(values) == len(head) and re.fullmatch(r'\d{1,18}', values[0]) and int(values[0]) <= keep_until]
        with open(path + '.tmp', 'w', newline='') as file:
            writer = csv.DictWriter(file, columns, extrasaction='ignore')
            writer.writeheader()
            writer.writerows(kept)
        os.replace(path + '.tmp', path)                         # before this line, the old log is complete
    if row:
        with open(path, 'a', newline='') as file:
            csv.DictWriter(file, columns).writerow(row)


def log(run, row):
    """Append a row, {column: value}, to the log of a train.Run, and to Weights & Biases if configured."""
    row = {'step': run.step, 'tokens': run.step * run.tokens_per_step} | row
    if run.rank == 0:
        write_log(run.config.out_dir, row, log_columns(run.model.config))
        if run.config.wandb:
            package('wandb').log(row, step=run.step)


def read_values(values, step, skipped, config):
    """Copy the tensors [loss, norm] of the training steps up to `step` to the host in one transfer. Print the skipped
    steps. Return the last loss and norm, and the number of consecutive skipped steps (`skipped`: the number before).
    Raise ValueError if it reaches ten, or all steps of a shorter run. config: train.TrainConfig."""
    for i, (loss, norm) in enumerate(torch.stack(values).tolist(), step + 1 - len(values)):
        skipped = 0 if math.isfinite(loss) and math.isfinite(norm) else skipped + 1
        if skipped:
            print0(f'step {i}: loss {loss}, gradient norm {norm}: not finite, step skipped')
        if skipped in (10, config.max_steps):
            raise ValueError(f'{skipped} steps in a row had no finite loss or gradient; the last good checkpoint, if '
                             f'any, is kept. Try a smaller lr (now {config.lr}) or dtype=float32')
    return loss, norm, skipped


# ---- reading ----

def damage(path):
    """Return what is wrong with a checkpoint file or folder, or None. A file of torch.save is a zip archive with a
    checksum per member, which torch.load does not verify."""
    try:
        with zipfile.ZipFile(file_of(path)) as archive:
            if member := archive.testzip():
                return f'its part {member} is corrupt'
        if os.path.isdir(path):
            for name, checksum in torch.load(file_of(path), weights_only=True)['checksums'].items():
                if os.path.basename(name) != name or checksum_of(os.path.join(path, name)) != checksum:
                    return f'its {name} is corrupt'
    except Exception as error:                                  # a damaged file can raise anything
        return str(error)


def load_checkpoint(folder, schema=WEIGHTS, like=None):
    """Return the newest checkpoint of a run that is undamaged and fits the schema, on the CPU, or None if there is
    none at all. Report a damaged one and try the one before it. like: see read_shards; all ranks call this then, and
    rank 0 looks for damage. Raise ValueError if all are damaged."""
    paths = [os.path.join(folder, name) for name in ('ckpt.pt', 'ckpt_previous.pt')]
    paths = [path for path in paths if os.path.exists(path)]
    for path in paths:
        what = damage(path) if like is None else broadcast_from_rank0(lambda: damage(path))
        try:
            if what is None:
                state = torch.load(file_of(path), map_location='cpu', weights_only=True, mmap=like is not None)
                check(state, schema, 'it is no checkpoint of train.py')
                return read_shards(path, state, schema, like) if os.path.isdir(path) else state
        except MemoryError:
            raise
        except pickle.UnpicklingError:                          # from weights_only
            what = 'it holds more than tensors and plain values'
        except Exception as error:                              # a damaged file can raise anything
            what = (str(error).splitlines() or [type(error).__name__])[0]
        if like is None or is_rank0():
            print(f'{path} is damaged ({what}): not used', file=sys.stderr)
    if paths:
        raise ValueError(f'{folder}: every checkpoint is damaged ({", ".join(paths)}); remove them to start again')


def compare(model, weights, folder):
    """Raise ValueError unless a checkpoint's weights have the names, shapes and dtypes of this model's, which may be on
    'meta'."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        a, b = own.get(name), weights.get(name)
        if a is None or b is None or (a.shape, a.dtype, a.layout) != (b.shape, b.dtype, b.layout):
            words = lambda t: 'nothing' if t is None else f'{list(t.shape)} {str(t.dtype)[6:]}'
            raise ValueError(f'{folder}: the checkpoint has {words(b)} as {name}, its model {words(a)}')


def parameters_of(optimizer):
    """Return the parameters in the order in which the optimizer's state_dict numbers them."""
    return [p for group in optimizer.param_groups for p in group['params']]


def restore(optimizers, states, folder):
    """Load the optimizers' state (momenta) but not their settings, which may have changed. Raise ValueError if it is
    that of other parameters."""
    for optimizer, state in zip(optimizers, (state['state'] for state in states)):
        parameters = parameters_of(optimizer)
        for i, momenta in state.items():
            if len(state) != len(parameters) or i not in range(len(parameters)) or any(
                    t.shape != (() if name == 'step' else parameters[i].shape) or not t.is_floating_point()
                    for name, t in momenta.items()):
                raise ValueError(f"{folder}: the checkpoint's optimizers are not those of its model")
        state = {i: {name: t if name == 'step' else distribute_like(t, parameters[i]) for name, t in momenta.items()}
                 for i, momenta in state.items()}
        optimizer.load_state_dict(optimizer.state_dict() | {'state': state})


def resume(config, model, optimizers, balancer, tokenizer):
    """Resume the run in config.out_dir, or start from the weights of config.init_from, or from scratch. Return
    the number of steps already taken. Raise ValueError if that run has another model or tokenizer."""
    like = None
    if config.shard:                                            # each rank reads its shards only
        like = {f'model/{name}': tensor for name, tensor in model.state_dict().items()} | {
            f'optimizers/{o}/state/{i}': p for o, optimizer in enumerate(optimizers)
            for i, p in enumerate(parameters_of(optimizer))}
    own = load_checkpoint(config.out_dir, RESUMABLE, like)
    folder = config.out_dir if own else config.init_from
    if not folder:
        return 0
    saved = own or load_checkpoint(folder, like=like)
    if saved is None:
        raise ValueError(f'init_from: {folder} holds no checkpoint of train.py')
    free = () if own else ('context', 'rope_base', 'init_std')                  # settings that no weight depends on
    for key, value in asdict(model.config).items():
        if key not in free and saved['model_config'][key] != value:
            raise ValueError(f"{key} is {value}, but {folder} was trained with {saved['model_config'][key]}: "
                             'use it, or another folder')
    used = digest(load_tokenizer(os.path.join(folder, 'bpe.json')))
    if {used, saved.get('tokenizer', used)} != {digest(tokenizer)}:
        raise ValueError(f'{folder} was trained with another tokenizer than that of {config.dataset}: '
                         'use the dataset it was trained on, or another out_dir')
    compare(model, saved['model'], folder)
    model.load_state_dict({name: distribute_like(saved['model'][name], t) for name, t in model.state_dict().items()})
    if not own:
        print0(f"starting from the weights of {folder} after {saved['step']} steps")
        return 0
    restore([*optimizers, balancer.adamw], [*saved['optimizers'], saved['balancer']], folder)
    if config.dtype == 'auto' and not config.shard:             # measured once per run
        config.dtype = saved['config'].get('dtype', 'auto')
    changed = [f'{key} {saved["config"].get(key)} -> {value}' for key, value in asdict(config).items()
               if saved['config'].get(key) != value]
    print0(f'continuing {folder} at step {saved["step"]} of {config.max_steps}'
           + (f'; changed: {", ".join(changed)}' if changed else ''))
    return saved['step']


def load_run(folder, device='cpu'):
    """Return the model of a run, in eval mode, and its Language. Raise ValueError if the folder holds no run."""
    checkpoint = load_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f'{folder}: holds neither a checkpoint of train.py (ckpt.pt) nor a released model '
                         '(config.json)')
    language, config = run_language(folder), checkpoint['model_config']
    if language.vocab_size != config['vocab_size'] or checkpoint.get('tokenizer', language.digest) != language.digest:
        raise ValueError(f'{folder}: bpe.json is not the tokenizer that this run was trained with')
    if unknown := config.keys() - SIZES.keys():
        raise ValueError(f'{folder}: the checkpoint has a setting {min(unknown)!r}, which this version does not know')
    config = config_of(config, folder)
    with torch.device('meta'):                                  # no memory for the wrong sizes of a damaged file
        compare(Zaya(config), checkpoint['model'], folder)
    model = Zaya(config).to(device).eval()
    model.load_state_dict(checkpoint['model'])
    language.conversations = checkpoint.get('packed', True)
    return model, language


def config_of(sizes, where):
    """Return ZayaConfig(**sizes); its ValueError names the file or folder `where`."""
    try:
        return ZayaConfig(**sizes)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
