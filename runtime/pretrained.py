"""Released folders: config.json, *.safetensors and tokenizer.json in the layout of ZAYA1-8B, or the legacy one.

`load(folder)` reads such a folder or a run of train.py; `save_pretrained` writes the layout of ZAYA1-8B. Reading a
file never executes code. A file that cannot be used raises a ValueError that names it.
"""
import contextlib
import functools
import json
import os
import re
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

import quantize
from configurator import package
from model import Zaya, ZayaConfig
from runtime.checkpoint import SIZES, config_of, load_run
from runtime.distributed import gather_full, is_rank0
from runtime.export import write_tokenizer
from runtime.legacy import is_legacy, legacy_names, released_config
from runtime.language import released_language
from validate import check, read_json, reading

HEAD, EMBEDDING = 'lm_head.weight', 'model.embed_tokens.weight'

# (pattern, replacement), applied in this order: from this project's parameter names to the released names.
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

# ZayaConfig fields -> keys of config.json, and of its rope_parameters.
CONFIG_NAMES = {
    'vocab_size': 'vocab_size', 'context': 'max_position_embeddings', 'n_layer': 'num_hidden_layers',
    'n_embd': 'hidden_size', 'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads',
    'head_dim': 'head_dim', 'n_expert': 'num_experts', 'expert_dim': 'moe_intermediate_size',
    'router_dim': 'router_hidden_size', 'norm_eps': 'rms_norm_eps', 'init_std': 'initializer_range',
}
ROPE_NAMES = {'rope_base': 'rope_theta', 'rope_fraction': 'partial_rotary_factor'}
CONFIG_FIXED = {                 # keys whose other values are variants that are not implemented here
    'model_type': 'zaya', 'hidden_act': 'silu', 'num_experts_per_tok': 1, 'tie_word_embeddings': True,
    'attention_bias': False, 'lm_head_bias': False, 'cca_time0': 2, 'cca_time1': 2, 'sliding_window': None,
}
UNSUPPORTED = {'rope_scaling': (None, False), 'quantization_config': None}     # keys that would change the model

# The schema of config.json (see validate.py): every key may be missing.
optional = lambda schema: {f'{key}?': kind for key, kind in schema.items()}
types = lambda names: {theirs: SIZES[ours] for ours, theirs in names.items()}
CONFIG = optional(CONFIG_FIXED | UNSUPPORTED | types(CONFIG_NAMES) | {
    'rope_parameters': (None, {'hybrid': optional({'rope_type': 'default'} | types(ROPE_NAMES))}),
    'layer_types': (None, ['hybrid']), 'dtype': (None, str),
    'nanozaya_quantization': {'bits': (4, 8), 'format?': (1, 2)}})

FILE_BYTES = 5 * 2 ** 30         # maximum size of one weights file that save_pretrained writes
CODES = '.blocks', '.scale', '.codes', '.offset'                # of a quantized matrix
FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64


def released_name(name):
    """Return the released name: layers.3.attn.q_proj.weight -> model.layers.3.self_attn.qkv_proj.q_proj.weight."""
    for pattern, replacement in RENAMING:
        name = re.sub(pattern, replacement, name)
    return name


def from_pretrained(folder, device='cpu', dtype=None):
    """Return the Zaya of a released folder, in eval mode. dtype: of the weights, by default as stored.

    The model is built on 'meta' and filled tensor by tensor: peak memory is the model plus one tensor. Raise
    ValueError, naming the tensor or file, if the folder does not hold exactly this model.
    """
    content = read_config(folder)
    quantized = content.get('nanozaya_quantization')            # by quantize.py
    model, wanted = empty_model(folder, content)
    names, state = {released_name(name): name for name in model.state_dict()}, {}
    old = quantized and quantized.get('format', 1) == 1
    for name, tensor in read_format_1(folder, model, wanted) if old else read_tensors(folder, wanted):
        keeps_dtype = name.endswith((*CODES, 'balancing_biases'))
        state[names[name]] = tensor.to(device, wanted[name].dtype if keeps_dtype else dtype or tensor.dtype)
    weights = [name for name, _ in model.named_parameters()]
    widest = functools.reduce(torch.promote_types, {state[name].dtype for name in weights})
    for name in weights:                                        # of mixed dtypes, the widest holds all values exactly
        state[name] = state[name].to(widest)
    model.load_state_dict(state, assign=True)                   # no copies
    del state, tensor
    for router in model.routers:                                # load counters are not stored
        router.load = torch.zeros_like(router.load, device=device)
    model.released_config = content                             # with the end-of-text token and other keys
    if quantized:
        quantize.prepare(model)
    return model.eval()


