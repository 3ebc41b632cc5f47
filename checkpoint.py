"""Storage: everything of a model that touches a disk, and `load(folder)` for everyone.

Two kinds of folder hold a model:

    released    config.json, *.safetensors, tokenizer.json      the layout of ZAYA1-8B, which `transformers` reads, too
    a run       ckpt.pt, ckpt_previous.pt, bpe.json, log.csv    what train.py writes

A checkpoint of `train.py --shard=True` is a folder of that name, which any number of processes can read, one as well
(data/shards.py).

Nothing in a file is ever executed. A file that cannot be used is a ValueError that names it.
"""
import csv
import functools
import json
import os
import pickle                                                   # for the name of an error only: see load_checkpoint
import re
import sys
import zipfile
from dataclasses import asdict, fields

import torch

import quantize
from configurator import package
from data.folder import weight_files
from data.gate import check, read_bytes, read_json, reading
from data.language import released_language, run_language
from data.shards import (by_first, checksum_of, file_of, gathered, is_first, is_sharded, laid_out, own_part,
                         read_shards, remove, together, write, write_shards)
from data.tokenizer import digest, load_tokenizer
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
# What config.json must be, and a checkpoint: at least to take its weights, and to go on from it (see data/gate.py).
kinds = {field.name: field.type for field in fields(ZayaConfig)}
CONFIG = {f'{key}?': value for key, value in CONFIG_FIXED.items()} | {
    f'{theirs}?': kinds[ours] for ours, theirs in CONFIG_NAMES.items()} | {
    'layer_types?': (None, ['hybrid']), 'rope_parameters?': (None, {'hybrid': {'rope_type?': 'default'} | {
        f'{theirs}?': kinds[ours] for ours, theirs in ROPE_NAMES.items()}}),
    'nanozaya_quantization?': {'bits': (4, 8)}, 'dtype?': (None, str)}
WEIGHTS = {'model': {str: torch.Tensor}, 'step': range(2 ** 63), 'tokenizer?': str,
           'model_config': {'vocab_size': int} | {f'{key}?': kind for key, kind in kinds.items()}}
ADAMW = {'step': torch.Tensor, 'exp_avg': torch.Tensor, 'exp_avg_sq': torch.Tensor}
RESUMABLE = WEIGHTS | {'config': {str: (bool, int, float, str)}, 'balancer': {'state': {int: ADAMW}},
                       'optimizers': [{'state': {int: {'momentum': torch.Tensor}}}, {'state': {int: ADAMW}}]}
FILE_BYTES = 5 * 2 ** 30         # of weights in one file of a released folder
FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64


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
    safetensors, config_path = package('safetensors'), os.path.join(folder, 'config.json')
    released_config = read_json(config_path, CONFIG)
    with torch.device('meta'):
        model = Zaya(config_from_json(folder))
        if quantized := released_config.get('nanozaya_quantization'):           # by quantize.py
            with reading(config_path):
                quantize.replace(model, quantized['bits'])
    repacked = bool(quantized) and quantized['bits'] == 4       # so that no file need stay in memory
    own, state = {released_name(name): (name, tensor) for name, tensor in model.state_dict().items()}, {}
    for path in weight_files(folder):
        with reading(path), safetensors.safe_open(path, 'pt') as file:
            for name in file.keys():
                if name == 'lm_head.weight':                    # tied: the embedding once more
                    continue
                if name not in own:
                    raise ValueError(f'unknown tensor {name}')
                (our_name, like), tensor = own.pop(name), file.get_tensor(name)
                if tensor.shape != like.shape:
                    raise ValueError(f'{name} has shape {list(tensor.shape)}, config.json asks for {list(like.shape)}')
                fixed = name.endswith(('.codes', '.scale', '.offset'))          # whatever dtype is
                if tensor.dtype not in ([like.dtype] if fixed else FLOATS):
                    raise ValueError(f'{name} is {tensor.dtype}, which is none of nanoZAYA\'s')
                fixed = fixed or name.endswith('balancing_biases')
                copy = repacked and '.experts.' not in our_name                 # those are laid out anew below
                state[our_name] = tensor.to(device, like.dtype if fixed else dtype or tensor.dtype, copy=copy)
    if own:
        raise ValueError(f'{folder}: {len(own)} tensors are missing, the first is {min(own)}')
    weights = [name for name, _ in model.named_parameters()]
    stored = {state[name].dtype for name in weights}
    for name in weights if len(stored) > 1 else ():             # mixed: the widest holds all exactly
        state[name] = state[name].to(functools.reduce(torch.promote_types, stored))
    model.load_state_dict(state, assign=True)                   # these tensors, not copies of them
    del state, tensor
    for router in model.routers:                                # not stored: the load counters
        router.load = torch.zeros_like(router.load, device=device)
    model.released_config = released_config                     # end-of-text token and the like
    if quantized:
        quantize.pack(model)
    return model.eval()


