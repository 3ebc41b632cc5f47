"""The tokenizer, the token files, the loader, and the prepare scripts of text (data/)."""

import base64
import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data.prepare
import tasks.loops.prepare
import tasks.words.prepare
from data.loader import TokenLoader, open_dataset
from data.prepare import line_chunks, prepare, split_documents, token_dtype
from data.stdlib.prepare import stdlib_documents
from data.text.prepare import TextConfig, text_documents
from data.tokenizer import (MAX_DISTINCT, MAX_PIECE, PATTERN, SHORT_PIECE, SPECIAL_TOKENS, encode_bytes, gpt2_encoding,
                            load_tokenizer, make_encoding, most_frequent, save_tokenizer, train_bpe)

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / 'data' / 'tokenizer.py').read_text(encoding='utf-8')
ENC = train_bpe([SOURCE], 600)
BYTES = [bytes([b]) for b in range(256)]


def one_line(raised):
    """Return the message of an error; it must be one line."""
    message = str(raised.value)
    assert message and '\n' not in message
    return message


# --- tokenizer ---------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_any_bytes_round_trip(data):
    assert ENC.decode_bytes(encode_bytes(ENC, data)) == data


MIXED = [b'self.', 'é€😀'.encode(), b'\xff', b'\xed\xb2\x80', b'\xe2\x82', b' ', b'\0']


@given(st.lists(st.sampled_from(MIXED)))
def test_interleaved_valid_and_invalid_utf8_round_trips(parts):
    assert ENC.decode_bytes(encode_bytes(ENC, b''.join(parts))) == b''.join(parts)


AWKWARD = st.text(st.sampled_from("aZé漢1٣ _.=(\"\t\n\r\x0b\x0c\x1c\x85\u2028\u0301😀"))


@given(st.text(max_size=200) | AWKWARD)
def test_any_text_round_trips(text):
    tokens = encode_bytes(ENC, text.encode('utf-8'))
    assert tokens == ENC.encode_ordinary(text)
    assert ENC.decode(tokens, errors='strict') == text


@given(AWKWARD)
def test_pre_tokenization_loses_nothing(text):
    assert ''.join(regex.findall(PATTERN, text)) == text


@pytest.mark.parametrize('text, pieces', [
    ('if x:\n\n    return 12345', ['if', ' x', ':\n\n    ', 'return', ' ', '123', '45']),
    ('self.a  == b\r\n', ['self', '.a', '  ', '==', ' b', '\r\n']),
])
def test_source_code_is_split_at_words_and_lines(text, pieces):
    assert regex.findall(PATTERN, text) == pieces


def reference_bpe(texts, n_merges):
    """Train by the definition of BPE, recounting all pairs for each merge. Return tokens and merged pieces."""
    pieces = [piece.encode() for text in texts for piece in regex.findall(PATTERN, text)]
    pieces = [[bytes([b]) for b in piece] for piece in pieces]
    tokens = list(BYTES)
    for _ in range(n_merges):
        pairs = Counter(pair for piece in pieces for pair in zip(piece, piece[1:]))
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], tokens.index(pair[0]), tokens.index(pair[1])))
        tokens.append(best[0] + best[1])
        for piece in pieces:
            i = 0
            while i < len(piece) - 1:
                if (piece[i], piece[i + 1]) == best:
                    piece[i:i + 2] = [best[0] + best[1]]
                i += 1
    return tokens, pieces


CORPUS = st.lists(st.text(st.sampled_from('aab c=\n'), max_size=60), max_size=4)


@settings(max_examples=200)
@given(CORPUS, st.integers(0, 30))
def test_merges_equal_those_of_a_naive_trainer(texts, n_merges):
    enc = train_bpe(texts, 256 + len(SPECIAL_TOKENS) + n_merges)
    tokens, pieces = reference_bpe(texts, n_merges)
    assert [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab - len(SPECIAL_TOKENS))] == tokens
    # and tiktoken, which has ranks instead of merges, encodes the corpus as training left it
    split = [tokens[i] for text in texts for i in enc.encode_ordinary(text)]
    assert split == [token for piece in pieces for token in piece]


def test_merges_of_real_source_equal_those_of_a_naive_trainer():
    text = SOURCE[:3000]
    enc = train_bpe([text], 256 + len(SPECIAL_TOKENS) + 120)
    assert [enc.decode_single_token_bytes(i) for i in range(376)] == reference_bpe([text], 120)[0]


