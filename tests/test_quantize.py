"""int8 and int4 weights: their error bounds, and that all ways to multiply by them agree."""
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import decode
import quantize
import runtime.pretrained
from runtime.pretrained import from_pretrained, save_pretrained
from common import ENV, run_script, tiny_model, tokens
from quantize import GROUP, Matrix, dequantize, unpack
from runtime.quantize_folder import quantize_folder
from test_language import write_language

safetensors = pytest.importorskip('safetensors.torch')
pytestmark = pytest.mark.filterwarnings('ignore:.*found in sys.modules')        # the command's module, from runpy

seeds, bits_ = st.integers(0, 10**6), st.sampled_from([4, 8])


def random_matrix(seed, out=64, width=96, outlier=False):
    W = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    if outlier:
        W[seed % out, seed % width] = 30.0
    return W


def matrix_of(W, bits, dtype=torch.float32, keep=True):
    m = Matrix(bits, *W.shape)
    for name, value in quantize.quantize(W, bits).items():
        setattr(m, name, value)
    m.pack(dtype, keep)
    return m


@given(seeds, bits_)
def test_the_error_of_a_weight_is_at_most_half_a_step(seed, bits):
    W = random_matrix(seed)
    q = quantize.quantize(W, bits, spans=[1.0])
    step = q['scale'].float().repeat_interleave(GROUP if bits == 4 else W.shape[1], 1)
    slack = 2 ** -7 * W.abs().amax() * (bits == 4)              # s and z are bf16
    assert ((dequantize(**q) - W).abs() <= step / 2 + slack + 1e-6).all()


@given(seeds, st.booleans())
def test_the_best_range_is_never_worse_than_round_to_nearest(seed, outlier):
    W = random_matrix(seed, outlier=outlier)
    error = lambda **options: (dequantize(**quantize.quantize(W, 4, **options)) - W).unflatten(-1, (-1, GROUP)).square()
    best, nearest = error().sum(-1), error(spans=[1.0]).sum(-1)
    assert (best <= nearest * 1.0001).all() and best.sum() < nearest.sum()


@given(seeds)
def test_representable_weights_are_exact(seed):
    c = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    c[:, ::GROUP], c[:, 1::GROUP] = 0, 15
    assert torch.equal(unpack(c[:, ::2] | c[:, 1::2] << 4), c)
    W = 0.5 * (c.float() - 8) + 0.25
    torch.testing.assert_close(dequantize(**quantize.quantize(W, 4, spans=[1.0])), W)


@torch.no_grad()
@given(seeds, bits_, st.sampled_from([1, 2, 3, 16, 33]), st.sampled_from([torch.float32, torch.bfloat16]),
       st.booleans())
