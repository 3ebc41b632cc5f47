"""Equality to `transformers`' ZayaForCausalLM: a tiny one with random parameters, saved, and loaded by ours."""
import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from runtime.pretrained import from_pretrained, released_name, save_pretrained
from common import randomize, tokens
from evidence.full_size import cache_of
from model import ZayaConfig, sizes

transformers = pytest.importorskip('transformers')
safetensors = pytest.importorskip('safetensors.torch')

SHAPES = {                                      # query heads, KV heads, head dim, experts, layers
    'the 8B proportions': dict(num_attention_heads=8, num_key_value_heads=2, head_dim=16, num_experts=16),
    'one KV head': dict(num_attention_heads=4, num_key_value_heads=1, head_dim=8, num_experts=4),
    'four KV heads': dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8, num_experts=5),
    'three KV heads, no grouping': dict(num_attention_heads=3, num_key_value_heads=3, head_dim=12, num_experts=3),
}


def make_reference(folder, seed=1, dtype=torch.float32, shards=None, **shape):
    sizes = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, moe_intermediate_size=24, router_hidden_size=16,
                 max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = transformers.ZayaConfig(**sizes | shape)
    reference = randomize(transformers.ZayaForCausalLM(config), seed).to(dtype).eval()
    for layer in reference.model.layers:        # float32 in released checkpoints; .to() rounded them
        layer.mlp.gate.balancing_biases = layer.mlp.gate.balancing_biases.float()
        layer.mlp.gate.balancing_biases[-1] = layer.mlp.gate.balancing_biases.max()     # 'skip' is chosen sometimes
    reference.save_pretrained(folder, **({'max_shard_size': shards} if shards else {}))
    return reference


@pytest.fixture(scope='module', params=SHAPES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('reference')
    return make_reference(folder, **SHAPES[request.param]), from_pretrained(folder)


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize('B, S', [(1, 1), (2, 2), (3, 17), (2, 64)])
def test_logits_equal_the_reference(pair, B, S):
    reference, model = pair
    idx = tokens(B, S, vocab_size=97)
    assert_close(model(idx)[0], reference(idx).logits)


@torch.no_grad()
def test_the_skip_class_is_used_in_these_tests(pair):
    _, model = pair
    classes = []
    hooks = [r.register_forward_hook(lambda module, args, out: classes.append(out[0])) for r in model.routers]
    model(tokens(4, 64, vocab_size=97))
    for hook in hooks:
        hook.remove()
    share = (torch.stack(classes) == model.config.n_expert).float().mean()
    assert 0 < share < 1


@torch.no_grad()
@pytest.mark.parametrize('chunks', [[1] * 9, [5, 4], [1, 7, 1], [2, 3, 1, 1, 2]])
def test_cached_logits_equal_the_reference(pair, chunks):
    reference, model = pair
    idx = tokens(2, sum(chunks), vocab_size=97)
    cache = model.make_cache(2, sum(chunks))
    ours = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, 1)], 1)
    assert_close(ours, reference(idx).logits)
    past, theirs = {}, []                                                       # and to their cached path
    for part in idx.split(1, 1):
        out = reference(part, use_cache=True, **past)
        past = cache_of(reference, out)
        theirs.append(out.logits)
    assert_close(ours, torch.cat(theirs, 1))


@torch.no_grad()
@pytest.mark.parametrize('lengths', [[1, 7, 4], [2, 2, 9], [5, 1, 1]])
def test_right_padded_prompts_equal_the_left_padded_reference(pair, lengths):
    """The reference itself is wrong after right-padded prompts, whose convolution state is that of the padding."""
    reference, model = pair
    longest, steps = max(lengths), 3
    prompts = [1 + tokens(n, seed=n, vocab_size=96) for n in lengths]           # 0 is the padding token
    right, left = (torch.stack([torch.cat([prompt, torch.zeros(longest - len(prompt), dtype=torch.int64)][::order])
                                for prompt in prompts]) for order in (1, -1))
    cache, mask = model.make_cache(len(lengths), longest + steps), left.ne(0).long()
    ours = model(right, cache=cache, n_new=lengths, last_only=True)[0]
    out = reference(left, attention_mask=mask, use_cache=True)
    assert_close(ours[:, -1], out.logits[:, -1])
    for step in range(steps):
        new, mask = 1 + tokens(len(lengths), 1, seed=step, vocab_size=96), F.pad(mask, (0, 1), value=1)
        out = reference(new, attention_mask=mask, use_cache=True, **cache_of(reference, out))
        assert_close(model(new, cache=cache)[0], out.logits)