@given(CORPUS)
def test_order_of_documents_does_not_change_the_vocabulary(texts):
    assert train_bpe(texts, 280)._mergeable_ranks == train_bpe(texts[::-1], 280)._mergeable_ranks


def test_small_corpus_gives_a_smaller_vocabulary_and_says_so(capsys):
    enc = train_bpe(['abab'], 1000)                # `ab` repeats, `abab` does not
    assert enc.n_vocab == 257 + len(SPECIAL_TOKENS)
    assert '263 tokens, not 1000' in capsys.readouterr().out
    train_bpe(['abab'], 263)
    assert capsys.readouterr().out == ''


def chinese(n):
    """Return a text of n frequent and rare characters, with punctuation but no spaces."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 3001)
    text = ''.join(chr(0x4e00 + c) for c in rng.choice(3000, n, p=share / share.sum()))
    return regex.sub(r'(.{7,19}?)(?=[\u4e00-\u4e20])', r'\1，', text)


def test_the_pieces_to_train_on_are_bounded_and_independent_of_order():
    text = chinese(600_000)
    pieces = Counter(regex.findall(PATTERN, text))
    kept = most_frequent(pieces)
    assert 0.99 * MAX_DISTINCT < sum(len(piece) for piece, _ in kept) <= MAX_DISTINCT < 0.5 * len(text.encode())
    assert max(len(piece) for piece, _ in kept) <= SHORT_PIECE
    assert kept == most_frequent(Counter(dict(reversed(pieces.items()))))
    few = Counter({piece: n for piece, n in itertools.islice(pieces.items(), 1000) if len(piece.encode()) <= MAX_PIECE})
    assert most_frequent(few) == [(piece.encode(), n) for piece, n in few.items()]         # all of a smaller corpus


def test_a_huge_piece_trains_quickly():
    train_bpe(['ab' * 500_000 + 'x'], 280)         # uncut, each merge would rewrite a million tokens
    assert max(map(len, train_bpe(['a' * 10_000], 300)._mergeable_ranks)) <= 64


def test_vocab_size_without_room_for_bytes_and_specials_is_an_error():
    with pytest.raises(ValueError, match='261.*262') as raised:
        train_bpe(['text'], 261)
    one_line(raised)


def test_special_tokens_follow_the_ordinary_ones():
    special = [ENC.encode_single_token(name) for name in SPECIAL_TOKENS]
    assert special == list(range(600 - len(SPECIAL_TOKENS), 600))
    assert ENC.n_vocab == 600 and ENC.eot_token == special[0]


@given(st.lists(st.sampled_from(SPECIAL_TOKENS + ['a', ' ', '<', '|>'])))
def test_special_strings_in_text_do_not_become_special_tokens(parts):
    tokens = encode_bytes(ENC, ''.join(parts).encode())
    assert all(token < ENC.n_vocab - len(SPECIAL_TOKENS) for token in tokens)
    assert ENC.decode(tokens) == ''.join(parts)


@pytest.mark.parametrize('text', ['a' * 10**6, ' ' * 10**6, '\n' * 10**6, ' \n' * 10**6 + 'x', '=' * 10**6])
def test_long_runs_neither_hang_nor_crash_the_encoder(text):
    assert ENC.decode(ENC.encode_ordinary(text)) == text


def test_saved_tokenizer_loads_as_the_same_encoding(tmp_path):
    save_tokenizer(tmp_path / 'bpe.json', ENC)
    loaded = load_tokenizer(tmp_path / 'bpe.json')
    assert loaded._mergeable_ranks == ENC._mergeable_ranks
    assert loaded._special_tokens == ENC._special_tokens
    assert loaded._pat_str == ENC._pat_str


def damaged(**changes):
    content = {'pattern': PATTERN, 'tokens': base64_of(BYTES), 'special_tokens': ['<|endoftext|>']}
    return json.dumps(content | changes)


def base64_of(tokens):
    return [base64.b64encode(token).decode() for token in tokens]


@pytest.mark.parametrize('content', [
    None, '', '{}', '[]', 'null', '{"tokens": ', '{"encoding": "gpt3"}', '\udcff',
    damaged(pattern='('), damaged(pattern=3), damaged(pattern=''), damaged(pattern='a*'), damaged(pattern='a'),
    damaged(pattern='(a+)+$'), damaged(special_tokens=[1]), damaged(special_tokens=['']),
    damaged(special_tokens=['<|endoftext|>', '\ud800']), '[' * 200_000, damaged(tokens=[1]),
    damaged(tokens=['?']), damaged(tokens=base64_of(BYTES[1:])), damaged(tokens=base64_of(BYTES + [b'a'])),
])
def test_damaged_tokenizer_is_a_one_line_error_naming_the_file(tmp_path, content):
    path = tmp_path / 'bpe.json'
    if content is not None:
        path.write_bytes(content.encode('utf-8', 'surrogateescape'))
    with pytest.raises(ValueError) as raised:
        load_tokenizer(path)
    assert str(path) in one_line(raised)


def test_undamaged_tokenizer_of_the_damage_test_loads(tmp_path):
    (tmp_path / 'bpe.json').write_text(damaged())
    assert load_tokenizer(tmp_path / 'bpe.json').n_vocab == 257


def fake_gpt2(name):
    assert name == 'gpt2'
    ranks = {token: i for i, token in enumerate(BYTES[::-1])}  # not in byte order, as in GPT-2
    return tiktoken.Encoding('gpt2', pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': 256})


def test_gpt2_keeps_its_endoftext_and_gains_the_other_specials(tmp_path, monkeypatch):
    monkeypatch.setattr(tiktoken, 'get_encoding', fake_gpt2)
    enc = gpt2_encoding()
    assert [enc.encode_single_token(name) for name in SPECIAL_TOKENS] == [256, 257, 258, 259, 260, 261]
    save_tokenizer(tmp_path / 'bpe.json', enc)
    assert json.loads((tmp_path / 'bpe.json').read_text()) == {'encoding': 'gpt2'}
    loaded = load_tokenizer(tmp_path / 'bpe.json')
    assert loaded._special_tokens == enc._special_tokens and loaded._mergeable_ranks == enc._mergeable_ranks
    assert enc.decode_bytes(encode_bytes(enc, b'a\xffb')) == b'a\xffb'


def test_gpt2_offline_is_one_line_that_names_the_default(tmp_path, monkeypatch):
    def offline(name):
        raise ConnectionError('many\nlines')
    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    (tmp_path / 'bpe.json').write_text('{"encoding": "gpt2"}')
    for call in (gpt2_encoding, lambda: load_tokenizer(tmp_path / 'bpe.json')):
        with pytest.raises(ValueError) as raised:
            call()
        assert '--tokenizer=bpe' in one_line(raised)


# --- prepare -----------------------------------------------------------------------------------------------


def names(documents):
    return [name for name, _ in documents]


@given(st.sets(st.text(min_size=1, max_size=5), min_size=2, max_size=60))
def test_train_and_val_share_no_file_and_neither_is_empty(all_names):
    splits = split_documents([(name, b'text') for name in all_names])
    train, val = set(names(splits['train'])), set(names(splits['val']))
    assert train and val and not train & val and train | val == all_names


def test_val_is_about_five_percent_and_documents_are_sorted():
    splits = split_documents([(f'{i}.py', b'text') for i in range(10_000)])
    assert 400 < len(splits['val']) < 600
    assert all(names(docs) == sorted(names(docs)) for docs in splits.values())


def test_adding_documents_moves_no_other_to_another_split():
    documents = [(f'{i}.py', b'text') for i in range(1000)]
    before, after = split_documents(documents[::2]), split_documents(documents)
    assert all(set(before[split]) < set(after[split]) for split in ('train', 'val'))


def test_split_is_the_same_on_every_machine():
    val = split_documents([(f'{i}.py', b'text') for i in range(100)])['val']
    assert names(val) == ['0.py', '27.py', '50.py', '51.py', '67.py', '73.py', '75.py', '76.py']


def test_two_documents_of_one_name_still_give_two_splits():
    name = names(split_documents([(f'{i}.py', b'text') for i in range(100)])['val'])[0]  # hashed to val
    splits = split_documents([(name, b'1'), (name, b'2')])
    assert len(splits['train']) == len(splits['val']) == 1


@given(st.lists(st.sampled_from([b'\n', b'a', b'bcdefgh' * 5, b'\xff']), min_size=2).map(b''.join))
def test_single_file_is_cut_in_two_without_loss(data):
    splits = split_documents([('x', data)])
    (_, train), (_, val) = splits['train'][0], splits['val'][0]
    assert train and val and train + val == data
    position = max(1, len(data) * 95 // 100)
    assert train.endswith(b'\n') if b'\n' in data[:position] else len(train) == position
    assert b'\n' not in data[len(train):position]


@pytest.mark.parametrize('documents', [[], [('empty', b'')], [('one', b'x')]])
def test_too_little_text_is_an_error(documents, tmp_path):
    with pytest.raises(ValueError) as raised:
        prepare(documents, tmp_path / 'out', 300)
    one_line(raised)
    assert not (tmp_path / 'out').exists()


def test_chunks_are_whole_lines_of_about_one_megabyte():
    data = b''.join(b'x' * random.Random(i).randrange(2000) + b'\n' for i in range(3000)) + b'end'
    chunks = list(line_chunks(data))
    assert b''.join(chunks) == data and len(chunks) > 2
    assert all(chunk.endswith(b'\n') and len(chunk) < 1.01 * 2**20 for chunk in chunks[:-1])


@pytest.mark.parametrize('line', ['漢é'.encode() * 1_000_000, b'\xff' * 3_000_000, '🙂'.encode() * 800_000 + b'\n'])
def test_long_lines_are_cut_between_characters(line):
    chunks = list(line_chunks(b'start\n' + line + b'end'))
    assert b''.join(chunks) == b'start\n' + line + b'end' and 1 < len(chunks) and max(map(len, chunks)) <= 2**21
    if b'\xff' not in line:
        assert ''.join(chunk.decode() for chunk in chunks).startswith('start\n')


def test_files_hold_every_byte_of_every_document_and_meta_counts_them(tmp_path):
    rng = random.Random(0)
    texts = [b'def f(x):\n', 'é'.encode(), b'\xff<|endoftext|>']
    documents = [(f'{i}.txt', rng.choice(texts) * rng.randrange(9)) for i in range(60)]
    prepare(documents, tmp_path, 300)
    enc = load_tokenizer(tmp_path / 'bpe.json')
    meta = json.loads((tmp_path / 'meta.json').read_text())
    assert meta['vocab_size'] == enc.n_vocab and meta['dtype'] == 'uint16'
    for split, docs in split_documents(documents).items():
        tokens = np.fromfile(tmp_path / f'{split}.bin', '<u2')
        assert tokens[-1] == enc.eot_token
        ends = np.flatnonzero(tokens == enc.eot_token)
        texts = [enc.decode_bytes(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]
        assert texts == [data for _, data in docs]
        assert meta[split] == {'tokens': len(tokens), 'bytes': sum(map(len, texts)), 'files': len(texts)}


def test_vocabulary_learns_from_train_only(tmp_path, monkeypatch):
    splits = {'train': [('a', b'train train')], 'val': [('b', b'zzzz zzzz zzzz')]}
    monkeypatch.setattr(data.prepare, 'split_documents', lambda documents: splits)
    prepare([], tmp_path, 300)
    enc = load_tokenizer(tmp_path / 'bpe.json')
    assert b'train' in enc._mergeable_ranks and b'zz' not in enc._mergeable_ranks


def test_dtype_is_the_smallest_that_holds_every_token():
    assert [token_dtype(n).str for n in (300, 65536, 65537)] == ['<u2', '<u2', '<u4']


def test_large_vocabulary_is_written_and_read_as_uint32(tmp_path, monkeypatch):
    tokens = BYTES + [b'%06d' % i for i in range(70_000)]
    enc = make_encoding(PATTERN, tokens, SPECIAL_TOKENS)
    monkeypatch.setattr(data.prepare, 'train_bpe', lambda texts, vocab_size: enc)
    prepare([('a', b'abc'), ('b', b'de')], tmp_path, 80_000)
    loader = TokenLoader(tmp_path, 'train', 1, 8, 0)
    assert loader.meta['dtype'] == 'uint32' and loader.vocab_size == 70_262
    assert loader.batch(0)[1].max() == 70_256      # <|endoftext|>, beyond 16 bits


@pytest.mark.parametrize('name, error', [('encode_bytes', KeyboardInterrupt), ('train_bpe', ValueError),
                                         ('write_tokenizer_and_meta', OSError)])
def test_a_prepare_that_fails_leaves_the_old_dataset(tmp_path, monkeypatch, name, error):
    documents = [('a', b'abc'), ('b', b'de')]
    prepare(documents, tmp_path, 300)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments):
        raise error
    monkeypatch.setattr(data.prepare, name, fail)
    with pytest.raises(error):
        prepare([('a', b'other'), ('b', b'text')], tmp_path, 300)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    TokenLoader(tmp_path, 'train', 1, 8, 0)
    monkeypatch.undo()
    (tmp_path / '.unfinished').mkdir()                          # left by a process that was killed
    (tmp_path / '.unfinished' / 'train.bin').write_bytes(b'half')
    prepare([('a', b'other'), ('b', b'text')], tmp_path, 300)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(before)
    assert TokenLoader(tmp_path, 'train', 1, 8, 0).n_tokens == 6


# --- loader ------------------------------------------------------------------------------------------------


def write_tokens(folder, tokens, vocab_size=1000, dtype='uint16'):
    counts = {'tokens': len(tokens), 'bytes': len(tokens), 'files': 1}
    meta = {'vocab_size': vocab_size, 'tokenizer': '', 'dtype': dtype, 'train': counts, 'val': counts}
    (folder / 'meta.json').write_text(json.dumps(meta))
    for split in ('train', 'val'):
        np.array(tokens, dtype).tofile(folder / f'{split}.bin')


def sequences(loader, indices):
    """Return the (inputs, targets) of all sequences of some batches, as tuples."""
    batches = [loader.batch(index) for index in indices]
    return [(tuple(x.tolist()), tuple(y.tolist())) for xs, ys, _ in batches for x, y in zip(xs, ys)]


SHAPES = dict(n=st.integers(2, 60), batch_size=st.integers(1, 7), context=st.integers(1, 12),
              seed=st.integers(0, 9))


@settings(max_examples=150)
@given(**SHAPES, split=st.sampled_from(['train', 'val']), epoch=st.integers(0, 3))
def test_every_token_but_the_first_is_a_target_once_per_epoch(tmp_path_factory, n, batch_size, context, seed,
                                                              split, epoch):
    folder = tmp_path_factory.mktemp('tokens')
    write_tokens(folder, range(100, 100 + n))
    loader = TokenLoader(folder, split, batch_size, context, seed)
    first, last = epoch * loader.n_windows, (epoch + 1) * loader.n_windows  # the epoch's indices
    indices = range(first // batch_size, -(-last // batch_size))
    epoch_sequences = sequences(loader, indices)[first % batch_size:][:loader.n_windows]
    seen = [y for _, ys in epoch_sequences for y in ys if y != -1]
    assert sorted(seen) == list(range(101, 100 + n))
    for xs, ys in epoch_sequences:
        assert all(x + 1 == y if y != -1 else x == 0 for x, y in zip(xs, ys))


@given(**SHAPES)
def test_a_batch_depends_on_seed_and_index_alone(tmp_path_factory, n, batch_size, context, seed):
    folder = tmp_path_factory.mktemp('tokens')
    write_tokens(folder, range(n))
    forward = sequences(TokenLoader(folder, 'train', batch_size, context, seed), range(9))
    loader = TokenLoader(folder, 'train', batch_size, context, seed)
    backward = [sequences(loader, [index]) for index in reversed(range(9))]
    assert forward == [sequence for batch in backward[::-1] for sequence in batch]


def test_batches_are_int64_of_batch_size_by_context(tmp_path):
    write_tokens(tmp_path, range(50))
    x, y, start = TokenLoader(tmp_path, 'train', 3, 7, 0).batch(2)
    assert start is None
    for tensor in x, y:
        assert tensor.shape == (3, 7) and tensor.dtype == torch.int64 and tensor.device.type == 'cpu'


def test_seeds_and_epochs_differ_in_order(tmp_path):
    write_tokens(tmp_path, range(401))             # 100 windows
    loader = TokenLoader(tmp_path, 'train', 10, 4, 0)
    first, second = sequences(loader, range(10)), sequences(loader, range(10, 20))
    other = sequences(TokenLoader(tmp_path, 'train', 10, 4, 1), range(10))
    assert sorted(first) == sorted(second) == sorted(other)
    assert first != second and first != other and second != other and first != sorted(first)


def test_even_and_odd_batches_partition_the_epoch(tmp_path):
    write_tokens(tmp_path, range(401))
    ranks = [sequences(TokenLoader(tmp_path, 'train', 5, 4, 0), range(rank, 20, 2)) for rank in (0, 1)]
    assert not set(ranks[0]) & set(ranks[1])
    assert sorted(ranks[0] + ranks[1]) == sorted(sequences(TokenLoader(tmp_path, 'train', 100, 4, 0), [0]))


def damage_tokens(folder, damage):
    write_tokens(folder, range(50))
    meta, tokens = folder / 'meta.json', folder / 'train.bin'
    content = json.loads(meta.read_text())
    if damage == 'no meta':
        meta.unlink()
    elif damage == 'half meta':
        meta.write_text(meta.read_text()[:40])
    elif damage == 'meta is a list':
        meta.write_text('[]')
    elif damage == 'no split in meta':
        meta.write_text(json.dumps({'vocab_size': 9, 'tokenizer': '', 'dtype': 'uint16'}))
    elif damage == 'strange dtype':
        meta.write_text(json.dumps(content | {'dtype': 'float16'}))
    elif damage == 'other dtype':
        meta.write_text(json.dumps(content | {'dtype': 'uint32'}))
    elif damage == 'no tokens':
        tokens.unlink()
    elif damage == 'truncated':
        tokens.write_bytes(tokens.read_bytes()[:-1])
    elif damage == 'longer':
        tokens.write_bytes(tokens.read_bytes() + b'\0\0')
    elif damage == 'one token':
        write_tokens(folder, [7])
    return meta if 'meta' in damage or damage == 'strange dtype' else tokens


@pytest.mark.parametrize('damage', [
    'no meta', 'half meta', 'meta is a list', 'no split in meta', 'strange dtype', 'other dtype', 'no tokens',
    'truncated', 'longer', 'one token',
])
def test_damaged_data_is_a_one_line_error_naming_file_and_remedy(tmp_path, damage):
    path = damage_tokens(tmp_path, damage)
    with pytest.raises(ValueError) as raised:
        TokenLoader(tmp_path, 'train', 2, 4, 0)
    message = one_line(raised)
    assert str(path) in message and 'prepare.py of its folder' in message


@pytest.mark.parametrize('position', [0, 20, 49])
def test_token_outside_the_vocabulary_is_a_one_line_error(tmp_path, position):
    write_tokens(tmp_path, [5] * position + [10] + [5] * (49 - position), vocab_size=10)
    loader = TokenLoader(tmp_path, 'train', 13, 4, 0)
    assert loader.n_windows == 13                  # all in one batch
    with pytest.raises(ValueError, match='token 10, outside the vocabulary of 10') as raised:
        loader.batch(0)
    assert str(tmp_path / 'train.bin') in one_line(raised)


@pytest.mark.parametrize('arguments', [
    ('test', 1, 1, 0), ('train', 0, 1, 0), ('train', 1, 0, 0), ('train', 1, 1, -1),
])
def test_impossible_arguments_of_the_loader_are_errors(tmp_path, arguments):
    write_tokens(tmp_path, range(50))
    with pytest.raises(ValueError, match='must be') as raised:
        TokenLoader(tmp_path, *arguments)
    one_line(raised)


# --- scripts -----------------------------------------------------------------------------------------------


def run(script, *arguments, **environment):
    return subprocess.run([sys.executable, '-m', f'data.{script}.prepare', *map(str, arguments)],
                          capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


FILES = {'a.txt': b'one two one two\n' * 20, 'sub/b.txt': b'\xff latin \xe9\n' * 9, 'c.bin': b'\0\1',
         'empty': b'', '.hidden': b'no', '.git/config': b'no', 'sub/.x/d.txt': b'no'}


def test_text_script_prepares_a_folder_the_same_each_time(tmp_path):
    write_files(tmp_path / 'in', FILES)
    outs = [tmp_path / 'out0', tmp_path / 'out1']
    for seed, out in enumerate(outs):
        done = run('text', tmp_path / 'in', f'--out={out}', '--vocab_size=300', PYTHONHASHSEED=str(seed))
        assert done.returncode == 0, done.stderr
        assert f"left out {tmp_path / 'in' / 'c.bin'}: 50.00% of" in done.stdout and 'bytes per token' in done.stdout
    written = sorted(path.name for path in outs[0].iterdir())
    assert written == ['bpe.json', 'meta.json', 'train.bin', 'val.bin']
    assert all((outs[0] / name).read_bytes() == (outs[1] / name).read_bytes() for name in written)
    meta = TokenLoader(outs[0], 'val', 2, 8, 0).meta
    assert meta['train']['files'] + meta['val']['files'] == 2
    assert meta['train']['bytes'] + meta['val']['bytes'] == len(FILES['a.txt'] + FILES['sub/b.txt'])


def test_text_script_takes_a_single_file(tmp_path):
    write_files(tmp_path, FILES)
    done = run('text', tmp_path / 'a.txt', f"--out={tmp_path / 'out'}", '--vocab_size=280')
    assert done.returncode == 0, done.stderr
    meta = TokenLoader(tmp_path / 'out', 'train', 2, 8, 0).meta
    assert (meta['train']['bytes'], meta['val']['bytes']) == (304, 16)


def test_text_skips_hidden_and_binary_and_counts_a_file_once(tmp_path):
    write_files(tmp_path / 'in', FILES)
    write_files(tmp_path / 'in2', {'a.txt': b'other'})
    found = text_documents([tmp_path / 'in', tmp_path / 'in' / 'a.txt', tmp_path / 'in2'])
    assert sorted(names(found)) == ['in/a.txt', 'in/empty', 'in/sub/b.txt', 'in2/a.txt']
    assert names(text_documents([tmp_path / 'in' / '.hidden'])) == ['.hidden']  # given by name


TEXT = 'naïve 漢字\n' * 30


@pytest.mark.parametrize('content, expected', [
    (TEXT.encode('utf-8-sig'), TEXT.encode()), (TEXT.encode('utf-16'), TEXT.encode()),
    (b'\xfe\xff' + TEXT.encode('utf-16-be'), TEXT.encode()), (TEXT.encode('utf-32'), TEXT.encode()),
    (TEXT.encode() + b'\0', TEXT.encode() + b'\0'), (b'one \0 NUL', b'one \0 NUL'),
    (b'caf\xe9 \0', b'caf\xe9 \0'),                             # Latin-1
])
def test_text_is_known_by_its_byte_order_mark_and_its_share_of_nul_bytes(tmp_path, content, expected):
    (tmp_path / 'a.txt').write_bytes(content)
    assert text_documents([tmp_path / 'a.txt']) == [('a.txt', expected)]


@pytest.mark.parametrize('content, why', [
    (random.Random(0).randbytes(5000), '% of its bytes are NUL'), (b'\x7fELF' + b'\0' * 60 + b'code' * 9, 'are NUL'),
    ('ascii'.encode('utf-16-le'), '50.00% of its bytes are NUL: it is binary, or UTF-16'),
    (b'\xff\xfe\x00\xd8', 'is not valid'),
])
def test_each_file_left_out_is_named_with_the_reason(tmp_path, capsys, content, why):
    (tmp_path / 'a.txt').write_bytes(content)
    assert text_documents([tmp_path]) == []
    out = capsys.readouterr().out
    assert out.startswith(f"left out {tmp_path / 'a.txt'}: ") and why in out and out.count('\n') == 1


def test_documents_inside_files(tmp_path):
    write_files(tmp_path, {'a.txt': b'one<|endoftext|>two\n<|endoftext|>\n',
                           'b.jsonl': b'{"text": "x\\ny", "id": 1}\n\n{"text": "p<|endoftext|>q"}\n'})
    assert [data for _, data in text_documents([tmp_path], '<|endoftext|>')] == [
        b'one', b'two\n', b'x\ny', b'p', b'q']
    found = text_documents([tmp_path])
    assert [data for _, data in found] == [b'one<|endoftext|>two\n<|endoftext|>\n', b'x\ny', b'p<|endoftext|>q']
    assert len(set(names(found))) == 3
    (tmp_path / 'b.jsonl').write_bytes(b'{"text": "a"}\n{"content": "b"}\n')
    with pytest.raises(ValueError, match='b.jsonl, line 2: text is missing') as raised:
        text_documents([tmp_path])
    one_line(raised)


def test_text_takes_the_tokenizer_of_another_dataset(tmp_path):
    write_files(tmp_path, FILES)
    prepare([('a', SOURCE.encode()), ('b', b'text')], tmp_path / 'first', 400)
    done = run('text', tmp_path / 'a.txt', f"--out={tmp_path / 'out'}", f"--tokenizer_from={tmp_path / 'first'}")
    assert done.returncode == 0, done.stderr
    open_dataset(f"{tmp_path / 'first'} {tmp_path / 'out'}", 'train', 1, 8, 0)          # one vocabulary
    with pytest.raises(ValueError, match='give one'):
        TextConfig(tokenizer='gpt2', tokenizer_from='first')


def test_stdlib_skips_tests_tables_packages_and_generated_files(tmp_path):
    write_files(tmp_path, {
        'os.py': b'import sys\r\n', 'email/message.py': b'# text was generated', 'notes.txt': b'x',
        'late.py': b' ' * 400 + b'is generated', 'early.py': b'# is generated', 'token.py': b'Auto-generated',
        'keyword.py': b'This file is automatically generated', 'topics.py': b'# Autogenerated by Sphinx',
        '_sysconfigdata_x.py': b'# system configuration generated and used by the sysconfig module',
        'test/a.py': b'x', 'lib2to3/tests/a.py': b'x', 'idlelib/idle_test/a.py': b'x',
        'site-packages/a.py': b'x', 'encodings/cp1.py': b'x', 'html/entities.py': b'x'})
    found = stdlib_documents(tmp_path)
    assert names(found) == ['email/message.py', 'late.py', 'os.py']
    assert dict(found)['os.py'] == b'import sys\n'


def test_stdlib_without_source_is_a_one_line_error(tmp_path):
    with pytest.raises(ValueError, match='no Python source') as raised:
        stdlib_documents(tmp_path)
    one_line(raised)


def test_stdlib_script_prepares_a_corpus(tmp_path):
    done = run('stdlib', f'--out={tmp_path}', '--vocab_size=512')
    assert done.returncode == 0, done.stderr
    loader = TokenLoader(tmp_path, 'train', 4, 64, 0)
    assert loader.vocab_size == 512 and loader.n_tokens > 1_000_000
    text = load_tokenizer(tmp_path / 'bpe.json').decode(loader.tokens[:20_000].tolist())
    assert 'import ' in text and 'def ' in text
    assert 0.01 < loader.meta['val']['bytes'] / loader.meta['train']['bytes'] < 0.15


@pytest.mark.parametrize('module, prepare_dataset, config', [
    (tasks.loops.prepare, tasks.loops.prepare.prepare_loops, tasks.loops.prepare.LoopsConfig),
    (tasks.words.prepare, tasks.words.prepare.prepare_words, tasks.words.prepare.WordsConfig)])
def test_a_task_whose_prepare_fails_keeps_its_old_datasets(tmp_path, monkeypatch, module, prepare_dataset, config):
    def contents():
        return {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    prepare_dataset(config(str(tmp_path), traces=40, votes=40))
    before, write, calls = contents(), module.write_packed, []

    def fail_at_last(*arguments):
        write(*arguments)
        calls.append(arguments)
        if len(calls) == (2 if module is tasks.loops.prepare else 1):
            raise KeyboardInterrupt
    monkeypatch.setattr(module, 'write_packed', fail_at_last)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(config(str(tmp_path), traces=40, votes=40, seed=1))
    assert contents() == before
    monkeypatch.undo()
    prepare_dataset(config(str(tmp_path), traces=40, votes=40, seed=1))
    assert contents().keys() == before.keys() and contents() != before


@pytest.mark.parametrize('script, arguments, says', [
    ('text', ['no/such/file'], 'does not exist'),
    ('text', [], 'FILES_OR_FOLDERS'),
    ('text', ['a.txt', '--vocab_size'], 'write --key=value'),
    ('text', ['a.txt', '--context=4'], "unknown key 'context'"),
    ('text', ['EMPTY'], 'no text'),
    ('text', ['a.txt', '--tokenizer=gpt3'], 'one of bpe, gpt2'),
    ('text', ['a.txt', '--vocab_size=12'], 'vocab_size'),
    ('text', ['a.txt', '--vocab_size=big'], 'vocab_size must be int'),
    ('text', ['a.txt', '--out=a.txt'], 'a.txt'),
    ('stdlib', ['--no_such_flag'], '--no_such_flag'),
    ('stdlib', ['--vocab_size=1'], '262'),
])
def test_bad_arguments_exit_non_zero_with_a_line_and_no_traceback(tmp_path, script, arguments, says):
    (tmp_path / 'a.txt').write_bytes(b'some text\n' * 5)
    (tmp_path / 'EMPTY').mkdir()
    for name in ('a.txt', 'EMPTY'):
        arguments = [argument.replace(name, str(tmp_path / name)) for argument in arguments]
    done = run(script, f'--out={tmp_path}/out', *arguments)  # the last --out applies
    assert done.returncode == 1 and says in done.stderr
    assert done.stderr.startswith(f'data.{script}.prepare: ') and done.stderr.count('\n') == 1
