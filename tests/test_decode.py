"""decode.py equals the plain cached forward pass."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

import decode
from common import HAS_COMPILER, tiny_model, tokens
from sample import SamplingOptions, generate

seeds = st.integers(0, 10**6)


def plain(model, cache, next_tokens):
    return model(next_tokens[:, None], cache=cache)[0][:, 0]


@torch.no_grad()
@given(seeds, st.sampled_from([(4, 1), (4, 2), (4, 4)]), st.lists(st.integers(1, 5), min_size=1, max_size=4),
       st.booleans())
def test_decoding_equals_the_plain_forward_for_rows_of_any_lengths(seed, heads, lengths, skip):
    model = tiny_model(seed, n_head=heads[0], n_kv_head=heads[1], skip_expert=skip)
    B = len(lengths)
    prompt = tokens(B, max(lengths), seed=seed)
    caches = [model.make_cache(B, 16) for _ in range(2)]
    for cache in caches:
        model(prompt, cache=cache, n_new=lengths)
    step = decode.folded(model)
    for t in range(4):
        if t == 2 and B > 1:                                                    # a row leaves
            for cache in caches:
                cache.keep(list(range(B - 1, 0, -1)))
        new = tokens(len(caches[0].lengths), seed=seed + t)
        a, b = step(caches[0], new), plain(model, caches[1], new)
        assert (a - b).abs().max() < 1e-4 * max(1, b.abs().max())
    assert_same_contents(*caches)


def assert_same_contents(a, b):
    assert a.lengths == b.lengths
    for name in 'k', 'v', 'qk', 'v_last':
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_decoding_may_begin_with_an_empty_cache():
    model = tiny_model()
    a, b = model.make_cache(2, 4), model.make_cache(2, 4)
    for t in range(4):
        new = tokens(2, seed=t)
        assert (decode.folded(model)(a, new) - plain(model, b, new)).abs().max() < 1e-4


@torch.no_grad()
def test_decoding_in_bf16_is_close_to_float32():
    results = []
    for model in tiny_model(), tiny_model().bfloat16():
        cache, prompt = model.make_cache(3, 9), tokens(3, 8)
        model(prompt, cache=cache)
        results.append(decode.folded(model)(cache, tokens(3, seed=1)))
    assert (results[0] - results[1]).norm() / results[0].norm() < 0.1


@torch.no_grad()
@pytest.mark.parametrize('lengths', [[5, 5], [3, 5]])
def test_decoding_works_under_autocast(lengths):
    """As train.py's samples need it on a GPU."""
    model, results = tiny_model(), []
    for autocast in False, True:
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            cache = model.make_cache(2, 9)
            model(tokens(2, 5), cache=cache, n_new=lengths)
            for t in range(3):
                logits = decode.folded(model)(cache, tokens(2, seed=t))
        results.append(logits)
    assert (results[0] - results[1]).norm() / results[0].norm() < 0.1


@torch.no_grad()
def test_a_full_cache_says_so():
    model = tiny_model()
    cache = model.make_cache(1, 3)
    model(tokens(1, 3), cache=cache)
    for step in decode.folded(model), decode.compiled(model):
        with pytest.raises(ValueError, match='capacity'):
            step(cache, tokens(1))


@torch.no_grad()
@given(seeds, st.integers(0, 4))
def test_one_token_s_expert_equals_sorted_experts(seed, expert):
    experts = tiny_model(seed, skip_expert=True).layers[0].moe.experts          # 4, and class 4 is 'skip'
    g = torch.Generator().manual_seed(seed)
    x, weight, expert = torch.randn(1, 32, generator=g), torch.rand(1, generator=g), torch.tensor([expert])
    torch.testing.assert_close(decode.one_expert(experts, x, expert, weight), experts(x, expert, weight))


def test_onednn_is_put_back_whatever_happens():
    assert torch.backends.mkldnn.enabled
    with pytest.raises(KeyError), decode.without_onednn(True):
        assert not torch.backends.mkldnn.enabled
        raise KeyError
    assert torch.backends.mkldnn.enabled
    first, second = decode.without_onednn(True), decode.without_onednn(True)    # of two threads
    first.__enter__(), second.__enter__(), first.__exit__(None, None, None)
    assert not torch.backends.mkldnn.enabled
    second.__exit__(None, None, None)
    assert torch.backends.mkldnn.enabled


