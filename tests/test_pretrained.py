"""Both layouts of released folders, and the export of a run."""
import json
import re
import typing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from common import run_script, tiny_model, tokens
from data.tokenizer import digest, load_tokenizer, save_tokenizer, train_bpe
from model import Zaya, ZayaConfig
from runtime.export import tokenizer_of
from runtime.language import released_stop_tokens
from runtime.legacy import legacy_names
from runtime.pretrained import config_from_json, from_pretrained, load, read_config, released_name, save_pretrained
from runtime.quantize_folder import quantize_folder
from test_language import write_language

safetensors = pytest.importorskip('safetensors.torch')
tokenizers = pytest.importorskip('tokenizers')

SHAPE = dict(vocab_size=320, n_embd=64, n_head=4, n_kv_head=2, head_dim=16, n_expert=12, expert_dim=32, router_dim=8,
             n_layer=3, skip_expert=True)

# config.json of ZAYA1-8B-legacy and ZAYA1-base, without the sizes of the tiny model.
FLAGS = {'model_type': 'zaya', 'architectures': ['ZayaForCausalLM'], 'zaya_use_eda': True, 'zaya_use_mod': True,
         'scale_residual_merge': True, 'cca': True, 'gated_linear_unit': True, 'clamp_temp': False,
         'add_bias_linear': False, 'attention_bias': False, 'lm_head_bias': False, 'activation_func': 'swiglu',
         'norm_epsilon': 1e-5, 'partial_rotary_factor': 0.5, 'moe_router_topk': 1, 'tie_word_embeddings': True}
LEGACY_8B = FLAGS | {
    'num_hidden_layers': 80, 'hidden_size': 2048, 'vocab_size': 262272, 'num_attention_heads': 8, 'num_query_groups': 2,
    'num_key_value_heads': 2, 'ffn_hidden_size': 4096, 'zaya_mlp_expansion': 256, 'head_dim': 128, 'kv_channels': 128,
    'rope_theta': 5_000_000, 'max_position_embeddings': 131072, 'num_experts': 16, 'rope_scaling': False,
    'eos_token_id': 106}
BASE = FLAGS | {
    'num_hidden_layers': 120, 'zaya_layers': ['a', 16] * 40, 'hidden_size': 2048, 'vocab_size': 262272,
    'num_attention_heads': 16, 'cca_num_q_heads': [8, 0] * 40, 'num_query_groups_list': [2, 0] * 40,
    'num_key_value_heads': 2, 'ffn_hidden_size_list': [0, 4096] * 40, 'zaya_mlp_expansion': [0, 256] * 40,
    'kv_channels': 128, 'rope_theta': 1_000_000, 'max_position_embeddings': 32768, 'num_experts': 16}


def legacy_config(config, eos=2):
    return LEGACY_8B | {
        'num_hidden_layers': 2 * config.n_layer, 'hidden_size': config.n_embd, 'vocab_size': config.vocab_size,
        'num_attention_heads': config.n_head, 'num_query_groups': config.n_kv_head, 'ffn_hidden_size':
        2 * config.expert_dim, 'num_key_value_heads': config.n_kv_head, 'zaya_mlp_expansion': config.router_dim,
        'head_dim': config.head_dim, 'kv_channels': config.head_dim, 'rope_theta': config.rope_base,
        'max_position_embeddings': config.context, 'num_experts': config.n_expert, 'eos_token_id': eos}


