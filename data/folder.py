"""The files of a released folder: JSON, and the list of its weights."""
import json
import os


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