@pytest.mark.parametrize('S', [1, 33])
def test_gradients_equal_the_reference(pair, S):
    reference, model = pair
    # No token 0: it is the padding token of the reference, whose embedding gets no gradient.
    idx, targets = 1 + tokens(2, S, vocab_size=96), tokens(2, S, seed=1, vocab_size=97)
    reference.zero_grad()
    model.zero_grad()
    theirs = F.cross_entropy(reference(idx).logits.flatten(0, 1), targets.flatten())
    _, ours = model(idx, targets)
    assert_close(ours, theirs)
    theirs.backward()
    ours.backward()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    # Absolute tolerance: with S = 1 the softmax is over a single key, and the gradients of q and k are rounding errors.
    rounding = 1e-7 * torch.stack([g.norm() for g in grads.values()]).norm()
    for name, p in model.named_parameters():
        theirs = grads[released_name(name)]
        assert (p.grad - theirs).norm() <= 1e-3 * theirs.norm() + rounding, name


def test_counts_equal_the_reference_at_8b():
    with torch.device('meta'):
        reference = transformers.ZayaForCausalLM(transformers.ZayaConfig())
    count = sum(p.numel() for p in reference.parameters())
    n = sizes(ZayaConfig.zaya1_8b())
    assert n['total'] == count == 8_840_488_784
    assert n['active'] == 753_608_528
    assert n['mha_kv_bytes'] == 8 * n['kv_bytes']


# ---- files ----

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shards', [None, '50KB'])
def test_save_pretrained_writes_the_same_bits(tmp_path, dtype, shards):
    make_reference(tmp_path / 'a', dtype=dtype, shards=shards)
    assert os.path.exists(tmp_path / 'a' / 'model.safetensors.index.json') == bool(shards)
    save_pretrained(from_pretrained(tmp_path / 'a'), tmp_path / 'b')
    before = {}
    for file in (tmp_path / 'a').glob('*.safetensors'):
        before |= safetensors.load_file(file)
    after = safetensors.load_file(tmp_path / 'b' / 'model.safetensors')
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype, name
        assert before[name].view(torch.uint8).equal(after[name].view(torch.uint8)), name
    if not shards:                              # one file: equal bytes
        assert (tmp_path / 'a/model.safetensors').read_bytes() == (tmp_path / 'b/model.safetensors').read_bytes()


@torch.no_grad()
def test_transformers_loads_what_we_write(pair, tmp_path):
    model = copy.deepcopy(pair[1])
    for router in model.routers:                # the reference always loads the bias of 'skip' as -1
        router.balancing_bias[-1] = -1.0
    save_pretrained(model, tmp_path)
    again = transformers.ZayaForCausalLM.from_pretrained(tmp_path)
    idx = tokens(2, 9, vocab_size=97)
    assert_close(model(idx)[0], again(idx).logits)


def edit_weights(folder, change):
    path = folder / 'model.safetensors'
    tensors = safetensors.load_file(path)
    change(tensors)
    safetensors.save_file(tensors, path)


def edit_config(folder, **changes):
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path, size):
    with open(path, 'r+b') as file:
        file.truncate(size)