# ---- compiled ----

@pytest.mark.skipif(not torch.cuda.is_available(), reason='CUDA graphs need a GPU')
def test_a_recorded_step_gives_plain_generation_s_tokens_from_any_cache():
    model = tiny_model(0, skip_expert=True).cuda()
    for seed in range(3):                                       # each call makes a cache of its own
        prompts = tokens(3, 5, seed=seed).tolist()
        plain, recorded = (generate(model, prompts, 12, SamplingOptions(temperature=0), step=make(model))
                           for make in (decode.folded, decode.compiled))
        assert plain == recorded


@torch.no_grad()
@given(seeds, st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_gathered_experts_equal_sorted_experts(seed, expert):
    experts = tiny_model(seed, skip_expert=True).layers[0].moe.experts          # 4, and class 4 is 'skip'
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(len(expert), 32, generator=g), torch.rand(len(expert), generator=g)
    expert = torch.tensor(expert)
    torch.testing.assert_close(decode.GatheredExperts(experts)(x, expert, weight), experts(x, expert, weight))


@torch.no_grad()
@given(seeds, st.sampled_from([(4, 1), (4, 2), (4, 4)]), st.lists(st.integers(1, 5), min_size=1, max_size=4),
       st.integers(8, 20))
def test_looking_at_the_whole_capacity_changes_nothing(seed, heads, lengths, capacity):
    """What is compiled, not compiled: the same step over shapes that do not change."""
    model = tiny_model(seed, n_head=heads[0], n_kv_head=heads[1], skip_expert=True)
    prompt = tokens(len(lengths), max(lengths), seed=seed)
    caches = [model.make_cache(len(lengths), capacity) for _ in range(2)]
    for cache in caches:
        model(prompt, cache=cache, n_new=lengths)
    with torch.compiler.set_stance('force_eager'):
        step = decode.compiled(model)
        for t in range(3):
            new = tokens(len(lengths), seed=seed + t)
            a, b = step(caches[0], new), plain(model, caches[1], new)
            assert (a - b).abs().max() < 1e-4 * max(1, b.abs().max())
            shapes = {tuple(k.shape) for k in caches[0].k}
            assert shapes == {(len(lengths), heads[1], capacity + 1, 8)}
    assert_same_contents(*caches)


@settings(max_examples=8)
@given(seeds, st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=9), min_size=2, max_size=4),
       st.sets(st.integers(0, 49), min_size=1, max_size=25), st.sampled_from([0, 1.0]))
def test_a_row_of_compiled_generation_does_not_depend_on_its_neighbours(seed, prompts, stop, temperature):
    """Whether they stop before it, or after. Not compiled: the same steps."""
    model = tiny_model(seed, n_layer=2, skip_expert=True)
    options, step = SamplingOptions(temperature, seed=seed), decode.compiled(model)
    with torch.compiler.set_stance('force_eager'):
        together = generate(model, prompts, 8, options, stop=stop, step=step)
        assert together == generate(model, prompts, 8, options, stop=stop)
        for row, prompt in enumerate(prompts):
            others = [[49 - token for token in other] for other in prompts[:row]]
            assert generate(model, [*others, prompt], 8, options, stop=stop, step=step)[row] == together[row]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason='torch.compile needs a C++ compiler on a CPU')
def test_compiled_generation_equals_plain_generation():
    """Rows of several lengths, of which some stop early. Nothing may be left over for the next model: one with other
    weights, which needs no new code, and one with another constant, which does. 23 is no power of two."""
    for seed, rope_base in (0, 10_000.0), (1, 10_000.0), (1, 100.0):
        model = tiny_model(seed, n_layer=2, skip_expert=True, rope_base=rope_base, context=23)
        prompts = [tokens(n, seed=n).tolist() for n in (9, 3, 5)]
        plain, compiled = (generate(model, prompts, 12, stop=range(20), step=make(model))
                           for make in (decode.folded, decode.compiled))
        assert compiled == plain and len(set(map(len, plain))) > 1