def save_pretrained(model, folder):
    """Write a Zaya as config.json and model.safetensors in the released layout, tensors bit for bit, a large one in
    several files with an index. Of a sharded model all processes call this, and the first writes. Other keys of the
    config.json that it came from are kept. Raises ValueError for a model without the skip class."""
    config, safetensors = config_to_json(model.config), package('safetensors.torch')
    files, size, weight_map, tensors = [[]], 0, {}, model.state_dict()          # files: the names in each
    for name, tensor in tensors.items():
        size += tensor.numel() * tensor.element_size()
        if size > FILE_BYTES and files[-1]:
            files, size = [*files, []], tensor.numel() * tensor.element_size()
        files[-1].append(name)
    writes = is_first()
    if writes:
        os.makedirs(folder, exist_ok=True)
    for i, names in enumerate(files):
        file = 'model.safetensors' if len(files) == 1 else f'model-{i + 1:05}-of-{len(files):05}.safetensors'
        whole = {released_name(name): gathered(tensors[name], writes) for name in names}
        weight_map |= dict.fromkeys(whole, file)
        if writes:
            safetensors.save_file(whole, os.path.join(folder, file), metadata={'format': 'pt'})
    dtype = {'dtype': str(model.dtype).removeprefix('torch.')}
    contents = {'config.json': getattr(model, 'released_config', {}) | config | dtype}
    if len(files) > 1:
        contents['model.safetensors.index.json'] = {'metadata': {}, 'weight_map': weight_map}
    for name, content in contents.items() if writes else ():
        with open(os.path.join(folder, name), 'w') as file:
            json.dump(content, file, indent=2, sort_keys=True)


def config_from_json(folder):
    """config.json of a released folder -> ZayaConfig. Raises ValueError for a variant that is not implemented here."""
    path = os.path.join(folder, 'config.json')
    given = read_json(path, CONFIG)
    rope = (given.get('rope_parameters') or {'hybrid': {}})['hybrid']
    sizes, released = {}, ZayaConfig.zaya1_8b()                 # a key that is left out has the released model's value
    for names, values in (CONFIG_NAMES, given), (ROPE_NAMES, rope):
        for ours, theirs in names.items():
            sizes[ours] = values.get(theirs, getattr(released, ours))
    return config_of(sizes | {'skip_expert': True}, path)


def config_of(sizes, where):
    try:
        return ZayaConfig(**sizes)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None


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
    checkpoint behind: under a temporary name, onto the disk (fsync), and only then under its own. All processes call
    this where tensors are sharded. Raises OSError if the disk is full, say, ValueError if a weight is not finite; the
    checkpoints already there are then untouched."""
    weights = state.get('model', {})
    sharded = any(map(is_sharded, weights.values()))
    bad = [name for name, tensor in weights.items() if not own_part(tensor).isfinite().all()]
    if bad := together(bad) if sharded else bad:
        raise ValueError(f'{bad[0]} is not finite after step {state["step"]}, and not saved; try a smaller lr')
    new, current, previous = (os.path.join(folder, name) for name in ('ckpt.tmp', 'ckpt.pt', 'ckpt_previous.pt'))
    try:
        if is_first():
            remove(new)
        (write_shards if sharded else write)(new, state)
    except BaseException as error:                              # a full disk, Ctrl-C: leave no half file behind
        if is_first():
            remove(new)
        if isinstance(error, (OSError, RuntimeError)):          # torch reports a failed write as either of them
            cause = error if isinstance(error, OSError) else error.__context__
            raise OSError(f'{new}: cannot be written ({getattr(cause, "strerror", None) or error})') from None
        raise
    if not sharded or is_first():
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
        what = damage(path) if like is None else by_first(lambda: damage(path))
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
        if like is None or is_first():
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
    model.load_state_dict({name: laid_out(tensors[name], own) for name, own in model.state_dict().items()})


def restore(optimizers, states, folder):
    """Take up what optimizers had learned (momenta), not their old settings: those may have been changed. Raises
    ValueError if it was of other parameters."""
    for optimizer, state in zip(optimizers, (state['state'] for state in states)):
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        for i, momenta in state.items():
            if len(state) != len(parameters) or i not in range(len(parameters)) or any(
                    t.shape != (() if name == 'step' else parameters[i].shape) for name, t in momenta.items()):
                raise ValueError(f"{folder}: the checkpoint's optimizers are not those of its model")
        state = {i: {name: t if name == 'step' else laid_out(t, parameters[i]) for name, t in momenta.items()}
                 for i, momenta in state.items()}
        optimizer.load_state_dict(optimizer.state_dict() | {'state': state})


def take_up(config, model, optimizers, balancer, tokenizer, say):
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


# ---- for everyone ----

def load(folder, device='cpu'):
    """Read a run or a released folder -> the model, in eval mode, and its Language. Raises ValueError if the folder is
    neither."""
    if not os.path.isdir(folder):
        raise ValueError(f'{folder}: no such folder; train a model first (make demo), or name another with --ckpt')
    if os.path.exists(os.path.join(folder, 'config.json')):
        language = released_language(folder)                    # before the weights, which take long
        model = from_pretrained(folder, device)
        if language.vocab_size > model.config.vocab_size:
            raise ValueError(f'{folder}: tokenizer.json has {language.vocab_size:,} tokens, the model knows '
                             f'{model.config.vocab_size:,}')
        return model, language
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
