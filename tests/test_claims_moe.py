"""The claim scripts on router, balancer, Markovian RSA and RL: their replacements and whole runs."""
import re
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import router
import train
from runtime.checkpoint import save_checkpoint
from common import randomize, tiny_config, tiny_model
from tasks.loops import task
from data.prepare import prepare
from data.tokenizer import save_tokenizer
from evidence import balancer, rl, rsa, rsa_cost, trimming
from evidence import router as routers
from evidence.claims import ClaimConfig, read_table, replaced
from model import Zaya

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='session')
def code(tmp_path_factory):
    """Return a small dataset."""
    folder = tmp_path_factory.mktemp('code')
    prepare([(str(i), f'def f{i}(x): return x + {i}\n'.encode() * 40) for i in range(40)], folder, 262)
    return folder


@pytest.fixture
def small_data(code, monkeypatch):
    """Replace data/stdlib by that dataset, and the prose by less of it."""
    monkeypatch.setattr(balancer.topics, 'topics', {'assert': 'The assert statement checks what must hold. ' * 50})
    opened = train.open_dataset
    monkeypatch.setattr(train, 'open_dataset', lambda dataset, *rest: opened(
        str(code) if dataset == 'data/stdlib' else dataset, *rest))


# ---- routers ----

def test_the_linear_router_is_one_matrix_and_a_softmax():
    linear = randomize(routers.Linear(tiny_config(), 1)).train()
    expert, weight, state = linear(X, 'anything')
    probs = torch.einsum('bse,ne->bsn', X, linear.out_proj.weight).softmax(-1)
    assert expert.equal((probs + linear.balancing_bias).argmax(-1)) and state is None
    torch.testing.assert_close(weight, probs.gather(-1, expert[..., None])[..., 0])
    assert linear.load.tolist() == expert.flatten().bincount(minlength=4).tolist()
    assert [name for name, _ in linear.named_parameters()] == ['out_proj.weight']


def test_without_eda_a_router_does_not_read_the_layer_below_and_starts_equal():
    alone, below = randomize(routers.NoEDA(tiny_config(), 2)), torch.randn(2, 5, 8)
    for a, b in zip(alone(X, None), alone(X, below)):
        assert a.equal(b)
    assert not alone(X, None)[2].equal(randomize(router.Router(tiny_config(), 2))(X, below)[2])
    torch.manual_seed(0)
    whole = dict(Zaya(tiny_config()).named_parameters())
    with replaced('model', Router=routers.NoEDA):
        torch.manual_seed(0)
        without = dict(Zaya(tiny_config()).named_parameters())
    assert {name for name in whole if name not in without} == {f'layers.{i}.moe.router.eda_scale' for i in (1, 2)}
    assert all(p.equal(whole[name]) for name, p in without.items())


def test_the_first_even_step_is_the_last_one_if_there_is_none():
    assert routers.even_at([10, 20, 30], [0.9, 0.96, 0.99]) == 20 and routers.even_at([10, 20], [0.9, 0.9]) == 20


# ---- the auxiliary loss ----

