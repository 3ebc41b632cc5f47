"""The files of a released folder: the list of its weights, and a copy with other weights; and files held alone."""
import contextlib
import json
import os
import platform
import shutil

import torch
from tqdm import tqdm

from configurator import package
from data.gate import read_json, reading

HEAD, EMBEDDING = 'lm_head.weight', 'model.embed_tokens.weight'


def weight_files(folder):
    """The safetensors files of a folder: model.safetensors, or the shards that its index names. Raise ValueError if one
    cannot be read, a tensor is in two of them, or the head, which is tied, is not the embedding."""
    index, names = os.path.join(folder, 'model.safetensors.index.json'), ['model.safetensors']
    if os.path.exists(index) and not os.path.exists(os.path.join(folder, names[0])):
        names = sorted(set(read_json(index, {'weight_map': {str: str}})['weight_map'].values()))
    safetensors, place = package('safetensors'), {}             # place: tensor -> the open file it is in
    with contextlib.ExitStack() as stack:
        for name in names:
            path = os.path.join(folder, name)
            if os.path.basename(name) != name or not os.path.isfile(path):
                raise ValueError(f'{folder}: the weights file {name} is missing')
            with reading(path):
                file = stack.enter_context(safetensors.safe_open(path, 'pt'))
            for tensor in file.keys():
                if tensor in place:
                    raise ValueError(f'{path}: {tensor} is in another file, too')
                place[tensor] = file
        if HEAD in place and EMBEDDING in place:
            head, embedding = (place[tensor].get_slice(tensor) for tensor in (HEAD, EMBEDDING))
            rows = head.get_shape()[0] if head.get_shape() else 0
            if [head.get_shape(), head.get_dtype()] != [embedding.get_shape(), embedding.get_dtype()] or not all(
                    bytes_of(head[i:i + 4096]).equal(bytes_of(embedding[i:i + 4096])) for i in range(0, rows, 4096)):
                raise ValueError(f'{folder}: {HEAD} is not {EMBEDDING}, to which nanoZAYA ties it')
    return [os.path.join(folder, name) for name in names]


def bytes_of(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@contextlib.contextmanager
def alone(path):
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


def copy_folder(folder, out, change, settings, share):
    """Copy a released folder, whole or not at all; at most half a GiB of it is in memory.

    change(name, tensor) -> [(name, tensor), ...] that stand in its place. settings: added to config.json. share: of the
    weights' bytes, which the disk must have room for. Raise ValueError if the folder is incomplete, `out` is there, or
    the disk too small.
    """
    safetensors, save_file = package('safetensors'), package('safetensors.torch').save_file
    config, paths = read_json(os.path.join(folder, 'config.json')), weight_files(folder)
    if os.path.exists(out):
        raise ValueError(f'{out} is already there: name another folder, or remove it')
    needed = share * sum(map(os.path.getsize, paths)) / 2 ** 30
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(out))).free / 2 ** 30
    if free < needed:
        raise ValueError(f'{out} needs {needed:.1f} GiB, the disk has {free:.1f} GiB left')
    unfinished, weight_map, batch = f'{out}.unfinished', {}, {}
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    try:
        for path in paths:
            with safetensors.safe_open(path, 'pt') as file:
                names = [name for name in file.keys() if name != HEAD]                     # tied: the embedding again
                for name in tqdm(names, desc=os.path.basename(path), unit='tensor', dynamic_ncols=True):
                    with reading(path):                         # a tensor of another shape, say
                        batch |= {key: value.contiguous() for key, value in change(name, file.get_tensor(name))}
                    full = sum(value.nbytes for value in batch.values()) > 2 ** 29
                    if full or (path, name) == (paths[-1], names[-1]):
                        shard = f'model-{len(set(weight_map.values())):05}.safetensors'
                        save_file(batch, os.path.join(unfinished, shard), metadata={'format': 'pt'})
                        weight_map, batch = weight_map | dict.fromkeys(batch, shard), {}
        for name, content in (('model.safetensors.index.json', {'metadata': {}, 'weight_map': weight_map}),
                              ('config.json', config | settings)):
            with open(os.path.join(unfinished, name), 'w') as file:
                json.dump(content, file, indent=2, sort_keys=True)
        for name in os.listdir(folder):                         # tokenizer, chat template and the like
            if name.endswith(('.json', '.jinja', '.model', '.txt')) and name not in os.listdir(unfinished):
                shutil.copy(os.path.join(folder, name), unfinished)
        os.rename(unfinished, out)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f'{out} could not be written: {error}') from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
