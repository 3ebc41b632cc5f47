"""Packed sets in the loader, and mixtures of sets (data/loader.py)."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import configurator
import train
from runtime.checkpoint import load_checkpoint
from common import TINY_RUN, tiny_model, tokens as some_tokens
from data.loader import MixtureLoader, TokenLoader, dataset_folders, open_dataset
from data.prepare import prepare
from data.reasoning import write_packed
from data.tokenizer import load_tokenizer
from model import ZayaConfig


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A plain set and one packed into windows of 16, with the same tokenizer."""
    plain, packed = tmp_path_factory.mktemp('plain'), tmp_path_factory.mktemp('packed')
    prepare([(str(i), bytes([97 + i]) * 50) for i in range(20)], plain, 262)
    g = np.random.default_rng(0)
    samples = [(g.integers(0, 256, n).tolist(), (g.random(n) < 0.7).tolist()) for n in g.integers(2, 17, 60)]
    write_packed({'train': samples, 'val': samples[:9]}, packed, 16, load_tokenizer(plain / 'bpe.json'))
    return plain, packed, samples


def test_a_packed_batch_holds_its_documents_and_scores_only_their_scored_tokens(folders):
    _, packed, samples = folders
    loader = TokenLoader(packed, 'train', 1, 16, 0)
    found = []
    for index in range(loader.n_windows):
        x, y, start = (t[0].tolist() for t in loader.batch(index))
        starts = [t for t in range(16) if start[t]] + [16]
        found += [(tuple(x[a:b]), tuple(y[a:b])) for a, b in zip(starts, starts[1:])]
    wanted = []
    for tokens, scored in samples:
        targets = [token if counts else -1 for token, counts in zip(tokens[1:], scored[1:])]
        wanted.append((tuple(tokens), (*targets, -1)))
    padding = [document for document in found if set(document[0]) == {0}]
    assert all(set(y) == {-1} for _, y in padding)
    assert sorted(document for document in found if document not in padding) == sorted(wanted)


def test_a_packed_batch_has_the_loss_of_its_separate_documents(folders):
    _, packed, _ = folders
    model = tiny_model(vocab_size=262)
    x, y, start = TokenLoader(packed, 'train', 4, 16, 0).batch(1)
    with torch.no_grad():
        together, total, n = model(x, y, start)[1], 0.0, 0
        for row in range(4):
            starts = [*start[row].nonzero()[:, 0].tolist(), 16]
            for a, b in zip(starts, starts[1:]):
                scored = int((y[row, a:b] >= 0).sum())
                if scored:
                    total += model(x[row:row + 1, a:b], y[row:row + 1, a:b])[1] * scored
                    n += scored
    torch.testing.assert_close(together, total / n, atol=1e-5, rtol=1e-5)


def test_packed_windows_demand_their_own_context(folders):
    with pytest.raises(ValueError, match='windows of 16, but context is 8'):
        TokenLoader(folders[1], 'train', 1, 8, 0)


class Counter:
    """A stand-in for a TokenLoader: sequence n is [n]."""
    batch_size, context, vocab_size, n_tokens, n_windows, packed = 4, 1, 2, 1, 1, 0

    def sequence(self, position):
        return (np.array([position]),) * 3


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(0, 600), st.integers(0, 9))
def test_a_mixture_keeps_the_weights_and_skips_and_repeats_no_sequence(weights, n_batches, seed):
    seen = []
    loaders = [Counter() for _ in weights]
    for k, loader in enumerate(loaders):
        loader.sequence = lambda position, k=k: seen.append((k, position)) or (np.array([position]),) * 3
    mixture = MixtureLoader(loaders, weights, seed)
    for index in range(n_batches):
        mixture.batch(index)
    for k, weight in enumerate(weights):
        positions = [position for which, position in seen if which == k]
        assert positions == list(range(len(positions)))         # in order, none twice
        whole = len(seen) // 1000 * 1000                        # exact to 1/1000 over each full schedule
        share = sum(which == k for which, _ in seen[:whole])
        assert abs(share - whole * weight / sum(weights)) <= whole / 1000


def test_a_mixture_is_a_pure_function_of_the_index(folders):
    plain, packed, _ = folders
    one, other = (open_dataset(f'{plain}:1 {packed}:2', 'train', 3, 16, 5)[0] for _ in range(2))
    other.batch(7), other.batch(400)
    for a, b in zip(one.batch(11), other.batch(11)):
        assert torch.equal(a, b)


