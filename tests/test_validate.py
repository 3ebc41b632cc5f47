"""Validation of files (validate.py): a one-line error for anything invalid, and no silent mix-up of files."""
import json
import math
import os
import shutil
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, strategies as st

from runtime import pretrained
import configurator
import train
from runtime.checkpoint import RESUMABLE, load_checkpoint, save_checkpoint, write_log
from runtime.pretrained import from_pretrained, save_pretrained
from common import TINY_RUN, run_script, tiny_model
from runtime.checkpoint import exclusive_lock
from runtime.pretrained import copy_folder
from validate import check, parse_json
from data.loader import open_dataset
from tasks.loops import task
from data.prepare import prepare
from data.tokenizer import load_tokenizer, make_encoding, save_tokenizer
from model import ZayaConfig
from rsa import load_policy


# ---- check and parse_json ----

KIND = {'n': range(1, 9), 'rate': float, 'name?': (None, str), 'list': [{'x': int}],
        'pair': [bool, 2], 'any': {str: int}}
GOOD = {'n': 8, 'rate': 1, 'list': [{'x': 1}, {'x': -2, 'more': 0}], 'pair': [True, 2], 'any': {}}
BAD = {'n is 9, it must be a whole number from 1 to 8': {'n': 9}, 'n is True': {'n': True},
       'rate is nan, it must be a finite number': {'rate': math.nan}, 'rate is False': {'rate': False},
       'rate is 1000000': {'rate': 10 ** 400},
       'name is 3, it must be None or text': {'name': 3}, 'list is a dict, it must be a list': {'list': {}},
       'list[1].x is missing': {'list': [{'x': 1}, {}]}, "list[0].x is 'a', it must be a whole": {'list': [{'x': 'a'}]},
       'pair has 3 entries, it must have 2': {'pair': [True, 2, 2]}, 'pair[1] is 3, it must be 2': {'pair': [True, 3]},
       'any.a is 0.5, it must be a whole number': {'any': {'a': 0.5}}, 'a key of any is 3': {'any': {3: 3}}}


@pytest.mark.parametrize('message', BAD)
def test_an_error_names_the_file_the_key_the_value_and_what_it_must_be(message):
    check(GOOD, KIND, 'file')
    with pytest.raises(ValueError) as error:
        check(GOOD | BAD[message], KIND, 'file')
    assert str(error.value).startswith(f'file: {message}')


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                           | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(json_values, st.integers(0, 3))
def test_valid_json_is_read_and_any_other_gets_a_one_line_error(value, cut):
    text = json.dumps(value).encode()
    assert parse_json(text, 'file') == value
    try:
        parse_json(text[:len(text) - cut], 'file')
    except ValueError as error:
        assert str(error).startswith('file: ') and len(str(error).splitlines()) == 1


@pytest.mark.parametrize('text', [b'[' * 200_000, b'{"a":' * 200_000, b'[' * 101 + b']' * 101, b'Infinity',
                                  b'{"a": NaN}', b'"\\ud800"', b'\xff', b'9' * 5000, b'', b'1 2'])
def test_malicious_json_gets_a_one_line_error(text):
    with pytest.raises(ValueError, match='^file: is not valid') as error:
        parse_json(text, 'file')
    assert len(str(error.value)) < 200


# ---- a tokenizer belongs to its data and its model ----

def run(dataset, out_dir, **changes):
    flags = TINY_RUN + [f'--{key}={value}' for key, value in (dict(dataset=dataset, out_dir=out_dir) | changes).items()]
    return train.train(*configurator.read(flags, train.TrainConfig, ZayaConfig))


@pytest.fixture(scope='module')
def finished(dataset, tmp_path_factory):
    run(dataset, out_dir := tmp_path_factory.mktemp('finished'))
    return out_dir


def shuffled(enc, path):
    """Save a tokenizer with the same tokens, of which two have swapped their ids."""
    tokens = [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab - len(enc.special_tokens_set))]
    tokens[97], tokens[98] = tokens[98], tokens[97]
    save_tokenizer(path, make_encoding(enc._pat_str, tokens, sorted(enc.special_tokens_set,
                                                                    key=enc.encode_single_token)))


