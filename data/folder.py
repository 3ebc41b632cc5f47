"""The files of a released folder: JSON, the list of its weights, and a copy with other weights."""
import json
import os
import shutil

from tqdm import tqdm

from configurator import package


def read_json(path):
    """The object in a JSON file. Raises ValueError that names the file."""
    try:
        with open(path, encoding='utf-8') as file:
            value = json.load(file)
    except OSError as error:
        raise ValueError(f'{path}: cannot be read ({error.strerror})') from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: is not valid JSON ({error})') from None
    if isinstance(value, dict):
        return value
    raise ValueError(f'{path}: should hold a JSON object')


def weight_files(folder):
    """The safetensors files of a folder: model.safetensors, or the shards that its index names."""
    index, names = os.path.join(folder, 'model.safetensors.index.json'), ['model.safetensors']
    if os.path.exists(index) and not os.path.exists(os.path.join(folder, names[0])):
        shards = read_json(index).get('weight_map')
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f'{index}: should hold an object weight_map, from tensors to files')
        names = sorted(set(shards.values()))
    for name in names:
        if os.path.basename(name) != name or not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f'{folder}: the weights file {name} is missing')
    return [os.path.join(folder, name) for name in names]


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
                names = [name for name in file.keys() if name != 'lm_head.weight']         # tied: the embedding again
                for name in tqdm(names, desc=os.path.basename(path), unit='tensor', dynamic_ncols=True):
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
