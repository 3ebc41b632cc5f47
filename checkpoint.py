"""Storage: everything of a model that touches a disk, and `load(folder)` for everyone.

Two kinds of folder hold a model:

    released    config.json, *.safetensors, tokenizer.json      the layout of ZAYA1-8B, which `transformers` reads, too
    a run       ckpt.pt, ckpt_previous.pt, bpe.json, log.csv    what train.py writes

Nothing in a file is ever executed. A file that cannot be used is a ValueError that names it.
"""
import csv
import json
import os
import pickle                                                   # for the name of an error only: see load_checkpoint
import re
import sys
import zipfile

import torch

import quantize
from configurator import package
from data.folder import read_json, weight_files
from data.language import released_language, run_language
from model import Zaya, ZayaConfig

# This project's names -> the released names: each rule in turn replaces what it finds in a name.
RENAMING = [
    (r'^(norm|layers)\.', r'model.\1.'), (r'^embedding\.', 'model.embed_tokens.'),
    (r'^embedding_', 'model.input_hidden_states_'), (r'\.attn_norm\.', '.input_layernorm.'),
    (r'\.moe_norm\.', '.post_attention_layernorm.'), (r'\.attn\.', '.self_attn.qkv_proj.'),
    (r'qkv_proj\.o_proj', 'o_proj'), (r'qkv_proj\.temperature', 'qk_norm.temp'),
    (r'\.v_proj\.', '.v_proj_current.'), (r'conv_(depthwise|grouped)_', r'conv_qk_\1.'),
    (r'\.moe\.router\.', '.mlp.gate.router_mlp.'), (r'router_mlp\.down_proj', 'down_proj'),
    (r'router_mlp\.eda_scale', 'router_states_scale'), (r'router_mlp\.balancing_bias', 'balancing_biases'),
    (r'\.moe\.experts\.(\w+)', r'.mlp.experts.\1_proj'), (r'\.attn_residual\.', '.post_attention_residual_scale.'),
    (r'\.moe_residual\.', '.post_mlp_residual_scale.'), (r'\.branch_', '.hidden_states_'),
]

# Config fields -> keys of config.json, those inside its rope_parameters, and keys that have one possible value here.
CONFIG_NAMES = {
    'vocab_size': 'vocab_size', 'context': 'max_position_embeddings', 'n_layer': 'num_hidden_layers',
    'n_embd': 'hidden_size', 'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads',
    'head_dim': 'head_dim', 'n_expert': 'num_experts', 'expert_dim': 'moe_intermediate_size',
    'router_dim': 'router_hidden_size', 'norm_eps': 'rms_norm_eps', 'init_std': 'initializer_range',
}
ROPE_NAMES = {'rope_base': 'rope_theta', 'rope_fraction': 'partial_rotary_factor'}
CONFIG_FIXED = {
    'model_type': 'zaya', 'hidden_act': 'silu', 'num_experts_per_tok': 1, 'tie_word_embeddings': True,
    'attention_bias': False, 'lm_head_bias': False, 'cca_time0': 2, 'cca_time1': 2, 'sliding_window': None,
}


def released_name(name):
    """'layers.3.attn.q_proj.weight' -> 'model.layers.3.self_attn.qkv_proj.q_proj.weight'."""
    for found, replacement in RENAMING:
        name = re.sub(found, replacement, name)
    return name