def test_the_tokenizer_of_another_run_is_detected_first(dataset, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / 'run')
    shutil.copytree(dataset, tmp_path / 'data')
    for folder in 'run', 'data':
        shuffled(load_tokenizer(dataset / 'bpe.json'), tmp_path / folder / 'bpe.json')
    for script, flag, message in (
            ('sample.py', f'--ckpt={tmp_path / "run"}', 'bpe.json is not the tokenizer that this run was trained with'),
            ('train.py', f'--out_dir={tmp_path / "run"}', 'was trained with another tokenizer')):
        flags = ['--prompt=a'] if script == 'sample.py' else [*TINY_RUN, f'--dataset={dataset}']
        out, said = run_script(monkeypatch, capsys, script, *flags, flag)
        assert message in said and out == ''
    with pytest.raises(ValueError, match='bpe.json is not the tokenizer that meta.json was written with'):
        open_dataset(str(tmp_path / 'data'), 'train', 4, 16, 0)


def test_a_tokenizer_of_another_size_is_noticed_though_an_old_folder_has_no_digest(dataset, finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'run')
    shutil.copytree(dataset, tmp_path / 'data')
    state = load_checkpoint(finished)
    state.pop('tokenizer')
    save_checkpoint(tmp_path / 'run', state)
    assert pretrained.load(tmp_path / 'run')[1].digest == pretrained.load(finished)[1].digest
    prepare([('a', b'ab' * 50)], tmp_path / 'other', 263)
    for folder in 'run', 'data':
        shutil.copy(tmp_path / 'other' / 'bpe.json', tmp_path / folder)
    with pytest.raises(ValueError, match='bpe.json is not'):
        pretrained.load(tmp_path / 'run')
    with pytest.raises(ValueError, match='bpe.json is not'):
        open_dataset(str(tmp_path / 'data'), 'train', 4, 16, 0)


def test_a_model_with_as_many_tokens_is_no_loops_model(tmp_path):
    model = tiny_model(vocab_size=task.ENC.n_vocab)
    save_checkpoint(tmp_path, {'model': model.state_dict(), 'model_config': asdict(model.config), 'step': 1})
    save_tokenizer(tmp_path / 'bpe.json', task.ENC)
    assert load_policy(tmp_path, torch.device('cpu')).build_prompt is task.build_prompt
    shuffled(task.ENC, tmp_path / 'bpe.json')
    assert load_policy(tmp_path, torch.device('cpu')).build_prompt is not task.build_prompt


# ---- a checkpoint, and a log ----

SPOILED = {
    'model': (3, {}, {'norm.weight': 1}), 'model_config': (None, 5, {'vocab_size': 'a'}), 'step': ('a', -5, 0.5),
    'optimizers': (3, [], [{'state': {}}], [{'state': {}}, {'state': {0: {'step': 1}}}]), 'config': ([], 3),
    'balancer': (3, {}, {'state': {'a': {}}})}


@pytest.mark.parametrize('key', SPOILED)
def test_a_checkpoint_with_an_invalid_part_is_not_resumed(dataset, finished, tmp_path, monkeypatch, capsys, key):
    state = load_checkpoint(finished)
    for wrong in (None, *SPOILED[key]):
        spoiled = {k: v for k, v in state.items() if k != key} | ({} if wrong is None else {key: wrong})
        torch.save(spoiled, tmp_path / 'ckpt.pt')
        shutil.copy(finished / 'bpe.json', tmp_path)
        flags = [*TINY_RUN, f'--dataset={dataset}', f'--out_dir={tmp_path}', '--max_steps=5']
        _, message = run_script(monkeypatch, capsys, 'train.py', *flags)
        assert 'every checkpoint is damaged' in message or 'the checkpoint has nothing as' in message, wrong


@pytest.mark.parametrize('group, name, wrong', [('optimizers', 'momentum', torch.zeros(3)),
                                                ('balancer', 'step', torch.tensor(1))])         # an integer
def test_optimizer_states_of_other_parameters_are_refused(finished, dataset, tmp_path, group, name, wrong):
    state = load_checkpoint(finished, RESUMABLE)
    (state['balancer'] if group == 'balancer' else state['optimizers'][0])['state'][0][name] = wrong
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    save_checkpoint(tmp_path, state)
    with pytest.raises(ValueError, match='optimizers are not those of its model'):
        run(dataset, tmp_path, max_steps=5)


