"""int8 and int4 weights: their error bounds, and that all ways to multiply by them agree."""
import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

import decode
import quantize
from cache import Cache
import runtime.pretrained
from runtime.pretrained import from_pretrained, save_pretrained
from common import run_script, tiny_model, tokens
from quantize import GROUP, Embedding, Matrix, dequantize, interleave, joined, quantized, separate
from runtime.quantize_folder import quantize_folder
from test_language import write_language

safetensors = pytest.importorskip('safetensors.torch')
pytestmark = pytest.mark.filterwarnings('ignore:.*found in sys.modules')        # the command's module, from runpy

seeds, bits_ = st.integers(0, 10**6), st.sampled_from([4, 8])


@pytest.fixture(autouse=True, scope='module')
def kernel_is_faster():
    """Take the kernel without a measurement, which says nothing for matrices as small as these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, 'why_slower', lambda *_: None)
        yield


def random_matrix(seed, out=64, width=96, outlier=False):
    W = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    if outlier:
        W[seed % out, seed % width] = 30.0
    return W


def matrix_of(W, bits, product='kernel', dtype=torch.float32, kind=Matrix):
    """W (out, in), or (N, out, in) for experts. product: 'kernel', 'torch' (its operators) or 'definition'."""
    m = kind(bits, *W.shape[-2:], *W.shape[:-2])
    stacked = [quantize.quantize(w, bits) for w in W.reshape(-1, *W.shape[-2:])]
    m.blocks = torch.stack([interleave(**q) for q in stacked]).view_as(m.blocks)
    if bits == 8:
        m.scale = torch.stack([q['scale'][:, 0] for q in stacked]).view_as(m.scale)
    m.dtype, m.kernel = dtype, product == 'kernel'
    if product == 'torch':
        m.pack()
    return m


def exact_product(m, x, e=()):
    return x.double() @ dequantize(**m.codes(e)).double().T


@given(seeds, bits_)
def test_the_error_of_a_weight_is_at_most_half_a_step(seed, bits):
    W = random_matrix(seed)
    q = quantize.quantize(W, bits, spans=[1.0], refits=0)
    step = q['scale'].float().repeat_interleave(GROUP if bits == 4 else W.shape[1], 1)
    slack = 2 ** -7 * W.abs().amax() * (bits == 4)              # s and z are bf16
    assert ((dequantize(**q) - W).abs() <= step / 2 + slack + 1e-6).all()


@given(seeds, st.booleans())
def test_the_best_range_is_never_worse_than_round_to_nearest(seed, outlier):
    W = random_matrix(seed, outlier=outlier)
    error = lambda **options: (dequantize(**quantize.quantize(W, 4, **options)) - W).unflatten(-1, (-1, GROUP)).square()
    best, nearest = error().sum(-1), error(spans=[1.0], refits=0).sum(-1)
    assert (best <= nearest * 1.0001).all() and best.sum() < nearest.sum()


@given(seeds)
def test_representable_weights_are_exact(seed):
    c = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    c[:, ::GROUP], c[:, 1::GROUP] = 0, 15
    W = 0.5 * (c.float() - 8) + 0.25
    torch.testing.assert_close(dequantize(**quantize.quantize(W, 4, spans=[1.0], refits=0)), W)


@given(seeds, bits_, st.integers(1, 40), st.integers(1, 4))
def test_separate_is_the_inverse_of_interleave(seed, bits, out, groups):
    q = quantize.quantize(random_matrix(seed, out, 32 * groups), bits)
    blocks = interleave(**q)
    codes, scale, offset = separate(blocks)
    assert blocks.shape == (-(-out // 8), groups, quantize.BLOCK[bits]) and torch.equal(codes[:out], q['codes'])
    assert bits == 8 or torch.equal(scale[:out], q['scale']) and torch.equal(offset[:out], q['offset'])


@torch.no_grad()
@given(seeds, bits_, st.sampled_from([1, 2, 3, 16, 33]),
       st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
       st.booleans(), st.sampled_from(['kernel', 'torch', 'definition']))
@settings(max_examples=60)
def test_all_products_are_those_of_the_dequantized_matrix(seed, bits, T, dtype, whole_tiles, product):
    m = matrix_of(random_matrix(seed, 64 if whole_tiles else 50), bits, product, dtype)
    x = torch.randn(T, 96, generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected = exact_product(m, x)
    error = (m(x) - expected).abs().max() / expected.abs().max()
    assert m(x).dtype == dtype and error < (1e-5 if dtype == torch.float32 and product != 'kernel' else 2e-2)


@torch.no_grad()
@given(seeds, bits_, st.sampled_from(['kernel', 'torch', 'definition']))
def test_each_token_is_multiplied_by_the_matrix_of_its_expert(seed, bits, product):
    m = matrix_of(torch.stack([random_matrix(seed + e) for e in range(3)]), bits, product)
    x, expert = random_matrix(seed + 3, 9), torch.tensor([2, 0, 3, 2, 2, 3, 0, 2, 2])       # 3: 'skip'
    y = m(x, expert)
    for t, e in enumerate(expert.tolist()):
        expected = torch.zeros(64, dtype=torch.float64) if e == 3 else exact_product(m, x[t], e)
        assert (y[t] - expected).norm() <= 0.02 * expected.norm()


@torch.no_grad()
@given(seeds, bits_)
def test_torch_s_head_keeps_more_precision_than_a_bf16_input(seed, bits):
    m = matrix_of(random_matrix(seed), bits, 'torch', torch.bfloat16, Embedding)
    x = random_matrix(seed + 1, 16)                                             # float32, as from the last norm
    error = lambda y: (y - exact_product(m, x)).norm()
    assert error(m.head(x)) < 0.9 * error(Matrix.forward(m, x.bfloat16()))      # each rounds its sums to bf16


@torch.no_grad()
@given(seeds, bits_)
def test_embeddings_are_rows_of_the_dequantized_matrix(seed, bits):
    m = matrix_of(random_matrix(seed, 50), bits, kind=Embedding)
    chosen = torch.tensor([[0, 49, 7], [8, 7, 31]])
    assert torch.equal(m(chosen), dequantize(**m.codes())[chosen])


@torch.no_grad()
@given(seeds, bits_, st.sampled_from([(32, 64, 16), (32, 60, 10)]))
def test_a_joined_matrix_concatenates_the_outputs(seed, bits, outs):
    parts = [matrix_of(random_matrix(seed + i, out), bits, 'definition') for i, out in enumerate(outs)]
    x = random_matrix(seed, 3)
    expected = torch.cat([m(x) for m in parts], -1)
    torch.testing.assert_close(joined(parts)(x), expected)
    torch.testing.assert_close(torch.cat([m(x) for m in parts], -1), expected)


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
@pytest.mark.parametrize('product', ['kernel', 'torch'])
def test_a_quantized_folder_equals_the_model_with_dequantized_weights(
        folder, tmp_path, monkeypatch, capfd, bits, product):
    quantize_folder(folder, tmp_path / 'out', bits)
    monkeypatch.setattr(quantize, 'why_slower', lambda *_: 'it is slower' if product == 'torch' else None)
    plain, quantized = dequantized(folder, tmp_path / 'out', bits)
    assert ('it is slower' in capfd.readouterr().err) == (product == 'torch')
    close = {'atol': 2e-3, 'rtol': 1e-3} if product == 'torch' else {'atol': 0.1, 'rtol': 0.01}     # x in int8
    idx = tokens(3, 20, vocab_size=320)
    torch.testing.assert_close(quantized(idx)[0], plain(idx)[0], **close)
    caches = [model.make_cache(3, 30) for model in (plain, quantized)]
    steps = [decode.folded(model) for model in (plain, quantized)]
    for model, cache in zip((plain, quantized), caches):
        model(idx, cache=cache)
    for t in range(4):
        new = tokens(3, seed=t, vocab_size=320)
        a, b = (step(cache, new) for step, cache in zip(steps, caches))
        torch.testing.assert_close(b, a, **close)
    own = {name: t for name, t in from_pretrained(folder).state_dict().items() if 'router' in name or 'conv' in name}
    kept = quantized.state_dict()
    assert own and all(torch.equal(t, kept[name]) for name, t in own.items())


@torch.no_grad()
def test_the_kernel_multiplies_by_every_matrix(folder, tmp_path, monkeypatch):
    quantize_folder(folder, tmp_path / 'out', 4)
    model, calls, right = from_pretrained(tmp_path / 'out'), [], quantize.int4.product
    monkeypatch.setattr(quantize.int4, 'product', lambda *arguments: (calls.append(1), right(*arguments))[1])
    monkeypatch.setattr(Matrix, 'codes', None)                  # which `weight` and torch's operators need
    step, cache = decode.in_pytorch(model), model.make_cache(2, 30)
    prompt, new = tokens(2, 5, vocab_size=320), tokens(2, vocab_size=320)
    for run in (lambda: model(prompt, cache=cache), lambda: step(cache, new)):
        calls.clear()
        run()
        assert len(calls) == 4 * model.config.n_layer + 1       # CCA's two, the experts' two; the head


@torch.no_grad()
@given(seeds, bits_, st.sampled_from([(4, 1), (4, 2), (2, 2), (6, 2)]),
       st.sampled_from([torch.float32, torch.bfloat16]),
       st.lists(st.sampled_from([1, 2, 60, 255, 256, 257, 600]), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_the_decode_kernel_equals_the_step_in_pytorch(seed, bits, heads, dtype, lengths):
    model = tiny_model(seed, n_embd=64, head_dim=32, n_head=heads[0], n_kv_head=heads[1], expert_dim=32, n_layer=2,
                       skip_expert=True, context=1024, router_dim=16)
    for router in model.routers:
        router.balancing_bias[-1] = 0                           # so that some tokens are skipped
    if dtype == torch.bfloat16:                                 # no folded weight is rounded: 4 W, and no bias
        for name, p in model.named_parameters():
            p.copy_(p if 'router.norm' not in name and 'residual.' not in name else torch.ones(()))
            p.mul_('residual.' not in name or 'bias' not in name)
    model, B = model.to(dtype), len(lengths)
    exact = quantized(copy.deepcopy(model).float(), bits)       # PyTorch would also round between the products
    model = quantized(model, bits)
    assert decode.kernel_fits(model)
    caches, generator = [model.make_cache(B, 700) for _ in range(2)], torch.Generator().manual_seed(seed)
    for tensors in zip(*(cache.k + cache.v + cache.qk + cache.v_last for cache in caches)):
        value = torch.randn(tensors[0].shape, generator=generator)
        for t in tensors:
            t.copy_(value)
    for cache in caches:
        cache.lengths = list(lengths)
    steps, close = (decode.by_kernel(model), decode.in_pytorch(exact)), 1e-3 if dtype == torch.float32 else 0.02
    for t in range(3):
        new = tokens(B, seed=t, vocab_size=model.config.vocab_size)
        a, b = (step(cache, new) for step, cache in zip(steps, caches))
        assert (a - b).norm() < close * b.norm(), t
    for name in 'k', 'v', 'qk', 'v_last':
        for a, b in zip(getattr(caches[0], name), getattr(caches[1], name)):
            assert (a - b).norm() < close * b.norm()


@torch.no_grad()
@pytest.mark.parametrize('broken', [0, 9, 270])
def test_a_key_that_is_not_finite_makes_the_logits_so(broken):
    model = quantized(tiny_model(n_embd=64, head_dim=32, expert_dim=32, context=1024, skip_expert=True), 4)
    cache = model.make_cache(2, 400)
    cache.lengths = [300, 300]
    for t in cache.k + cache.v:
        t.normal_()
    cache.k[0][1, :, broken] = torch.nan
    logits = decode.by_kernel(model)(cache, torch.tensor([1, 2]))
    assert logits[0].isfinite().all() and not logits[1].isfinite().any()


@torch.no_grad()
def test_a_decode_step_refuses_a_cache_of_another_batch_or_dtype():
    model = quantized(tiny_model(n_embd=64, head_dim=32, expert_dim=32, skip_expert=True), 8)
    step = decode.by_kernel(model)
    with pytest.raises(ValueError, match='2 tokens of a model'):
        step(model.make_cache(1, 9), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match='bfloat16'):
        step(Cache(model.config, 1, 9, dtype=torch.bfloat16), torch.tensor([1]))


def test_a_decode_kernel_with_wrong_results_is_not_used(monkeypatch, capsys):
    model = quantized(tiny_model(n_embd=64, head_dim=32, expert_dim=32, skip_expert=True), 4)
    assert decode.folded(model).__qualname__.startswith('by_kernel')
    decode.kernel_agrees.cache_clear()
    library = decode.int4.load()
    monkeypatch.setattr(decode.int4, 'load', lambda: SimpleNamespace(product=library.product, decode=lambda *_: None))
    assert decode.folded(model).__qualname__.startswith('in_pytorch')
    assert 'decoding runs without kernels/decode.cpp' in capsys.readouterr().err
    decode.kernel_agrees.cache_clear()


def as_format_1(folder, to, bits):
    """Copy a quantized folder as quantize.py wrote it before it interleaved codes."""
    shutil.copytree(folder, to)
    (path,) = to.glob('*.safetensors')
    tensors, old = safetensors.load_file(path), {}
    for name, t in tensors.items():
        if not name.endswith('.blocks'):
            old |= {name: t} if name.removesuffix('scale') + 'blocks' not in tensors else {}
            continue
        base = name.removesuffix('.blocks')
        for e in range(len(t)) if t.ndim == 4 else [()]:
            codes, scale, offset = separate(t[e])
            if bits == 8:
                scale, offset = tensors[f'{base}.scale'][e][:, None], None
            else:
                codes = codes[:, ::2] | codes[:, 1::2] << 4
            for part, value in ('codes', codes), ('scale', scale), ('offset', offset):
                if value is not None:
                    old[f'{base}.{e}.{part}'.replace('.()', '')] = value.contiguous()
    safetensors.save_file(old, path)
    index, config = (to / name for name in ('model.safetensors.index.json', 'config.json'))
    index.write_text(json.dumps({'weight_map': dict.fromkeys(old, path.name)}))
    content = json.loads(config.read_text())
    assert content['nanozaya_quantization'].pop('format') == 2
    config.write_text(json.dumps(content))
    return old


@pytest.mark.parametrize('bits', [4, 8])
def test_a_folder_of_format_1_has_the_same_model(folder, tmp_path, bits):
    quantize_folder(folder, tmp_path / 'new', bits)
    old = as_format_1(tmp_path / 'new', tmp_path / 'old', bits)
    assert any(name.endswith('down_proj.3.codes') for name in old)
    a, b = (from_pretrained(tmp_path / name).state_dict() for name in ('new', 'old'))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_quantized_folders_are_read_like_any_other(folder, tmp_path, monkeypatch, capsys):
    for bits in 8, 4:
        _, message = run_script(monkeypatch, capsys, 'quantize.py', folder, tmp_path / f'{bits}', f'--bits={bits}')
        assert message is None and not (tmp_path / f'{bits}.unfinished').exists()
        out, message = run_script(monkeypatch, capsys, 'sample.py', f'--ckpt={tmp_path}/{bits}', '--prompt=What',
                                  '--max_new_tokens=5', '--device=cpu')
        assert message is None and out.startswith('What')
        _, message = run_script(monkeypatch, capsys, 'sample.py', f'--ckpt={tmp_path}/{bits}', '--prompt=a',
                                '--compile=True', '--device=cpu')
        assert message == 'sample.py: a quantized model is not compiled, its products are faster as they are: ' \
            'leave out --compile'
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
