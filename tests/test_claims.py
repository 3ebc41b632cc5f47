"""The claim scripts: baselines and ablations are what they are called, and a table is resumed."""
import math

import pytest
import torch

from bench import TINY
from cache import Cache
from cca import CCA, rope, rope_table
from common import ROOT, randomize, run_script
from data.prepare import prepare
from evidence import attention, cca_parts, claims, kv_cache, residual
from layers import ResidualScaling
from model import Zaya, ZayaConfig
from optim import make_optimizers

SCRIPTS = {'attention': attention, 'cca_parts': cca_parts, 'kv_cache': kv_cache, 'residual': residual}
MODELS = attention.MODELS | cca_parts.ABLATIONS


def layer(name):
    """An attention module with random weights, and its config."""
    module, config = MODELS[name]
    return randomize(module(config, 0)), config


def angles(config, positions):
    return rope_table(positions, config.rope_dim, config.rope_base)


# ---- verdicts ----

def test_a_paired_interval_equals_one_by_hand():
    mean, half = claims.paired([1.0, 2.0, 3.0], [2.0, 2.5, 4.5])            # -1, -0.5, -1.5: deviation 0.5
    assert mean == -1 and half == pytest.approx(4.303 * 0.5 / math.sqrt(3))
    assert claims.paired([1.0], [3.0]) == (-2, math.inf)


SAME = 'no significant difference'


@pytest.mark.parametrize('a, b, word, needed', [
    ([1.0, 1.1, 1.0], [2.0, 2.0, 2.1], 'reproduced', None),
    ([2.0, 2.0, 2.1], [1.0, 1.1, 1.0], 'contradicted at this size', None),
    ([1.0, 2.0], [1.5, 2.6], SAME, 3),                          # half: 12.71 * 0.0707 / sqrt(2) = 0.64 > 0.55
    ([1.0, 1.0, 1.0], [2.0, 1.0, 1.2], SAME, 10),               # 2.262 * 0.529 / sqrt(10) = 0.38 < 0.4
    ([1.0], [2.0], SAME, None)])
def test_a_verdict_needs_an_interval_without_zero(a, b, word, needed):
    assert claims.verdict(a, b) == word + (f'; underpowered: {needed} seeds would resolve it' if needed else '')


@pytest.mark.parametrize('a, b, text', [
    ([1.0, 2.0, 3.0], [2.0, 2.5, 4.5], '-1.0 ± 1.2 nats'), ([0, 100, 200], [3000, 3050, 3300], '-3,017 ± 190 nats'),
    ([1.0, 1.001], [2.0, 2.0], '-0.9995 ± 0.0064 nats'), ([1.0, 1.0], [2.0, 2.0], '-1.00 ± 0.00 nats'),
    ([1.0], [3.0], '-2.00 ± inf nats')])
def test_a_difference_has_two_significant_digits_of_its_interval(a, b, text):
    assert claims.below('a below b', a, b, 'nats')[:2] == ('a below b', text)


@pytest.mark.parametrize('values, form, text', [
    ([1.0, 2.0, 3.0], '.1f', '2.0 ± 1.0'), ([1.0, 1.01], '.1f', '1.0'), ([1500], ',.0f', '1,500')])
def test_a_spread_is_mean_and_standard_deviation(values, form, text):
    assert claims.spread(values, form) == text


def test_a_table_is_markdown(capsys):
    claims.print_table(['a', 'b'], [[1, 'x'], [2, '']])
    assert capsys.readouterr().out == '| a | b |\n| --- | --- |\n| 1 | x |\n| 2 |  |\n\n'


# ---- what is compared ----