def from_pretrained(folder, device='cpu', dtype=None):
    """Read a released folder -> Zaya, in eval mode. dtype: of the weights, default as stored.

    The model is built without memory (on 'meta') and filled tensor by tensor, so the peak is the model itself plus one
    tensor. Raises ValueError, naming the culprit, if the folder does not hold exactly this model.
    """
    safetensors = package('safetensors')
    released_config = read_json(os.path.join(folder, 'config.json'))
    with torch.device('meta'):
        model = Zaya(config_from_json(folder))
        if quantized := released_config.get('nanozaya_quantization'):           # by quantize.py
            quantize.replace(model, quantized['bits'])
    repacked = bool(quantized) and quantized['bits'] == 4       # so that no file need stay in memory
    own, state = {released_name(name): (name, tensor) for name, tensor in model.state_dict().items()}, {}
    for path in weight_files(folder):
        try:
            with safetensors.safe_open(path, 'pt') as file:
                for name in file.keys():
                    if name == 'lm_head.weight':                # tied: the embedding once more
                        continue
                    if name not in own:
                        raise ValueError(f'{path}: unknown tensor {name}')
                    (our_name, like), tensor = own.pop(name), file.get_tensor(name)
                    if tensor.shape != like.shape:
                        raise ValueError(f'{path}: {name} has shape {list(tensor.shape)}, '
                                         f'config.json asks for {list(like.shape)}')
                    fixed = name.endswith(('balancing_biases', '.codes', '.scale', '.offset'))      # whatever dtype is
                    copy = repacked and '.experts.' not in our_name             # those are laid out anew below
                    state[our_name] = tensor.to(device, like.dtype if fixed else dtype or tensor.dtype, copy=copy)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f'{path}: cannot be read as safetensors ({error}); is the file complete?') from None
    if own:
        raise ValueError(f'{folder}: {len(own)} tensors are missing, the first is {min(own)}')
    model.load_state_dict(state, assign=True)                   # these tensors, not copies of them
    del state, tensor
    for router in model.routers:                                # not stored: the load counters
        router.load = torch.zeros_like(router.load, device=device)
    model.released_config = released_config                     # end-of-text token and the like
    if quantized:
        quantize.pack(model)
    return model.eval()


def save_pretrained(model, folder):
    """Write a Zaya as config.json and model.safetensors in the released layout, tensors bit for bit. Other keys of the
    config.json that it came from are kept. Raises ValueError for a model without the skip class."""
    config, safetensors = config_to_json(model.config), package('safetensors.torch')
    os.makedirs(folder, exist_ok=True)
    tensors = {released_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.save_file(tensors, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})
    dtype = {'dtype': str(model.dtype).removeprefix('torch.')}
    with open(os.path.join(folder, 'config.json'), 'w') as file:
        json.dump(getattr(model, 'released_config', {}) | config | dtype, file, indent=2, sort_keys=True)


def config_from_json(folder):
    """config.json of a released folder -> ZayaConfig. Raises ValueError for a variant that is not implemented here."""
    path = os.path.join(folder, 'config.json')
    given = read_json(path)
    for key, value in CONFIG_FIXED.items():
        if given.get(key, value) != value:
            raise ValueError(f'{path}: {key} is {given[key]!r}, nanoZAYA implements {value!r} only')
    if set(given.get('layer_types') or ['hybrid']) != {'hybrid'}:
        raise ValueError(f"{path}: layer_types holds {sorted(set(given['layer_types']))}, "
                         "nanoZAYA implements 'hybrid' only: no sliding-window layers")
    rope = given.get('rope_parameters') or {'hybrid': {}}
    if not isinstance(rope, dict) or not isinstance(rope.get('hybrid'), dict):
        raise ValueError(f"{path}: rope_parameters must hold an object 'hybrid'")
    rope = rope['hybrid']
    if rope.get('rope_type', 'default') != 'default':
        raise ValueError(f"{path}: rope_type is {rope['rope_type']!r}, nanoZAYA implements 'default' only")
    sizes, released = {}, ZayaConfig.zaya1_8b()                 # a key that is left out has the released model's value
    for names, values in (CONFIG_NAMES, given), (ROPE_NAMES, rope):
        for ours, theirs in names.items():
            sizes[ours] = values.get(theirs, getattr(released, ours))
            if type(sizes[ours]) not in (kind := type(getattr(released, ours)), int):
                raise ValueError(f'{path}: {theirs} must be {kind.__name__}, got {sizes[ours]!r}')
    try:
        return ZayaConfig(**sizes, skip_expert=True)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def config_to_json(config):
    """ZayaConfig -> the contents of config.json. Raises ValueError without the skip class, which the layout demands."""
    if not config.skip_expert:
        raise ValueError('the released layout always has the skip class, this model has none: '
                         'train with skip_expert=True to export it')
    rope = {'rope_type': 'default'} | {theirs: getattr(config, ours) for ours, theirs in ROPE_NAMES.items()}
    return CONFIG_FIXED | {theirs: getattr(config, ours) for ours, theirs in CONFIG_NAMES.items()} | {
        'architectures': ['ZayaForCausalLM'], 'rope_parameters': {'hybrid': rope},
        'layer_types': ['hybrid'] * config.n_layer}


# ---- runs: a folder with ckpt.pt and, as long as it lasts, the checkpoint before it ----