@settings(max_examples=40)
def test_the_fast_products_are_those_of_the_dequantized_matrix(seed, bits, T, dtype, whole_tiles):
    m = matrix_of(random_matrix(seed, 64 if whole_tiles else 50), bits, dtype)
    x = torch.randn(T, 96, generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected = F.linear(x.float(), dequantize(m.codes, m.scale, m.offset))
    error = (m(x).float() - expected).abs().max() / expected.abs().max()
    assert m(x).dtype == dtype and error < (1e-5 if dtype == torch.float32 else 2e-2)


@torch.no_grad()
@given(seeds, bits_)
def test_the_head_keeps_more_precision_than_a_bf16_input(seed, bits):
    m = matrix_of(random_matrix(seed), bits, torch.bfloat16)
    x = random_matrix(seed + 1, 16)                                             # float32, as from the last norm
    exact = x @ dequantize(m.codes, m.scale, m.offset).T
    error = lambda y: (y.float() - exact).square().mean()
    assert error(m.product(x)) < 0.9 * error(m.product(x.bfloat16()))


@torch.no_grad()
@given(seeds, bits_)
def test_joined_matrices_concatenate_their_outputs(seed, bits):
    parts = [matrix_of(random_matrix(seed + i, out), bits) for i, out in enumerate((32, 64, 10))]
    x = random_matrix(seed, 3)
    torch.testing.assert_close(Matrix.joined(parts)(x), torch.cat([m(x) for m in parts], -1), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    model = tiny_model(vocab_size=320, n_embd=64, head_dim=16, n_head=4, n_kv_head=2, expert_dim=32, skip_expert=True)
    model.released_config = {'eos_token_id': 2}
    folder = write_language(tmp_path_factory.mktemp('folder') / 'model')
    save_pretrained(model, folder)
    return folder


def dequantized(folder, out, bits):
    """Return an unquantized model with the dequantized weights, and the quantized model."""
    plain, quantized = from_pretrained(folder), from_pretrained(out)
    with torch.no_grad():
        for layer, q in zip(plain.layers, quantized.layers):
            for name in 'q_proj', 'k_proj', 'v_proj', 'v_proj_delayed', 'o_proj':
                getattr(layer.attn, name).weight.copy_(getattr(q.attn, name).weight)
        for name, p in plain.named_parameters():
            if 'experts' in name:
                for e in range(len(p)):
                    p[e] = dequantize(**quantize.quantize(p[e], bits))
        plain.embedding.weight.copy_(quantized.embedding.weight)
    return plain, quantized


@torch.no_grad()
@pytest.mark.parametrize('bits', [4, 8])
def test_a_quantized_folder_equals_the_model_with_dequantized_weights(folder, tmp_path, bits):
    quantize_folder(folder, tmp_path / 'out', bits)
    plain, quantized = dequantized(folder, tmp_path / 'out', bits)
    idx = tokens(3, 20, vocab_size=320)
    torch.testing.assert_close(quantized(idx)[0], plain(idx)[0], atol=2e-3, rtol=1e-3)
    caches = [model.make_cache(3, 30) for model in (plain, quantized)]
    steps = [decode.folded(model) for model in (plain, quantized)]
    for model, cache in zip((plain, quantized), caches):
        model(idx, cache=cache)
    for t in range(4):
        new = tokens(3, seed=t, vocab_size=320)
        a, b = (step(cache, new) for step, cache in zip(steps, caches))
        torch.testing.assert_close(b, a, atol=2e-3, rtol=1e-3)
    own = {name: t for name, t in from_pretrained(folder).state_dict().items() if 'router' in name or 'conv' in name}
    kept = quantized.state_dict()
    assert own and all(torch.equal(t, kept[name]) for name, t in own.items())


def test_quantized_folders_are_read_like_any_other(folder, tmp_path, monkeypatch, capsys):
    for bits in 8, 4:
        _, message = run_script(monkeypatch, capsys, 'quantize.py', folder, tmp_path / f'{bits}', f'--bits={bits}')
        assert message is None and not (tmp_path / f'{bits}.unfinished').exists()
        out, message = run_script(monkeypatch, capsys, 'sample.py', f'--ckpt={tmp_path}/{bits}', '--prompt=What',
                                  '--max_new_tokens=5', '--device=cpu')
        assert message is None and out.startswith('What')
    sizes = [sum(path.stat().st_size for path in place.glob('*.safetensors')) for place in (tmp_path / '4', folder)]
    assert sizes[0] < 0.5 * sizes[1]                            # much of a small model is not quantized


def with_weights(folder, to, change):
    """Copy a folder with other weights: change edits {name: tensor} in place."""
    shutil.copytree(folder, to)
    tensors = safetensors.load_file(to / 'model.safetensors')
    change(tensors)
    safetensors.save_file(tensors, to / 'model.safetensors')
    return to


def twice(folder, tmp_path, message):
    quantize_folder(folder, tmp_path / 'int8', 8)
    return message(tmp_path / 'int8', tmp_path / 'int4')


UNUSABLE = {
    'unknown tensor': lambda t: [t.update({f'other.{name}': t.pop(name)}) for name in list(t)],
    'cannot be read (unknown tensor model.extra)': lambda t: t.update({'model.extra': torch.zeros(1)}),
    'the first is model.norm.weight': lambda t: t.pop('model.norm.weight'),
    'model.layers.1.mlp.experts.down_proj is not finite':
        lambda t: t['model.layers.1.mlp.experts.down_proj'][2, 3].fill_(torch.nan),
    'model.layers.0.mlp.gate.down_proj.bias is not finite':
        lambda t: t['model.layers.0.mlp.gate.down_proj.bias'][:1].fill_(torch.inf),
}


@pytest.mark.parametrize('expected', UNUSABLE)
def test_weights_that_cannot_be_quantized_are_named_before_anything_is_written(
        folder, tmp_path, monkeypatch, capsys, expected):
    broken = with_weights(folder, tmp_path / 'broken', UNUSABLE[expected])
    monkeypatch.setattr(runtime.pretrained.os, 'makedirs', None)               # writes nothing, not even a folder
    _, message = run_script(monkeypatch, capsys, 'quantize.py', broken, tmp_path / 'out')
    assert expected in message and [path.name for path in tmp_path.iterdir()] == ['broken']


def test_the_name_of_out_may_end_in_a_slash(folder, tmp_path, monkeypatch, capsys):
    _, message = run_script(monkeypatch, capsys, 'quantize.py', f'{folder}/', f'{tmp_path}/new/out//', '--bits=8')
    assert message is None and [path.name for path in (tmp_path / 'new').iterdir()] == ['out']
    from_pretrained(tmp_path / 'new' / 'out')


def refuse(*paths):
    raise PermissionError(13, 'denied')


def test_a_failed_rename_leaves_nothing_that_refuses_the_retry(folder, tmp_path, monkeypatch, capsys):
    arguments = 'quantize.py', folder, f'{tmp_path}/out/'
    with monkeypatch.context() as patch:
        patch.setattr(runtime.pretrained.os, 'rename', refuse)
        _, message = run_script(patch, capsys, *arguments)
    assert 'could not be written' in message and list(tmp_path.iterdir()) == []
    assert run_script(monkeypatch, capsys, *arguments)[1] is None and from_pretrained(tmp_path / 'out')


def test_invalid_input_gets_a_one_line_error_and_leaves_no_files(folder, tmp_path, monkeypatch, capsys):
    def message(*arguments):
        _, text = run_script(monkeypatch, capsys, 'quantize.py', *arguments)
        assert text and '\n' not in text and not list(tmp_path.glob('*.unfinished'))
        return text
    assert 'bits is 5' in message(folder, tmp_path / 'a', '--bits=5')
    assert 'name a released folder and' in message(folder)
    assert 'already there' in message(folder, tmp_path)
    half = shutil.copytree(folder, tmp_path / 'half')
    (half / 'model.safetensors').unlink()
    assert 'model.safetensors is missing' in message(half, tmp_path / 'a')
    (half / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:5000])
    assert 'cannot be read' in message(half, tmp_path / 'a')
    odd = tiny_model(vocab_size=300, n_embd=40, skip_expert=True)
    save_pretrained(odd, write_language(tmp_path / 'odd'))
    assert 'multiple of 32' in message(tmp_path / 'odd', tmp_path / 'a')
    assert 'is quantized already' in twice(folder, tmp_path, message)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    assert 'the disk has 0.0 GiB left' in message(folder, tmp_path / 'a') and not (tmp_path / 'a').exists()
    assert json.loads((folder / 'config.json').read_text())['eos_token_id'] == 2


def test_int8_codes_at_any_address_work_on_many_tokens():
    """torch's kernel crashes on codes that are not 16-byte aligned, as in a mapped file: in a separate process."""
    script = """
import torch
from quantize import Matrix
matrix, storage = Matrix(8, 64, 64), torch.randint(-9, 9, (64 * 64 + 32,), dtype=torch.int8)
start = (8 - storage.data_ptr()) % 16
matrix.codes, matrix.scale = storage[start:start + 64 * 64].view(64, 64), torch.ones(64, 1)
x, codes = torch.randn(64, 64).bfloat16(), matrix.codes.clone()
matrix.pack(torch.bfloat16, keep=True)
assert torch.allclose(matrix(x).float(), x.float() @ codes.float().T, rtol=0.02, atol=0.5)
"""
    result = subprocess.run([sys.executable, '-c', script], env=ENV, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
