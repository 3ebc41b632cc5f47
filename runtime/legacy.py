"""The legacy layout of ZAYA1-base, ZAYA1-reasoning-base and ZAYA1-8B-legacy: its config and its tensor names.

The weights are those of the released layout under other names. Layer k is two legacy layers: 2k is attention, 2k + 1
the MoE. The matrices of each expert are tensors of their own, and a layer holds the residual scaling of its input.
"""
import re

from validate import check

MARKS = {'zaya_layers', 'activation_func', 'ffn_hidden_size', 'cca'}            # only legacy configs have one of these

# Schema of config.json (see validate.py): the variant that is implemented, and the sizes.
FALSE, SIZE = (False, None), (int, [int])
CONFIG = {
    'zaya_use_eda?': True, 'zaya_use_mod?': True, 'scale_residual_merge?': True, 'cca?': True,
    'gated_linear_unit?': True, 'clamp_temp?': FALSE, 'add_bias_linear?': FALSE, 'activation_func?': ('swiglu', 'silu'),
    'normalization?': 'RMSNorm', 'moe_router_topk?': 1, 'rope_parameters?': None, 'swa_layers?': None,
    'zaya_layers?': (None, [('a', int)]), 'num_hidden_layers?': int, 'num_experts': int, 'hidden_size': int,
    'vocab_size': int, 'max_position_embeddings': int, 'norm_epsilon': float, 'rope_theta': float,
    'partial_rotary_factor': float}

# Keys of the released config -> legacy keys, in order of precedence. A list has one entry per legacy layer; those of
# the other kind (attention or MoE) may be 0.
SIZES = {'num_attention_heads': ('cca_num_q_heads', 'num_attention_heads'),
         'num_key_value_heads': ('num_query_groups_list', 'num_query_groups', 'num_key_value_heads'),
         'moe_intermediate_size': ('ffn_hidden_size_list', 'ffn_hidden_size'),  # of gate and up together: twice as wide
         'router_hidden_size': ('zaya_mlp_expansion',), 'head_dim': ('head_dim', 'kv_channels')}
KEPT = ('model_type', 'vocab_size', 'hidden_size', 'max_position_embeddings', 'num_experts', 'tie_word_embeddings',
        'attention_bias', 'lm_head_bias', 'cca_time0', 'cca_time1', 'rope_scaling', 'initializer_range', 'dtype',
        'torch_dtype', 'bos_token_id', 'pad_token_id', 'eos_token_id')

# (pattern, replacement), applied in this order: from released to legacy names. a and m: the two layers of layer k.
RENAMING = [
    (r'^model\.norm', 'model.final_norm'), (r'^model\.input_hidden', 'model.layers.0.res_scale.hidden'),
    (r'^input_layernorm', '{a}.input_norm'), (r'^post_attention_layernorm', '{m}.input_norm'),
    (r'^self_attn', '{a}.self_attn'), (r'\.(qkv_proj|qk_norm)\.', '.qkv.'), (r'qkv\.([qk])_proj', r'qkv.linear_\1'),
    (r'v_proj_current', 'val_proj1'), (r'v_proj_delayed', 'val_proj2'), (r'conv_qk_depthwise', 'conv_qk.0'),
    (r'conv_qk_grouped', 'conv_qk.1'), (r'^mlp\.gate', '{m}.zaya_block.router'),
    (r'router_mlp\.norm', 'rmsnorm_eda'), (r'router_mlp\.fc1', 'router_mlp.0'), (r'router_mlp\.fc2', 'router_mlp.2'),
    (r'router_mlp\.out_proj', 'router_mlp.4'), (r'^mlp', '{m}.zaya_block'),
    (r'experts\.gate_up_proj', 'experts.local_experts.{e}.linear_fc1.weight'),
    (r'experts\.down_proj', 'experts.local_experts.{e}.linear_fc2.weight'),
    (r'^post_attention_residual_scale', '{m}.res_scale'), (r'^post_mlp_residual_scale', '{after}.res_scale'),
]


def is_legacy(config):
    """Return whether the content of a config.json is of the legacy layout."""
    return bool(MARKS & config.keys())


def released_config(given, path):
    """Return the content of config.json in the released layout. Raise ValueError, naming the key, if the config is of a
    variant that is not implemented, a size is missing, or layers differ in one."""
    check(given, CONFIG, path)
    layers = given.get('zaya_layers')
    n = len(layers) if layers else given.get('num_hidden_layers', 0)
    if not n or n % 2 or layers and layers != ['a', given['num_experts']] * (n // 2):
        raise ValueError(f'{path}: {"zaya_layers" if layers else "num_hidden_layers"} must alternate attention and '
                         f'{given["num_experts"]} experts: an even number of layers')
    sizes = {}
    for key, legacy_keys in SIZES.items():
        legacy_key = next((name for name in legacy_keys if given.get(name) is not None), legacy_keys[-1])
        check(given, {legacy_key: SIZE}, path)
        value = given[legacy_key]
        if isinstance(value, list):
            size = max(value, default=0)
            if value not in ([size, 0] * (n // 2), [0, size] * (n // 2), [size] * n):
                raise ValueError(f'{path}: {legacy_key} must hold the same size for all {n} layers, or for every '
                                 'second one, with 0 between')
            value = size
        sizes[key] = value
    if sizes['moe_intermediate_size'] % 2:
        raise ValueError(f'{path}: ffn_hidden_size is {sizes["moe_intermediate_size"]}, it must be even: gate and up')
    rope = {'rope_type': 'default', 'rope_theta': given['rope_theta'],
            'partial_rotary_factor': given['partial_rotary_factor']}
    return {'model_type': 'zaya', 'architectures': ['ZayaForCausalLM'], 'eos_token_id': 1} | {
        key: given[key] for key in KEPT if key in given} | sizes | {
        'moe_intermediate_size': sizes['moe_intermediate_size'] // 2, 'rms_norm_eps': given['norm_epsilon'],
        'num_hidden_layers': n // 2, 'layer_types': ['hybrid'] * (n // 2), 'rope_parameters': {'hybrid': rope}}


def legacy_names(name, config):
    """Return [(legacy name, expert), ...] of a released tensor; expert None for a tensor that is not stacked. config:
    that of released_config."""
    layer = re.match(r'model\.layers\.(\d+)\.', name)
    k, name = int(layer[1]) if layer else 0, name[layer.end():] if layer else name
    for pattern, replacement in RENAMING:
        name = re.sub(pattern, replacement, name)
    places = {'a': f'model.layers.{2 * k}', 'm': f'model.layers.{2 * k + 1}',
              'after': f'model.layers.{2 * k + 2}' if k + 1 < config['num_hidden_layers'] else 'model'}
    return [(name.format(e=e, **places), e) for e in (range(config['num_experts']) if '{e}' in name else [None])]