def save_checkpoint(folder, state):
    """Write `state` (tensors, numbers, strings, lists and dicts of them) so that a crash at any moment leaves a whole
    checkpoint behind: into a temporary file, onto the disk (fsync), and only then under its name. Raises OSError if
    the disk is full, say; the checkpoints already there are then untouched."""
    new, current, previous = (os.path.join(folder, name) for name in ('ckpt.tmp', 'ckpt.pt', 'ckpt_previous.pt'))
    try:
        with open(new, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:                              # a full disk, Ctrl-C: leave no half file behind
        if os.path.exists(new):
            os.remove(new)
        if isinstance(error, (OSError, RuntimeError)):          # torch reports a failed write as either of them
            cause = error if isinstance(error, OSError) else error.__context__
            raise OSError(f'{new}: cannot be written ({getattr(cause, "strerror", None) or error})') from None
        raise
    if os.path.exists(current) and damage(current) is None:     # a damaged one must not push out a good one
        os.replace(current, previous)
    os.replace(new, current)                                    # killed before this line: ckpt_previous.pt is whole


def damage(path):
    """What is wrong with a file that save_checkpoint wrote, or None. torch.save writes a zip archive with a checksum
    for each part; torch.load ignores them."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
            return part and f'its part {part} is corrupt'
    except Exception as error:                                  # whatever a damaged file makes zipfile say
        return str(error)


def load_checkpoint(folder):
    """The newest undamaged checkpoint of a run, on the CPU, or None if it has none at all. A damaged file, or one of
    another program, is reported and its predecessor used. Raises ValueError if every one there is damaged."""
    paths = [os.path.join(folder, name) for name in ('ckpt.pt', 'ckpt_previous.pt')]
    paths = [path for path in paths if os.path.exists(path)]
    for path in paths:
        what = damage(path)
        try:
            if what is None:
                state = torch.load(path, map_location='cpu', weights_only=True)
                if isinstance(state, dict) and 'model_config' in state:
                    return state
                what = 'it is no checkpoint of train.py'
        except MemoryError:
            raise
        except pickle.UnpicklingError:                          # weights_only: nothing in the file is ever executed
            what = 'it holds more than tensors and plain values'
        except Exception as error:                              # whatever else a damaged file makes torch say
            what = error
        print(f'{path} is damaged ({what}): not used', file=sys.stderr)
    if paths:
        raise ValueError(f'{folder}: every checkpoint is damaged ({", ".join(paths)}); remove them to start anew')


def write_log(folder, row, columns, keep_until=None):
    """Append a row (a dict, or None) to a run's log.csv. keep_until: first drop what is there of later steps. They were
    taken after the last checkpoint of a run that was then stopped, and will be taken again."""
    path = os.path.join(folder, 'log.csv')
    if keep_until is not None:
        kept = []
        if os.path.exists(path):
            with open(path, newline='') as file:                # a kill or a full disk may have cut the last line short
                kept = [row for row in csv.DictReader(file)
                        if None not in row.values() and int(row['step']) <= keep_until]
        with open(path + '.tmp', 'w', newline='') as file:
            writer = csv.DictWriter(file, columns, extrasaction='ignore')
            writer.writeheader()
            writer.writerows(kept)
        os.replace(path + '.tmp', path)                         # a kill before this line leaves the old log whole
    if row:
        with open(path, 'a', newline='') as file:
            csv.DictWriter(file, columns).writerow(row)


# ---- for everyone ----

def load(folder, device='cpu'):
    """Read a run or a released folder -> the model, in eval mode, and its Language. Raises ValueError if the folder is
    neither."""
    if not os.path.isdir(folder):
        raise ValueError(f'{folder}: no such folder; train a model first (make demo), or name another with --ckpt')
    if os.path.exists(os.path.join(folder, 'config.json')):
        language = released_language(folder)                    # before the weights, which take long
        return from_pretrained(folder, device), language
    checkpoint = load_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f'{folder}: holds neither a checkpoint of train.py (ckpt.pt) nor a released model '
                         '(config.json)')
    checkpoint['model_config'].pop('kernel', None)              # runs of earlier versions have it
    model = Zaya(ZayaConfig(**checkpoint['model_config'])).to(device).eval()
    model.load_state_dict(checkpoint['model'])
    return model, run_language(folder)