@pytest.mark.parametrize('name', MODELS)
def test_every_attention_is_causal_and_reads_all_past_tokens(name):
    (attn, config), x = layer(name), torch.randn(2, 9, 128)
    x.requires_grad_()
    attn(x, *angles(config, torch.arange(9)[None]))[:, 5].square().sum().backward()
    seen = x.grad.abs().sum((0, 2)) > 0
    assert seen.tolist() == [True] * 6 + [False] * 3


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_every_attention_keeps_packed_documents_apart(name):
    (attn, config), x = layer(name), torch.randn(1, 9, 128)
    start = torch.arange(9)[None] % 4 == 0
    document, position = start.cumsum(1), torch.arange(9)[None] % 4
    mask = ((document[:, None] == document[..., None]) & (torch.arange(9) <= torch.arange(9)[:, None]))[:, None]
    packed = attn(x, *angles(config, position), mask, start)
    alone = attn(x[:, 4:8], *angles(config, torch.arange(4)[None]))
    torch.testing.assert_close(packed[:, 4:8], alone, atol=1e-4, rtol=1e-4)


def test_compared_models_have_equally_many_parameters_within_one_percent():
    counts = {name: attention.count_parameters(config, module) for name, (module, config) in MODELS.items()}
    assert max(counts.values()) <= 1.01 * attention.count_parameters(attention.BASE, CCA), counts
    assert min(counts.values()) >= 0.99 * attention.count_parameters(attention.BASE, CCA), counts


def test_compared_models_cache_as_many_elements_per_token_as_the_table_says():
    elements = {name: 2 * config.n_kv_head * config.head_dim for name, (_, config) in attention.MODELS.items()}
    assert elements == {'MHA': 256, 'GQA': 32, 'MLA': 32, 'CCA': 32, 'CCGQA': 32}
    module, config = MODELS['MLA']
    assert module(config, 0).down_proj.out_features == 32       # c and k_R, from which keys and values are projected


@torch.no_grad()
def test_the_ablation_with_all_parts_equals_cca():
    attn, config = layer('+ QK-mean')
    cca, x = CCA(config, 0), torch.randn(2, 9, 128)
    cca.load_state_dict(attn.state_dict())
    assert torch.equal(attn(x, *angles(config, torch.arange(9)[None])), cca(x, *angles(config, torch.arange(9)[None])))


@torch.no_grad()
def test_the_ablation_without_parts_is_plain_attention_in_the_latent():
    (attn, config), x = layer('none'), torch.randn(2, 9, 128)
    assert not [name for name, _ in attn.named_parameters() if 'conv' in name]
    plain = attention.GQA(config, 0)
    plain.qkv_proj.weight.copy_(torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight,
                                           attn.v_proj_delayed.weight]))
    plain.o_proj.weight.copy_(attn.o_proj.weight)
    plain.temperature.copy_(attn.temperature)
    table = angles(config, torch.arange(9)[None])
    torch.testing.assert_close(attn(x, *table), plain(x, *table), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_each_ablation_adds_a_part():
    x, outputs = torch.randn(2, 9, 128), []
    whole = layer('+ QK-mean')[0].state_dict()
    for name in cca_parts.ABLATIONS:
        attn, config = layer(name)
        attn.load_state_dict({key: whole[key] for key in attn.state_dict()})
        outputs.append(attn(x, *angles(config, torch.arange(9)[None])))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(outputs, outputs[1:]))


@pytest.mark.parametrize('config', [TINY, ZayaConfig(n_head=8, n_kv_head=2)])
def test_bytes_of_the_caches_are_those_of_their_tensors(config):
    cache = Cache(config, 1, 23)                                # one more position, for padding
    kv, constant, mha = kv_cache.cache_bytes(config, 24)
    assert kv == cache.k[0].nbytes + cache.v[0].nbytes and constant == cache.qk[0].nbytes + cache.v_last[0].nbytes
    assert mha == sum(t.nbytes for t in kv_cache.mha_cache(config, 24))