def legacy_tensors(model):
    """Return the state of a model under its legacy names, written out layer by layer."""
    t, own = {}, model.state_dict()
    t['model.embed_tokens.weight'], t['model.final_norm.weight'] = own['embedding.weight'], own['norm.weight']
    for part in 'scale', 'bias':
        t[f'model.layers.0.res_scale.hidden_states_{part}'] = own[f'embedding_{part}']
    scaling = {'hidden_states': 'branch', 'residual': 'residual'}
    attention = {'linear_q.weight': 'q_proj.weight', 'linear_k.weight': 'k_proj.weight', 'temp': 'temperature',
                 'val_proj1.weight': 'v_proj.weight', 'val_proj2.weight': 'v_proj_delayed.weight',
                 'conv_qk.0.weight': 'conv_depthwise_weight', 'conv_qk.0.bias': 'conv_depthwise_bias',
                 'conv_qk.1.weight': 'conv_grouped_weight', 'conv_qk.1.bias': 'conv_grouped_bias'}
    router = {'down_proj.weight': 'down_proj.weight', 'down_proj.bias': 'down_proj.bias', 'rmsnorm_eda.weight':
              'norm.weight', 'router_mlp.0.weight': 'fc1.weight', 'router_mlp.0.bias': 'fc1.bias',
              'router_mlp.2.weight': 'fc2.weight', 'router_mlp.2.bias': 'fc2.bias', 'router_mlp.4.weight':
              'out_proj.weight', 'balancing_biases': 'balancing_bias', 'router_states_scale': 'eda_scale'}
    for k in range(model.config.n_layer):
        a, m, mine = f'model.layers.{2 * k}.', f'model.layers.{2 * k + 1}.', f'layers.{k}.'
        after = f'model.layers.{2 * k + 2}.' if k + 1 < model.config.n_layer else 'model.'
        t[a + 'input_norm.weight'] = own[mine + 'attn_norm.weight']
        t[m + 'input_norm.weight'] = own[mine + 'moe_norm.weight']
        t[a + 'self_attn.o_proj.weight'] = own[mine + 'attn.o_proj.weight']
        t |= {f'{a}self_attn.qkv.{theirs}': own[f'{mine}attn.{ours}'] for theirs, ours in attention.items()}
        t |= {f'{m}zaya_block.router.{theirs}': own[f'{mine}moe.router.{ours}'] for theirs, ours in router.items()
              if k or theirs != 'router_states_scale'}
        for e in range(model.config.n_expert):
            t[f'{m}zaya_block.experts.local_experts.{e}.linear_fc1.weight'] = own[mine + 'moe.experts.gate_up'][e]
            t[f'{m}zaya_block.experts.local_experts.{e}.linear_fc2.weight'] = own[mine + 'moe.experts.down'][e]
        for name, layer in ('attn_residual', m), ('moe_residual', after):
            for theirs, ours in scaling.items():
                for part in 'scale', 'bias':
                    t[f'{layer}res_scale.{theirs}_{part}'] = own[f'{mine}{name}.{ours}_{part}']
    return {name: tensor.clone() for name, tensor in t.items()}


def write_legacy(model, folder, files=1, config=None):
    """Write a legacy folder. Tensors are distributed over the files by turns: the experts of a layer are in all."""
    write_language(folder)
    tensors = legacy_tensors(model)
    parts = [dict(list(tensors.items())[i::files]) for i in range(files)]
    names = [f'model-{i}.safetensors' for i in range(files)] if files > 1 else ['model.safetensors']
    for name, part in zip(names, parts):
        safetensors.save_file(part, folder / name, metadata={'format': 'pt'})
    if files > 1:
        weight_map = {tensor: name for name, part in zip(names, parts) for tensor in part}
        (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    (folder / 'config.json').write_text(json.dumps(config or legacy_config(model.config)))
    return folder


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and bits(a[name]).equal(bits(b[name]))


# ---- the legacy layout ----

@pytest.mark.parametrize('files', [1, 5])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_model_in_both_layouts_gives_the_same_tensors_bit_for_bit(tmp_path, files, dtype):
    model = tiny_model(**SHAPE)
    for p in model.parameters():
        p.data = p.to(dtype)
    save_pretrained(model, tmp_path / 'native')
    native, legacy = (from_pretrained(folder) for folder in (
        tmp_path / 'native', write_legacy(model, tmp_path / 'legacy', files)))
    assert_same_state(native, legacy)
    assert native.config == legacy.config == model.config
    idx = tokens(2, 9, vocab_size=320)
    assert torch.equal(native(idx)[0], legacy(idx)[0])


def test_the_legacy_names_of_the_8b_model_are_2483():
    with torch.device('meta'):
        names = [released_name(name) for name in Zaya(ZayaConfig.zaya1_8b()).state_dict()]
    config = {'num_hidden_layers': 40, 'num_experts': 16}
    legacy = [old for name in names for old, _ in legacy_names(name, config)]
    assert (len(names), len(legacy), len(set(legacy))) == (1283, 2483, 2483)
    assert not any(re.search('[{}]', name) for name in legacy)


@pytest.mark.parametrize('given, base, context, eos', [(LEGACY_8B, 5e6, 131072, 106), (BASE, 1e6, 32768, 1)])
def test_both_variants_of_the_legacy_config_are_the_8b_model(tmp_path, given, base, context, eos):
    (tmp_path / 'config.json').write_text(json.dumps(given))
    content = read_config(tmp_path)
    assert config_from_json(content, '') == replace(ZayaConfig.zaya1_8b(), rope_base=base, context=context)
    assert content['eos_token_id'] == eos and released_stop_tokens(tmp_path) == [eos]


REFUSED = [
    *(({key: value}, f'{key} is {value}, it must be True') for value in (False, None) for key in (
        'zaya_use_eda', 'zaya_use_mod', 'scale_residual_merge', 'cca', 'gated_linear_unit')),
    *(({key: True}, f'{key} is True') for key in ('clamp_temp', 'add_bias_linear', 'attention_bias', 'lm_head_bias')),
    ({'rope_scaling': {'type': 'yarn', 'factor': 4}}, 'rope_scaling is a dict'),
    ({'moe_router_topk': 2}, 'moe_router_topk is 2, it must be 1'),
    ({'swa_layers': [4096, 0]}, 'swa_layers is a list'), ({'activation_func': 'gelu'}, "activation_func is 'gelu'"),
    ({'tie_word_embeddings': False}, 'tie_word_embeddings is False'), ({'cca_time0': 4}, 'cca_time0 is 4'),
    ({'num_hidden_layers': 81}, 'num_hidden_layers must alternate attention and 16 experts'),
    ({'zaya_layers': ['a', 16, 16, 'a'] * 20}, 'zaya_layers must alternate'),
    ({'zaya_layers': ['a', 16] * 39 + ['a', 8]}, 'zaya_layers must alternate'),
    ({'zaya_mlp_expansion': [0, 256] * 39 + [0, 128]}, 'zaya_mlp_expansion must hold the same size for all 80 layers'),
    ({'cca_num_q_heads': [8, 0] * 39}, 'cca_num_q_heads must hold the same size'),
    ({'ffn_hidden_size': 33}, 'must be even'),
    ({'rope_theta': None}, 'rope_theta is None'), ({'vocab_size': '9'}, "vocab_size is '9', it must be a whole number"),
    ({'zaya_mlp_expansion': None}, 'zaya_mlp_expansion is None'),
]


@pytest.mark.parametrize('changes, message', REFUSED, ids=str)
def test_a_legacy_config_of_another_variant_is_refused(tmp_path, changes, message):
    (tmp_path / 'config.json').write_text(json.dumps(LEGACY_8B | changes))
    with pytest.raises(ValueError) as error:
        from_pretrained(tmp_path)
    assert message in str(error.value) and '\n' not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / 'config.json'))