def read_config(folder):
    """Return the content of config.json, that of a legacy folder in the released layout. Raise ValueError if it is in
    neither layout, or of a variant that is not implemented here."""
    path = os.path.join(folder, 'config.json')
    content = read_json(path)
    if is_legacy(content):
        content = released_config(content, path)
    elif not {'layer_types', 'moe_intermediate_size'} & content.keys():
        raise ValueError(f'{path}: is in neither layout of ZAYA1: moe_intermediate_size is missing, and so is cca')
    check(content, CONFIG, path)
    return {key: value for key, value in content.items() if key not in UNSUPPORTED}    # `transformers` refuses false


def empty_model(folder, content):
    """Return the model on 'meta' that config.json describes, and {released name: tensor} that its files must hold."""
    path = os.path.join(folder, 'config.json')
    with torch.device('meta'):
        model = Zaya(config_from_json(content, path))
        if quantized := content.get('nanozaya_quantization'):
            with reading(path):
                quantize.replace(model, quantized['bits'])
    return model, {released_name(name): tensor for name, tensor in model.state_dict().items()}


def read_tensors(folder, wanted):
    """Yield (released name, tensor) from the files of a folder in either layout. wanted: {released name: tensor on
    'meta'}. Legacy experts are stacked when the last one of a layer has been read, maybe from another file. Raise
    ValueError, naming the tensor and the file, unless the folder holds exactly the tensors wanted."""
    safetensors, places = package('safetensors'), {name: (name, None) for name in wanted}
    if is_legacy(read_json(os.path.join(folder, 'config.json'))):
        config = read_config(folder)
        places = {legacy: (name, e) for name in wanted for legacy, e in legacy_names(name, config)}
    stacks = {}                                                 # released name -> {expert: tensor}
    for path in weight_files(folder):
        with safetensors.safe_open(path, 'pt') as file:
            for key in file.keys():
                if key == HEAD:                                 # tied: the embedding again
                    continue
                with reading(path):
                    if key not in places:
                        raise ValueError(f'unknown tensor {key}')
                    name, expert = places.pop(key)
                    tensor = file.get_tensor(key)
                    compare_tensors(key, tensor, wanted[name] if expert is None else wanted[name][expert])
                if expert is not None:
                    stack = stacks.setdefault(name, {})
                    stack[expert] = tensor
                    if len(stack) < len(wanted[name]):
                        continue
                    tensor = torch.stack([stack[e] for e in range(len(stack))])
                    del stacks[name]
                yield name, tensor
    if places:
        raise ValueError(f'{folder}: {len(places)} tensors are missing, the first is {min(places)}')