@torch.no_grad()
def test_the_multi_head_layer_s_cached_token_equals_the_whole():
    mha, x, table = kv_cache.MHA(TINY), torch.randn(2, 6, 32), rope_table(torch.arange(6)[None], 4, 1e4)
    whole = mha(x, *table)
    q, k, v = mha.qkv(x).unflatten(-1, (3, -1, 8)).permute(2, 3, 0, 1, 4)       # (H, B, S, d)
    cache = [rope(k, *table).transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()]
    for t in cache:
        t[:, :, -1] = float('nan')                              # must be filled in from the last token
    last = mha(x[:, -1:], *(t[:, -1:] for t in table), cache)
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-5, rtol=1e-4)


def test_residual_scaling_starts_as_a_plain_sum():
    x, f = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.equal(residual.PlainSum(8)(x, f), ResidualScaling(8)(x, f))
    assert not list(residual.PlainSum(8).parameters())


def test_gradient_norms_are_logged_per_layer_at_the_first_and_every_nth_step(tmp_path):
    model, path = Zaya(TINY), tmp_path / 'gradients.txt'
    optimizers = residual.log_gradient_norms(path, 3)(model, 1e-2)
    assert list(map(type, optimizers)) == list(map(type, make_optimizers(model, 1e-2)))
    for step in range(1, 7):
        for i, module in enumerate(model.layers):
            for name, p in module.named_parameters():           # residual scaling is excluded
                p.grad = torch.full_like(p, 9.0 * ('residual' in name))
            module.attn.o_proj.weight.grad.view(-1)[:2] = step * torch.tensor([3.0, 4.0]) * (i + 1)
        for optimizer in optimizers:
            optimizer.step()
    assert path.read_text().splitlines() == ['5 10', '15 30', '30 60']


# ---- the scripts ----

@pytest.fixture(scope='module')
def dataset_512(tmp_path_factory):
    """Return a dataset like runs/stdlib512, of this project's files."""
    folder = tmp_path_factory.mktemp('dataset_512')
    prepare([(path.name, path.read_bytes()) for path in sorted(ROOT.glob('*.py'))], folder, vocab_size=512)
    return folder


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_quick_table_has_a_verdict_and_is_not_measured_twice(name, dataset_512, tmp_path, monkeypatch, capsys):
    script, config = SCRIPTS[name], claims.ClaimConfig(seeds=1, quick=True, out=str(tmp_path))
    monkeypatch.setitem(attention.SETTINGS, 'dataset', str(dataset_512))
    monkeypatch.setattr(attention, 'RATES', [1e-2])
    monkeypatch.setattr(residual, 'SIZES', ZayaConfig(**vars(residual.SIZES) | {'n_layer': 3, 'context': 16}))
    script.main(config)
    table = (tmp_path / f'quick_{name}.csv').read_text()
    assert 'no significant difference' in capsys.readouterr().out and len(table.splitlines()) > 2
    for module, function in (attention, 'train_run'), (residual, 'train_run'), (kv_cache, 'alternate'):
        monkeypatch.setattr(module, function, lambda *args, **kwargs: pytest.fail('measured again'))
    script.main(config)
    assert (tmp_path / f'quick_{name}.csv').read_text() == table
    assert not (claims.RESULTS / f'quick_{name}.csv').exists()


@pytest.mark.parametrize('name', SCRIPTS)
def test_bad_arguments_get_one_line(name, monkeypatch, capsys):
    assert 'seeds' in run_script(monkeypatch, capsys, f'evidence.{name}', '--seeds=0')[1]


def test_a_table_returns_the_requested_seeds_only(tmp_path):
    config = claims.ClaimConfig(seeds=3, quick=True, out=str(tmp_path))
    measure = lambda setting, seed: {'figure': float(seed)}
    assert len(claims.fill_table('some', config, ['a', 'b'], measure)) == 6
    fewer = claims.fill_table('some', claims.ClaimConfig(seeds=2, quick=True, out=str(tmp_path)), ['a', 'b'], measure)
    assert [(row['setting'], row['seed']) for row in fewer] == [('a', '0'), ('b', '0'), ('a', '1'), ('b', '1')]