def test_a_folder_in_neither_layout_is_one_line(tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(ValueError, match='config.json: is in neither layout of ZAYA1'):
        from_pretrained(tmp_path)


def test_legacy_weights_that_do_not_fit_are_named(tmp_path):
    model = tiny_model(**SHAPE)
    expert = 'model.layers.3.zaya_block.experts.local_experts.10.linear_fc2.weight'
    folder = write_legacy(model, tmp_path)
    path, good = folder / 'model.safetensors', legacy_tensors(model)

    def message(tensors):
        safetensors.save_file(tensors, path)
        with pytest.raises(ValueError) as error:
            from_pretrained(folder)
        return str(error.value)
    assert f'1 tensors are missing, the first is {expert}' in message({k: v for k, v in good.items() if k != expert})
    assert 'unknown tensor model.layers.6.input_norm.weight' in message(
        good | {'model.layers.6.input_norm.weight': torch.zeros(64)})
    wrong = good | {expert: torch.zeros(64, 31)}
    assert f'{expert} has shape [64, 31], config.json asks for [64, 32]' in message(wrong)
    save_pretrained(model, tmp_path / 'native')
    assert 'unknown tensor model.' in message(safetensors.load_file(tmp_path / 'native' / 'model.safetensors'))


def test_programs_read_a_legacy_folder_and_write_the_released_layout(tmp_path, monkeypatch, capsys):
    model = tiny_model(**SHAPE)
    save_pretrained(model, write_language(tmp_path / 'native'))
    legacy = write_legacy(model, tmp_path / 'legacy', 3)
    sampled = [run_script(monkeypatch, capsys, 'sample.py', f'--ckpt={folder}', '--prompt=What', '--max_new_tokens=5',
                          '--device=cpu') for folder in (tmp_path / 'native', legacy)]
    assert sampled[0] == sampled[1] and sampled[0][1] is None
    for folder in 'native', 'legacy':
        quantize_folder(tmp_path / folder, tmp_path / f'{folder}-int4', 4)
    assert_same_state(*(from_pretrained(tmp_path / f'{folder}-int4') for folder in ('native', 'legacy')))
    out, message = run_script(monkeypatch, capsys, 'runtime.convert', legacy, tmp_path / 'converted/')
    assert message is None
    transformers = pytest.importorskip('transformers')
    reference = transformers.ZayaForCausalLM.from_pretrained(tmp_path / 'converted')
    for name, tensor in reference.state_dict().items():
        theirs = safetensors.load_file(tmp_path / 'native' / 'model.safetensors')
        if name in theirs and 'balancing' not in name:
            assert torch.equal(tensor, theirs[name]), name
    assert 'cca' not in json.loads((tmp_path / 'converted' / 'config.json').read_text())


# ---- the export of a run ----

TEXT = ['So much, so far, so good.\n\n    def f(x):\n        return x[1:20] + "naïve 漢字 🙂"\n' * 3]
characters = st.characters(exclude_categories=('Cs', 'Cn'))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run with random weights, as train.py would have left it."""
    folder = tmp_path_factory.mktemp('run')
    enc = train_bpe(TEXT, 340)
    save_tokenizer(folder / 'bpe.json', enc)
    model = tiny_model(**SHAPE | {'vocab_size': enc.n_vocab, 'context': 256})
    for router in model.routers:                # `transformers` always loads the bias of 'skip' as -1
        router.balancing_bias[-1] = -1.0
    torch.save({'step': 1, 'model': model.state_dict(), 'model_config': asdict(model.config), 'tokenizer': digest(enc)},
               folder / 'ckpt.pt')
    return folder


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported')
    save_pretrained(load(run)[0], folder, run=run)
    return folder


@given(st.lists(st.sampled_from(['<|user|>', '<|end|>', '<think>', ' so', 'ood.\n', '\r\n\t ', '12345', '  ', "'s"])
                | st.text(characters, max_size=5)).map(''.join))
@settings(max_examples=300)
def test_the_exported_tokenizer_gives_the_tokens_of_the_run(run, exported, text):
    ours, theirs = load_tokenizer(run / 'bpe.json'), tokenizers.Tokenizer.from_file(str(exported / 'tokenizer.json'))
    tokens = ours.encode(text, allowed_special='all')
    assert theirs.encode(text).ids == tokens
    assert theirs.decode(tokens, skip_special_tokens=False) == text


def test_the_exported_tokenizer_of_the_stdlib_gives_the_tokens_of_its_source(tmp_path):
    source = Path(typing.__file__).read_text()
    enc = train_bpe([source], 1500)
    assert tokenizer_of(enc).encode(source + Path(json.__file__).read_text()).ids == enc.encode_ordinary(
        source + Path(json.__file__).read_text())


def test_sample_and_transformers_generate_the_same_text_from_an_export(run, exported, monkeypatch, capsys):
    transformers = pytest.importorskip('transformers')
    flags = ['--prompt=So much', '--max_new_tokens=12', '--temperature=0', '--device=cpu']
    texts = [run_script(monkeypatch, capsys, 'sample.py', f'--ckpt={folder}', *flags) for folder in (run, exported)]
    assert texts[0] == texts[1] and texts[0][1] is None
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    reference = transformers.ZayaForCausalLM.from_pretrained(exported)
    out = reference.generate(**tokenizer('So much', return_tensors='pt', return_token_type_ids=False),
                             max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True) + '\n' == texts[0][0]
    language, messages = load(run)[1], [{'role': 'user', 'content': 'a b'}, {'role': 'assistant', 'content': 'c'},
                                        {'role': 'user', 'content': 'so?'}]
    released = load(exported)[1]
    for think in True, False:
        prompt = language.prompt(messages, think)
        assert released.prompt(messages, think) == prompt == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=think, return_dict=False)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == \
        language.prompt(messages)
    assert sorted(released.stop) == sorted(language.stop) and released.bos == language.bos == []
    assert sorted(reference.generation_config.eos_token_id) == sorted(language.stop)


def test_convert_exports_a_run(run, tmp_path, monkeypatch, capsys):
    _, message = run_script(monkeypatch, capsys, 'runtime.convert', run, f'{tmp_path}/out/')
    assert message is None and [path.name for path in tmp_path.iterdir()] == ['out']
    assert_same_state(load(run)[0], load(tmp_path / 'out')[0])
    assert 'already there' in run_script(monkeypatch, capsys, 'runtime.convert', run, tmp_path / 'out')[1]
    assert 'name a folder and' in run_script(monkeypatch, capsys, 'runtime.convert', run)[1]