BROKEN = {
    'unknown tensor surplus.weight': lambda f: edit_weights(f, lambda t: t.update({'surplus.weight': torch.zeros(1)})),
    'the first is model.norm.weight': lambda f: edit_weights(f, lambda t: t.pop('model.norm.weight')),
    'model.norm.weight has shape': lambda f: edit_weights(f, lambda t: t.update({'model.norm.weight': torch.zeros(3)})),
    'model.safetensors: cannot be read': lambda f: truncate(f / 'model.safetensors', 100_000),
    "layer_types[1] is 'hybrid_sliding', it must be 'hybrid'":
        lambda f: edit_config(f, layer_types=['hybrid', 'hybrid_sliding', 'hybrid']),
    'sliding_window is 128': lambda f: edit_config(f, sliding_window=128),
    'attention_bias is True': lambda f: edit_config(f, attention_bias=True),
    'rope_scaling is a dict, it must be None or False':
        lambda f: edit_config(f, rope_scaling={'rope_type': 'yarn', 'factor': 4.0}),
    'quantization_config is a dict': lambda f: edit_config(f, quantization_config={'quant_method': 'fp8'}),
    "rope_parameters.hybrid.rope_type is 'linear'":
        lambda f: edit_config(f, rope_parameters={'hybrid': {'rope_type': 'linear', 'factor': 2.0}}),
    "model_type is 'llama'": lambda f: edit_config(f, model_type='llama'),
    'config.json: is not valid JSON': lambda f: truncate(f / 'config.json', 50),
    'config.json: cannot be read': lambda f: (f / 'config.json').unlink(),
    'weights file model.safetensors is missing': lambda f: (f / 'model.safetensors').unlink(),
    "num_hidden_layers is '3', it must be a whole number": lambda f: edit_config(f, num_hidden_layers='3'),
    'rope_parameters.hybrid is missing': lambda f: edit_config(f, rope_parameters={'rope_theta': 1e4}),
    'n_head (7) must be a multiple': lambda f: edit_config(f, num_attention_heads=7),
}


@pytest.mark.parametrize('message', BROKEN)
def test_a_broken_folder_gets_one_clear_error(tmp_path, message):
    make_reference(tmp_path)
    BROKEN[message](tmp_path)
    with pytest.raises(ValueError) as error:
        from_pretrained(tmp_path)
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('value', [False, None])
def test_rope_scaling_may_be_off(tmp_path, value):
    make_reference(tmp_path / 'a')
    edit_config(tmp_path / 'a', rope_scaling=value)
    save_pretrained(from_pretrained(tmp_path / 'a'), tmp_path / 'b')
    transformers.ZayaForCausalLM.from_pretrained(tmp_path / 'b')                # which refuses False


def test_saving_into_a_sharded_folder_replaces_its_weights(tmp_path):
    make_reference(tmp_path, shards='50KB')
    model = from_pretrained(tmp_path)
    with torch.no_grad():
        model.norm.weight.fill_(7)
    save_pretrained(model, tmp_path)
    assert from_pretrained(tmp_path).norm.weight.eq(7).all()
    assert json.loads((tmp_path / 'config.json').read_text())['eos_token_id'] == 2   # kept, although unused


def test_a_missing_shard_is_named(tmp_path):
    make_reference(tmp_path, shards='50KB')
    shard = sorted(tmp_path.glob('*.safetensors'))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        from_pretrained(tmp_path)


def test_loading_needs_little_more_memory_than_the_model(tmp_path):
    """With bf16 weights of about 220 MB, a fresh process must grow by less than 1.5 times their size."""
    make_reference(tmp_path, dtype=torch.bfloat16, vocab_size=2000, hidden_size=512, moe_intermediate_size=1024,
                   num_experts=16, num_hidden_layers=4)
    size = os.path.getsize(tmp_path / 'model.safetensors')
    assert size > 150e6
    program = ('import resource, sys, torch, safetensors.torch; from runtime.pretrained import from_pretrained\n'
               'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n'
               'before = peak(); from_pretrained(sys.argv[1]); print(peak() - before)')
    out = subprocess.run([sys.executable, '-c', program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 1.5 * size