@pytest.mark.parametrize('bad', ['', 'a:', 'a:x', 'a:-1', 'a:0', 'a:inf'])
def test_bad_mixtures_are_refused(bad):
    with pytest.raises(ValueError, match='dataset'):
        dataset_folders(bad)


@pytest.mark.parametrize('dataset, expected', [
    ('C:/data', [('C:/data', 1)]), (r'C:\data:0.5', [(r'C:\data', 0.5)]), ('C:/a:2  D:/b', [('C:/a', 2), ('D:/b', 1)]),
    ('My Drive/data', [('My Drive/data', 1)]), ('My Drive/data:0.3 a', [('My Drive/data', 0.3), ('a', 1)]),
    ('a:2 My Drive/data', [('a', 2), ('My Drive/data', 1)]), ('b:7', [('b:7', 1)]), ('b:7:3', [('b:7', 3)]),
    ('b:x', [('b:x', 1)]), ('a My Drive/none', [('a', 1), ('My', 1), ('Drive/none', 1)]), ('s:0.3', [('s', 0.3)])])
def test_a_weight_is_a_number_after_the_last_colon_and_an_existing_folder_is_taken_whole(
        tmp_path, monkeypatch, dataset, expected):
    monkeypatch.chdir(tmp_path)
    for folder in 'My Drive/data', 'a', 'b:7', 'b:x':
        Path(folder).mkdir(parents=True)
    assert dataset_folders(dataset) == expected


def test_sets_with_different_tokenizers_do_not_mix(folders, tmp_path):
    prepare([('a', b'ab' * 50)], tmp_path, 263)
    with pytest.raises(ValueError, match='different tokenizers'):
        open_dataset(f'{folders[0]} {tmp_path}', 'train', 1, 16, 0)


@settings(max_examples=10)
@given(st.integers(0, 9), st.lists(st.sets(st.integers(1, 11), max_size=5), min_size=1, max_size=3),
       st.lists(st.booleans(), min_size=36, max_size=36))
def test_packed_windows_have_the_loss_and_gradients_of_their_separate_documents(seed, cuts, scored):
    model, B = tiny_model(seed, n_layer=2), len(cuts)
    x, y = some_tokens(B, 12, seed=seed), some_tokens(B, 12, seed=seed + 1)
    y[~torch.tensor(scored[:12 * B]).view(B, 12)] = -1
    start = torch.tensor([[t == 0 or t in of_row for t in range(12)] for of_row in cuts])
    n = max(1, int((y >= 0).sum()))

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    packed = model(x, y, start)[1]
    separate = sum(model(x[row:row + 1, a:b], y[row:row + 1, a:b])[1] * (y[row, a:b] >= 0).sum() / n
                for row, of_row in enumerate(cuts) for a, b in itertools.pairwise([0, *sorted(of_row), 12]))
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-5)
    one, other = gradients(packed), gradients(separate)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-3, msg=name)


def run(**changes):
    flags = TINY_RUN + [f'--{key}={value}' for key, value in changes.items()]
    return train.train(*configurator.read(flags, train.TrainConfig, ZayaConfig))


def test_a_mixture_trains_and_its_weights_start_a_longer_context(folders, tmp_path, capsys):
    plain, packed, samples = folders
    history = run(dataset=f'{plain}:0.3 {packed}:0.7', out_dir=tmp_path / 'short')
    assert len(history) == 4 and all(np.isfinite(loss) for loss in history.values())
    longer = tmp_path / 'packed_64'
    write_packed({'train': samples, 'val': samples[:9]}, longer, 64, load_tokenizer(plain / 'bpe.json'))
    run(dataset=f'{plain}:0.3 {longer}:0.7', out_dir=tmp_path / 'long', init_from=tmp_path / 'short', context=64,
        rope_base=1e6, lr=0, min_lr=0, balancer='none')
    assert 'starting from the weights' in capsys.readouterr().out
    short, long = (load_checkpoint(tmp_path / name)['model'] for name in ('short', 'long'))
    assert all(torch.equal(short[name], long[name]) for name in short)          # nothing was learned since
    with pytest.raises(ValueError, match='n_embd is 48, but'):
        run(dataset=plain, out_dir=tmp_path / 'other', init_from=tmp_path / 'short', n_embd=48)
    with pytest.raises(ValueError, match='no checkpoint'):
        run(dataset=plain, out_dir=tmp_path / 'other', init_from=tmp_path / 'nothing')