def test_the_auxiliary_loss_adds_the_gradient_of_its_formula_only():
    with replaced('router', choose=balancer.with_auxiliary(0.7)):
        made = randomize(router.Router(tiny_config(), 0))
    plain = randomize(router.Router(tiny_config(), 0))
    g = torch.randn(2, 5)
    expert, weight, _ = made(X)
    (weight * g).sum().backward()
    plain_expert, plain_weight, r = plain(X)
    probs = plain.out_proj(F.gelu(plain.fc2(F.gelu(plain.fc1(plain.norm(r)))))).softmax(-1)
    term = sum((plain_expert == e).float().mean() * probs[..., e].mean() for e in range(4)) * 0.7 * 4
    ((plain_weight * g).sum() + term).backward()
    assert expert.equal(plain_expert) and weight.equal(plain_weight)
    for (name, a), b in zip(made.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    with torch.no_grad():
        assert made(X)[1].equal(weight)


def test_the_auxiliary_loss_is_minimal_for_an_even_load():
    even, one = torch.arange(8) % 4, torch.zeros(8, dtype=torch.long)
    assert balancer.auxiliary(F.one_hot(even, 4).float(), even, 1.0) == 1
    assert balancer.auxiliary(F.one_hot(one, 4).float(), one, 1.0) == 4


def test_a_whole_model_with_the_auxiliary_loss_has_a_term_for_each_layer():
    with replaced('router', choose=balancer.with_auxiliary(0.5)):
        model = tiny_model().train()
    tokens = torch.arange(12).view(1, 12)
    model(tokens, tokens)[1].backward()
    plain = tiny_model().train()
    plain(tokens, tokens)[1].backward()
    for layer in range(3):
        a, b = (m.layers[layer].moe.router.out_proj.weight.grad for m in (model, plain))
        assert (a - b).abs().max() > 1e-4


# ---- changing data ----

def test_only_the_training_data_changes_and_only_from_its_step(small_data):
    before = {split: train.open_dataset('data/stdlib', split, 2, 16, 3)[0] for split in ('train', 'val')}
    changing = balancer.changing_at(7)
    after, tokenizer = changing('data/stdlib', 'train', 2, 16, 3)
    for step in 0, 6:
        assert all(a.equal(b) for a, b in zip(after.batch(step)[:2], before['train'].batch(step)))
    prose = tokenizer.encode_ordinary(''.join(balancer.topics.topics.values()))
    for step in 7, 30:
        x, y, _ = after.batch(step)
        assert x.shape == y.shape == (2, 16) and x[:, 1:].equal(y[:, :-1]) and x.equal(after.batch(step)[0])
        assert ' '.join(map(str, x[0].tolist())) in ' '.join(map(str, prose))
    held_out = changing('data/stdlib', 'val', 2, 16, 3)[0]
    assert held_out.batch(30)[0].equal(before['val'].batch(30)[0])


def test_a_summary_of_a_balancer_run():
    steps = [float(step) for step in range(2, 201, 2)]
    entropy = [0.5 if step < 20 else 0.96 if step <= 140 else 0.6 if step <= 160 else 0.96 for step in steps]
    loads = {f'load_0_{e}': (steps, [0.25 + 0.1 * (-1) ** i for i in range(100)]) for e in range(4)}
    found = balancer.summarize({'entropy': (steps, entropy), 'val_loss': ([0.0, 140.0], [8.0, 5.0])} | loads, 140)
    assert (found['even_at'], found['falls_to'], found['uneven'], found['val_loss']) == (20, 0.6, 20, 5.0)
    assert found['level'] == pytest.approx(0.96)
    assert found['swing'] == pytest.approx(0.1, rel=0.03) and found['entropy_200'] == 0.96


# ---- whole scripts ----

@pytest.fixture(scope='module')
def random_loops_model(tmp_path_factory):
    """Return a run folder of the loops task, with a tiny random model."""
    folder, model = tmp_path_factory.mktemp('loops'), tiny_model(vocab_size=task.ENC.n_vocab, context=256)
    save_checkpoint(folder, {'model': model.state_dict(), 'model_config': asdict(model.config), 'step': 1})
    save_tokenizer(folder / 'bpe.json', task.ENC)
    return str(folder)


@pytest.mark.parametrize('main, settings', [
    (routers.main, 8), (balancer.main, 6), (rsa.main_table, 4), (rsa.aggregation, 8), (trimming.main, 6),
    (rl.main_table, 9), (rl.long, 6), (rl.errors, 4), (rl.replay, 6)])
def test_a_quick_table_is_complete_and_is_not_measured_twice(main, settings, small_data, tmp_path, monkeypatch, capsys,
                                                             random_loops_model):
    monkeypatch.setattr(rl, 'MODEL', random_loops_model)
    config = ClaimConfig(seeds=1, quick=True, out=str(tmp_path))
    main(config)
    first = capsys.readouterr().out
    assert sum(len(read_table(path)) for path in tmp_path.glob('quick_*.csv')) == settings
    for program in train, rl.rl:
        monkeypatch.setattr(program, 'train', lambda *args: pytest.fail('trained again'))
    rsa.train_policy.cache_clear()
    main(config)
    again = capsys.readouterr().out
    tables = [re.search(r'^\| .*', text, re.M | re.S)[0] for text in (first, again)]
    assert tables[0] == tables[1] and len(tables[0].split('\n\n')[0].splitlines()) == settings + 2
    if main not in (rl.errors, rl.replay):                      # these have no verdicts
        assert 'no significant difference' in again             # since there is one seed


def test_each_setting_of_the_sweep_changes_one_value():
    settings = [setting.split() for setting in rsa_cost.SETTINGS if setting != rsa_cost.LONG]
    assert all(sum(a != b for a, b in zip(setting, settings[0])) == 1 for setting in settings[1:])
    assert len({tuple(setting) for setting in settings}) == len(settings) == 12