def read_format_1(folder, model, wanted):
    """As read_tensors, for a folder that quantize.py wrote before it interleaved the codes (format 1): each matrix has
    codes, of 4 bits two per byte, scale and offset. model: on 'meta'."""
    matrices = {released_name(f'{name}.blocks').removesuffix('.blocks'): module
                for name, module in model.named_modules() if isinstance(module, quantize.Matrix)}
    old = {name: tensor for name, tensor in wanted.items() if name.rpartition('.')[0] not in matrices}
    place, found = {}, {}       # old name -> (matrix, expert, part); matrix -> {expert: {part: tensor}}
    for base, m in matrices.items():
        parts = {8: {'codes': (m.width, torch.int8), 'scale': (1, torch.float32)},
                 4: {'codes': (m.width // 2, torch.uint8)} | dict.fromkeys(
                     ('scale', 'offset'), (m.width // quantize.GROUP, torch.bfloat16))}[m.bits]
        for e in range(len(m.blocks)) if m.blocks.ndim == 4 else ['']:
            for part, (n, dtype) in parts.items():
                name = f'{base}.{e}.{part}'.replace('..', '.')
                old[name], place[name] = torch.empty(m.out, n, dtype=dtype, device='meta'), (base, e, part)
    for name, tensor in read_tensors(folder, old):
        if name not in place:
            yield name, tensor
            continue
        base, e, part = place[name]
        found.setdefault(base, {}).setdefault(e, {})[part] = tensor
        experts, m = found[base], matrices[base]
        if sum(map(len, experts.values())) == m.blocks[..., 0, 0, 0].numel() * (3 if m.bits == 4 else 2):
            experts = [experts[e] for e in sorted(found.pop(base))]
            for q in experts if m.bits == 4 else ():
                q['codes'] = torch.stack([q['codes'] & 15, q['codes'] >> 4], -1).flatten(-2)
            join = (lambda tensors: torch.stack(tensors)) if m.blocks.ndim == 4 else (lambda tensors: tensors[0])
            yield f'{base}.blocks', join([quantize.interleave(**q) for q in experts])
            if m.bits == 8:
                yield f'{base}.scale', join([q['scale'][:, 0] for q in experts])


def compare_tensors(name, tensor, like):
    """Raise ValueError unless a tensor has the shape and a dtype that the model has."""
    if tensor.shape != like.shape:
        raise ValueError(f'{name} has shape {list(tensor.shape)}, config.json asks for {list(like.shape)}')
    if tensor.dtype not in ([like.dtype] if name.endswith(CODES) else FLOATS):
        raise ValueError(f'{name} is {tensor.dtype}, which is not supported')


def save_pretrained(model, folder, run=None):
    """Write a Zaya as config.json and model.safetensors in the released layout, a large model as several files with an
    index. Other keys of the config.json it was read from are kept. run: the folder of the run that trained the model,
    whose tokenizer, chat template and stop tokens are also written. All ranks call this for a sharded model, and rank 0
    writes. Raise ValueError for a model without the skip class."""
    config, safetensors = config_to_json(model.config), package('safetensors.torch')
    files, size, weight_map, tensors = [[]], 0, {}, model.state_dict()          # files: the names in each
    for name, tensor in tensors.items():
        size += tensor.numel() * tensor.element_size()
        if size > FILE_BYTES and files[-1]:
            files, size = [*files, []], tensor.numel() * tensor.element_size()
        files[-1].append(name)
    writes = is_rank0()
    if writes:
        os.makedirs(folder, exist_ok=True)
    for i, names in enumerate(files):
        file = 'model.safetensors' if len(files) == 1 else f'model-{i + 1:05}-of-{len(files):05}.safetensors'
        full = {released_name(name): gather_full(tensors[name], writes) for name in names}
        weight_map |= dict.fromkeys(full, file)
        if writes:
            safetensors.save_file(full, os.path.join(folder, file), metadata={'format': 'pt'})
    if writes and files[1:] and os.path.exists(single := os.path.join(folder, 'model.safetensors')):
        os.remove(single)                                       # of a model saved before: it would be read instead
    dtype = {'dtype': str(model.dtype).removeprefix('torch.')}
    if writes:
        tokens = write_tokenizer(run, folder) if run else {}
        write_json(folder, getattr(model, 'released_config', {}) | config | dtype | tokens,
                   weight_map if files[1:] else None)


def write_json(folder, config, weight_map=None):
    """Write config.json and, for several weights files, their index. weight_map: {tensor name: file name}."""
    contents = {'config.json': config}
    if weight_map:
        contents['model.safetensors.index.json'] = {'metadata': {}, 'weight_map': weight_map}
    for name, content in contents.items():
        with open(os.path.join(folder, name), 'w') as file:
            json.dump(content, file, indent=2, sort_keys=True)


def config_from_json(content, path):
    """Return the ZayaConfig of the content of config.json. path: of the file, for error messages."""
    rope = (content.get('rope_parameters') or {'hybrid': {}})['hybrid']
    sizes, released = {}, ZayaConfig.zaya1_8b()                 # the values of missing keys
    for names, values in (CONFIG_NAMES, content), (ROPE_NAMES, rope):
        for ours, theirs in names.items():
            sizes[ours] = values.get(theirs, getattr(released, ours))
    return config_of(sizes | {'skip_expert': True}, path)


def config_to_json(config):
    """Return the content of config.json. Raise ValueError without the skip class, which the layout requires."""
    if not config.skip_expert:
        raise ValueError('the released layout always has the skip class, this model has none: '
                         'train with skip_expert=True to export it')
    rope = {'rope_type': 'default'} | {theirs: getattr(config, ours) for ours, theirs in ROPE_NAMES.items()}
    return CONFIG_FIXED | {theirs: getattr(config, ours) for ours, theirs in CONFIG_NAMES.items()} | {
        'architectures': ['ZayaForCausalLM'], 'rope_parameters': {'hybrid': rope},
        'layer_types': ['hybrid'] * config.n_layer}


def weight_files(folder):
    """Return the paths of a folder's weights: model.safetensors, or the files its index names. Raise ValueError if one
    cannot be read, two files hold the same tensor, or the output head, which is tied, differs from the embedding."""
    index, names = os.path.join(folder, 'model.safetensors.index.json'), ['model.safetensors']
    if os.path.exists(index) and not os.path.exists(os.path.join(folder, names[0])):
        names = sorted(set(read_json(index, {'weight_map': {str: str}})['weight_map'].values()))
    safetensors, place = package('safetensors'), {}             # place: {tensor name: open file}
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


def copy_folder(folder, out, change, settings, share):
    """Copy a released folder in the released layout, completely or not at all, with half a GiB of tensors and
    one more in memory.

    change(name, tensor) returns [(name, tensor), ...], which replace the tensor. settings are added to config.json.
    share: the size of the new weights divided by that of the old. Raise ValueError if the folder is incomplete or is
    quantized already, a weight is not finite, `out` exists, or the disk is too small.
    """
    safetensors, out, content = package('safetensors'), os.path.normpath(out), read_config(folder)
    if 'nanozaya_quantization' in content:
        raise ValueError(f'{folder}: is quantized already: name the folder that it was made of')
    if os.path.exists(out):
        raise ValueError(f'{out} is already there: name another folder, or remove it')
    needed = share * sum(map(os.path.getsize, weight_files(folder))) / 2 ** 30
    free = shutil.disk_usage(next(path for path in Path(out).absolute().parents if path.exists())).free / 2 ** 30
    if free < needed:
        raise ValueError(f'{out} needs {needed:.1f} GiB, the disk has {free:.1f} GiB left')
    _, wanted = empty_model(folder, content)
    progress = lambda words: tqdm(read_tensors(folder, wanted), words, len(wanted), unit='tensor', dynamic_ncols=True)
    for name, tensor in progress('checking'):
        if not tensor.isfinite().all():
            raise ValueError(f'{folder}: {name} is not finite')
    unfinished, weight_map, batch = f'{out}.unfinished', {}, {}
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        os.makedirs(unfinished)
        for name, tensor in progress('writing'):
            with reading(folder):                               # change may raise, as for an odd shape
                batch |= {key: value.contiguous() for key, value in change(name, tensor)}
            if sum(value.nbytes for value in batch.values()) > 2 ** 29:
                weight_map, batch = weight_map | write_shard(unfinished, weight_map, batch), {}
        if batch:
            weight_map |= write_shard(unfinished, weight_map, batch)
        write_json(unfinished, content | settings, weight_map)
        for name in os.listdir(folder):                         # tokenizer, chat template, ...
            if name.endswith(('.json', '.jinja', '.model', '.txt')) and name not in os.listdir(unfinished):
                shutil.copy(os.path.join(folder, name), unfinished)
        os.rename(unfinished, out)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f'{out} could not be written: {error}') from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_shard(folder, weight_map, tensors):
    """Write tensors as the next weights file. Return {name: file name}. weight_map: that of the files so far."""
    name = f'model-{len(set(weight_map.values())):05}.safetensors'
    package('safetensors.torch').save_file(tensors, os.path.join(folder, name), metadata={'format': 'pt'})
    return dict.fromkeys(tensors, name)


def load(folder, device='cpu'):
    """Return the model of a run or a released folder, in eval mode, and its Language. Raise ValueError if the folder is
    neither."""
    if not os.path.isdir(folder):
        raise ValueError(f'{folder}: no such folder; train a model first (make demo: runs/demo and '
                         'runs/demo_loops), or name another with --ckpt')
    if os.path.exists(os.path.join(folder, 'config.json')):
        language = released_language(folder)                    # first: the weights take long to read
        model = from_pretrained(folder, device)
        if language.vocab_size > model.config.vocab_size:
            raise ValueError(f'{folder}: tokenizer.json has {language.vocab_size:,} tokens, the model knows '
                             f'{model.config.vocab_size:,}')
        return model, language
    return load_run(folder, device)