def test_an_unknown_setting_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    state = load_checkpoint(finished)
    state['model_config']['sparse'] = True
    save_checkpoint(tmp_path, state)
    with pytest.raises(ValueError, match="setting 'sparse'"):
        pretrained.load(tmp_path)


@pytest.mark.parametrize('content', [b'a,b\n1,2\n', bytes(range(256)) * 10, b'date,step\n1,2\n'])
def test_the_log_of_another_program_is_unchanged(tmp_path, content):
    (tmp_path / 'log.csv').write_bytes(content)
    with pytest.raises(ValueError, match='log.csv was not written by train.py'):
        write_log(tmp_path, None, ['step', 'loss'], keep_until=-1)
    assert (tmp_path / 'log.csv').read_bytes() == content


@pytest.mark.parametrize('line', [b'x,2', b'\0,\0', b'1,' + b'9' * 200_000 + b',3', b'9' * 5000 + b',1', b'\xff,1',
                                  b'"'])
def test_a_damaged_line_of_a_log_is_left_out(tmp_path, line):
    (tmp_path / 'log.csv').write_bytes(b'step,loss\n1,0.5\n' + line + b'\n2,0.25\n')
    write_log(tmp_path, None, ['step', 'loss'], keep_until=9)
    assert (tmp_path / 'log.csv').read_text().split() == ['step,loss', '1,0.5', '2,0.25']


# ---- two processes in one folder ----

def test_a_second_run_in_the_same_folder_is_refused(dataset, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != 'lock'}
    held = pytest.raises(ValueError, match=f'in use by process {os.getpid()} on ')
    with exclusive_lock(tmp_path / 'lock'), held:
        run(dataset, tmp_path, max_steps=8)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != 'lock'}
    run(dataset, tmp_path, max_steps=8)                         # the lock is released


# ---- released weights ----

@pytest.fixture
def released(tmp_path):
    pytest.importorskip('safetensors')
    save_pretrained(tiny_model(skip_expert=True), tmp_path)
    return tmp_path


def edit(folder, change, name='model.safetensors'):
    import safetensors.torch
    tensors = safetensors.torch.load_file(folder / name)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / name)


def test_an_output_head_is_accepted_only_if_it_equals_the_embedding(released, tmp_path):
    edit(released, lambda t: t.update({'lm_head.weight': t['model.embed_tokens.weight'].clone()}))
    from_pretrained(released)
    edit(released, lambda t: t['lm_head.weight'][3, 3].add_(1e-3))
    for read in from_pretrained, lambda folder: copy_folder(folder, tmp_path / 'out', lambda *pair: [pair], {}, 1):
        with pytest.raises(ValueError, match='lm_head.weight is not model.embed_tokens.weight'):
            read(str(released))


def test_a_tensor_in_two_shards_is_refused(released):
    import safetensors.torch
    tensors = safetensors.torch.load_file(released / 'model.safetensors')
    (released / 'model.safetensors').unlink()
    twice = {'model.norm.weight': tensors['model.norm.weight'] * 2}
    for i, part in enumerate((tensors, twice)):
        safetensors.torch.save_file(part, released / f'{i}.safetensors')
    (released / 'model.safetensors.index.json').write_text(json.dumps(
        {'weight_map': {name: '0.safetensors' for name in tensors} | {'model.norm.weight': '1.safetensors'}}))
    with pytest.raises(ValueError, match='model.norm.weight is in another file, too'):
        from_pretrained(released)


@pytest.mark.parametrize('dtype', [torch.int8, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_an_invalid_dtype_of_weights_is_named(released, dtype):
    edit(released, lambda t: t.update({'model.norm.weight': t['model.norm.weight'].to(dtype)}))
    with pytest.raises(ValueError, match=f'model.norm.weight is {dtype}'):
        from_pretrained(released)


def test_mixed_dtypes_are_read_in_the_widest(released):
    edit(released, lambda t: t.update({name: t[name].bfloat16() for name in t if 'experts' in name}))
    model, x = from_pretrained(released), torch.arange(9)[None]
    assert model.dtype == torch.float32 and {p.dtype for p in model.parameters()} == {torch.float32}
    exact = tiny_model(skip_expert=True)
    for name, p in exact.named_parameters():
        if 'experts' in name:
            p.data = p.bfloat16().float()
    assert torch.equal(model(x)[0], exact(x)[0])
