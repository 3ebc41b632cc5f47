"""Reading conversations (data/conversations.py), their samples, trimming and packing (data/reasoning.py), and the
script data/chat/prepare.py."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.reasoning
from data.chat.prepare import ChatConfig, prepare_chat, texts
from data.conversations import messages_of, read_conversations, split_think, warn_of_unread_tags
from data.language import language_of
from data.reasoning import (OUTCOMES, RULES, SCORED, STARTS, Turn, ap_trim, drop, flatten, length, pack, padding,
                            render, trim, truncate, write_packed)
from data.tokenizer import PATTERN, SPECIAL_TOKENS, load_tokenizer, make_encoding, save_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[1]
ENC = train_bpe([Path(__file__).read_text(encoding='utf-8')], 400)
LANGUAGE = language_of(ENC, 'here')
SPECIAL = {name: ENC.encode_single_token(name) for name in SPECIAL_TOKENS}


def one_line(raised):
    """Return the message of an error; it must be one line."""
    message = str(raised.value)
    assert message and '\n' not in message
    return message


# --- conversations -----------------------------------------------------------------------------------------

TEXT = st.lists(st.sampled_from([*SPECIAL_TOKENS, 'the sum', ' ', '\n', '<', 'think>', 'é漢😀', '12', '\u2028'])
                | st.text(st.characters(exclude_categories=('Cs', 'Cn')), max_size=5)).map(''.join).filter(str.strip)
TEXT = TEXT.map(lambda text: text.replace('think>', '')).filter(str.strip)
PLAIN = TEXT
THOUGHT = st.tuples(st.sampled_from(['', '\n ']), TEXT, TEXT)


@st.composite
def conversations(draw):
    """Draw 1 to 4 turns: [(question, white space before the block, reasoning or None, answer)]."""
    reply = st.tuples(st.just(''), st.none(), PLAIN) | THOUGHT
    return [(draw(TEXT), *draw(reply)) for _ in range(draw(st.integers(1, 4)))]


def row_of(turns):
    """Return the row of a file with a conversation."""
    messages = []
    for question, space, think, answer in turns:
        content = answer if think is None else f'{space}<think>{think}</think>{answer}'
        messages += [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': content}]
    return {'messages': messages}


def samples_of(turns):
    return render(messages_of(row_of(turns), 'here'), LANGUAGE)


@given(conversations())
def test_each_reply_is_a_sample_that_scores_its_tokens_alone_after_the_turns_without_reasoning(turns):
    samples, history = samples_of(turns), ''
    assert len(samples) == len(turns)
    for (question, _, think, answer), sample in zip(turns, samples):
        tokens, scored = flatten(sample)
        runs = [(is_scored, ENC.decode([token for _, token in run], errors='strict'))
                for is_scored, run in itertools.groupby(zip(scored, tokens), key=lambda pair: pair[0])]
        history += f'<|user|>{question}<|end|><|assistant|>'
        reasoning = '' if think is None else f'<think>{think}</think>'
        assert runs == [(False, history + '<think></think>' * (think is None)), (True, f'{reasoning}{answer}<|end|>')]
        history += f'{answer}<|end|>'


@given(conversations())
def test_special_strings_in_content_stay_ordinary_text(turns):
    expected = []
    for (_, _, think, _), sample in zip(turns, samples_of(turns)):
        expected += ['<|user|>', '<|end|>', '<|assistant|>']
        tokens, _ = flatten(sample)
        assert [token for token in tokens if token in SPECIAL.values()] == [
            SPECIAL[name] for name in [*expected, '<think>', '</think>', '<|end|>']]
        expected += ['<|end|>']


@given(conversations(), TEXT)
def test_the_prompt_of_a_sample_is_that_of_chat(turns, system):
    """Conversation.ask renders the messages before a reply, whose reasoning add_reply has dropped."""
    row = row_of(turns)
    row['messages'].insert(0, {'role': 'system', 'content': system})
    history = [{'role': 'system', 'content': system}]
    for (question, _, think, answer), [turn] in zip(turns, render(messages_of(row, 'here'), LANGUAGE)):
        history.append({'role': 'user', 'content': question})
        assert turn.prompt == LANGUAGE.prompt(history, think=think is not None)
        history.append({'role': 'assistant', 'content': answer})


@pytest.mark.parametrize('content, expected', [
    ('answer', (None, 'answer')),
    ('\n<think>\nt\n</think>\n\na', ('\nt\n', '\n\na')),       # white space is kept
    ('<think></think>a', ('', 'a')),
    ('<think>t</think>a</think>b', ('t', 'a</think>b')),
    ('<think>t<think>u</think>a', ('t<think>u', 'a')),
    ('about <think> and </think>', (None, 'about <think> and </think>')),
    ('<think>t', ('t', None)),
    ('t</think>a', ('t', 'a')),                                # the prompt of the model that wrote it ended in <think>
    ('\nt\n</think>\n\na</think>b', ('\nt\n', '\n\na</think>b')),
    ('<thinking>t</think></thinking>a', ('t</think>', 'a')),
    ('t</thinking>a', ('t', 'a')),
    ('about <thinking> and </thinking>', (None, 'about <thinking> and </thinking>')),
    ('<|begin_of_thought|>t<|end_of_thought|>\n\n<|begin_of_solution|>\na\n<|end_of_solution|>', ('t', 'a')),
    ('<|begin_of_thought|>t<|end_of_thought|>a', ('t', 'a')),
    ('<|begin_of_thought|>t', ('t', None)),
])
def test_a_think_block_starts_the_content_and_ends_at_the_first_closing_tag(content, expected):
    assert split_think(content) == expected


def test_tokenizer_without_the_special_tokens_is_an_error(tmp_path):
    save_tokenizer(tmp_path / 'bpe.json', make_encoding(PATTERN, [bytes([b]) for b in range(256)], ['<|endoftext|>']))
    (tmp_path / 'some.jsonl').write_bytes(GOOD + b'\n' + GOOD)
    with pytest.raises(ValueError, match='lacks the special tokens <.user.> ') as raised:
        prepare_chat([tmp_path / 'some.jsonl'], ChatConfig(tokenizer_from=str(tmp_path), out=str(tmp_path / 'out')))
    one_line(raised)


def line_of(*contents, **extra):
    roles = itertools.cycle(['user', 'assistant'])
    messages = [{'role': role, 'content': content, **extra} for role, content in zip(roles, contents)]
    return json.dumps({'messages': messages, **extra}).encode()


GOOD = line_of('q', 'a')


def test_conversations_are_read_line_by_line(tmp_path):
    path = tmp_path / 'some.jsonl'
    odd = line_of('QUESTION', 'd').replace(b'QUESTION', 'a\u2028b\x85c'.encode())  # splits in str.splitlines
    last = line_of('q', '<think>t</think>a', id=3)
    path.write_bytes(b'\n'.join([b'\xef\xbb\xbf' + GOOD, b'', odd + b'\r', b'  ', last]))
    read = read_conversations([path])
    assert [[message['content'] for message in messages] for messages in read] == [
        ['q', 'a'], ['a\u2028b\x85c', 'd'], ['q', 'a']]
    assert read[2][1]['reasoning'] == 't'


USER, REPLY = {'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a', 'reasoning': None}
SYSTEM = {'role': 'system', 'content': 's'}
THOUGHTFUL = REPLY | {'reasoning': 't'}


@pytest.mark.parametrize('row, expected', [
    ({'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]}, [USER, REPLY]),
    ({'conversations': [{'from': 'system', 'value': 's'}, {'from': 'user', 'value': 'q'},
                        {'from': 'assistant', 'value': '<think>t</think>a'}]}, [SYSTEM, USER, THOUGHTFUL]),
    ({'system': 's', 'conversations': [USER, {'role': 'assistant', 'content': 'a'}]}, [SYSTEM, USER, REPLY]),
    ({'system': None, 'messages': [USER, REPLY | {'tool_calls': None}]}, [USER, REPLY]),
    ({'instruction': 'q', 'input': '', 'output': 'a'}, [USER, REPLY]),
    ({'instruction': 'q', 'output': 't</think>a'}, [USER, THOUGHTFUL]),
    ({'instruction': 'q', 'input': 'more', 'output': 'a'}, [USER | {'content': 'q\n\nmore'}, REPLY]),
    ({'messages': [SYSTEM, USER, {'role': 'assistant', 'content': 'a', 'reasoning_content': 't'}]},
     [SYSTEM, USER, THOUGHTFUL]),
    ({'messages': [USER, {'role': 'assistant', 'content': '<think>\nt\n</think>a', 'reasoning': 't'}]},
     [USER, THOUGHTFUL]),
    ({'messages': [USER, {'role': 'assistant', 'content': 'a', 'thinking': 't', 'reasoning': ''}]}, [USER, THOUGHTFUL]),
    ({'messages': [USER, {'role': 'assistant', 'content': '<think>\n\n</think>a'}]}, [USER, REPLY]),
])
def test_public_formats_are_read(tmp_path, row, expected):
    (tmp_path / 'some.jsonl').write_text(json.dumps(row))
    (tmp_path / 'array.json').write_text(json.dumps([row], indent=2), encoding='utf-16')
    assert read_conversations([tmp_path / 'some.jsonl', tmp_path / 'array.json']) == [expected] * 2


def test_tags_that_are_not_understood_are_counted(capsys):
    says = ['a', '<reflection>x</reflection>a', 'a <think> b </think>', '[THINK]x[/THINK]a', '<think>t</think>a', '< y']
    warn_of_unread_tags([messages_of(row_of([('q <think>', '', None, answer)]), '') for answer in says])
    error = capsys.readouterr().err
    assert error.startswith('warning: 3 of 6 replies have tags') and '<reflection> in 1' in error and '[THINK]' in error
    warn_of_unread_tags([messages_of(row_of([('q', '', 't', 'a')]), '')])
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('line, says', [
    (b'{"messages": [', 'not valid JSON'),
    (b'\xff\xfe{}', 'not valid Unicode'),
    (b'[' * 100_000, 'not valid JSON'),
    (b'[]', 'the whole is a list, it must be an object'),
    (b'{"conversation": []}', "none of 'messages', 'conversations' and 'instruction'"),
    (b'{"messages": []}', 'at least one'),
    (b'{"messages": ["hello"]}', "messages[0] is 'hello', it must be an object"),
    (GOOD.replace(b'"user"', b'"system"'), 'message 2 is of the assistant'),
    (GOOD.replace(b'"user"', b'"critic"'), "message 1 has the role 'critic'"),
    (GOOD.replace(b'"user"', b'["user"]'), 'role is a list, it must be text'),
    (GOOD.replace(b'"user"', b'"tool"'), 'message 1 is a tool turn of the tool'),
    (line_of('q', None, tool_calls=[{}]), 'message 1 is a tool turn of the user: conversations with tools'),
    (line_of('q', '<think>t</think>a', reasoning='u'), 'message 2 has two different texts as reasoning'),
    (b'{"instruction": "q", "output": ""}', 'message 2 has no content'),
    (b'{"instruction": "q"}', 'output is missing'),
    (GOOD.replace(b'"user"', b'"assistant"'), 'message 1 is of the assistant'),
    (GOOD.replace(b'"assistant"', b'"user"'), 'message 2 is of the user'),
    (line_of('q', 'a', 'q'), 'the last message is of the user'),
    (b'{"messages": [{"role": "user"}]}', 'content is missing'),
    (line_of('q', ' \n'), 'message 2 has no content'),
    (line_of('q', None), 'message 2: content is None, it must be text'),
    (line_of('q', 'a', 'q', '<think>t'), 'message 4 opens its reasoning, but never closes'),
    (line_of('q', '<think>t</think>\n'), 'message 2 has no answer'),
    (line_of('q\ud83d', 'a'), 'is not valid Unicode'),
])
def test_bad_line_is_a_one_line_error_naming_file_and_line(tmp_path, line, says):
    path = tmp_path / 'some.jsonl'
    path.write_bytes(GOOD + b'\n\n' + line + b'\n' + GOOD + b'\n')
    with pytest.raises(ValueError) as raised:
        read_conversations([path])
    message = one_line(raised)
    assert message.startswith(f'{path}, line 3: ') and says in message and '(1 of 3 conversations' in message
    assert len(read_conversations([path], skip_bad=True)) == 2


def test_bad_rows_are_counted_and_left_out_by_name(tmp_path, capsys):
    (tmp_path / 'some.jsonl').write_bytes(b'\n'.join([GOOD, b'{}', GOOD, line_of('q')]))
    (tmp_path / 'more.json').write_text(f'[{GOOD.decode()}, 3, {GOOD.decode()}]')
    paths = [tmp_path / 'some.jsonl', tmp_path / 'more.json']
    with pytest.raises(ValueError, match='line 2: .*3 of 7 conversations cannot be read; --skip_bad=True'):
        read_conversations(paths)
    assert len(read_conversations(paths, skip_bad=True)) == 4
    error = capsys.readouterr().err
    assert error.count('\n') == 4 and 'skipped 3 of 7 conversations' in error
    for name in f'{paths[0]}, line 2: ', f'{paths[0]}, line 4: ', f'{paths[1]}, entry 2: ':
        assert f'skipped {name}' in error


def test_file_without_conversations_is_an_error(tmp_path):
    (tmp_path / 'some.jsonl').write_bytes(b'\n')
    with pytest.raises(ValueError, match='no conversation') as raised:
        read_conversations([tmp_path / 'some.jsonl'])
    one_line(raised)


# --- trimming ----------------------------------------------------------------------------------------------


@st.composite
def samples(draw):
    """Draw 1 to 4 turns with distinct tokens, so that the origin of each token is known."""
    count = itertools.count(1)

    def take(n):
        return list(itertools.islice(count, n))
    sizes = st.tuples(st.integers(3, 5), st.sampled_from([0, 2, 3, 4, 8, 12]), st.integers(1, 3))
    return [Turn(take(p), take(t), take(a)) for p, t, a in draw(st.lists(sizes, min_size=1, max_size=4))]


def reasoning(turn):
    return turn.think[1:-1]


def without_reasoning(sample):
    return [turn._replace(think=[]) for turn in sample]


@st.composite
def tight(draw):
    """Draw a sample and a budget, from one less than its questions and answers need to the whole length."""
    sample = draw(samples())
    return sample, draw(st.sampled_from(range(length(without_reasoning(sample)) - 1, length(sample) + 1)))


def trim_by_trial(sample, budget):
    """Return the first result of the four rules, in order, that fits."""
    *earlier, last = sample
    tries = [(sample, 'kept')]
    for before, what in ((earlier, 'cut'), (without_reasoning(earlier), 'earlier dropped')):
        tries.append((before + [last], what))
        for n in range(len(last.think) - 3, 0, -1):            # at least one token less, and at least one left
            tries.append((before + [last._replace(think=last.think[:n + 1] + last.think[-1:])], what))
        tries.append((before + [last._replace(think=[])], what))
    return next(((trimmed, what) for trimmed, what in tries if length(trimmed) <= budget), (None, 'dropped'))


@settings(max_examples=250)
@given(tight())
def test_ap_trimming_is_the_four_rules_tried_in_turn(sample_and_budget):
    sample, budget = sample_and_budget
    assert ap_trim(sample, budget) == trim_by_trial(sample, budget)


@settings(max_examples=100)
@given(tight(), st.sampled_from(list(RULES)))
def test_trimmed_sample_fits_and_the_given_one_is_not_changed(sample_and_budget, rule):
    sample, budget = sample_and_budget
    before = [Turn(*map(list, turn)) for turn in sample]
    trimmed, what = RULES[rule](sample, budget)
    assert (trimmed is None) == (what == 'dropped') and what in OUTCOMES
    assert trimmed is None or length(trimmed) <= budget
    assert sample == before


@given(samples(), st.integers(0, 20), st.sampled_from(list(RULES)))
def test_fitting_sample_is_untouched(sample, more, rule):
    assert RULES[rule](sample, length(sample) + more) == (sample, 'kept')


@settings(max_examples=100)
@given(tight())
def test_every_question_and_answer_survives_whole(sample_and_budget):
    sample, budget = sample_and_budget
    trimmed, _ = ap_trim(sample, budget)
    if trimmed is not None:
        assert without_reasoning(trimmed) == without_reasoning(sample)


@settings(max_examples=100)
@given(tight())
def test_the_last_reasoning_keeps_the_longest_prefix_that_fits_with_its_tags(sample_and_budget):
    sample, budget = sample_and_budget
    trimmed, what = ap_trim(sample, budget)
    if what in ('cut', 'earlier dropped'):
        whole, kept = sample[-1], trimmed[-1]
        n = len(reasoning(kept))
        assert reasoning(kept) == reasoning(whole)[:n]
        if n:
            assert [kept.think[0], kept.think[-1]] == [whole.think[0], whole.think[-1]]
        if kept != whole:                          # one more token and the tags would not fit
            rest = length(trimmed) - len(kept.think)
            assert rest + 2 + n + 1 > budget
            assert length(trimmed) == budget if n else kept.think == []


@settings(max_examples=100)
@given(tight())
def test_earlier_reasoning_is_dropped_only_if_cutting_the_last_does_not_suffice(sample_and_budget):
    sample, budget = sample_and_budget
    trimmed, what = ap_trim(sample, budget)
    needed = length(sample) - len(sample[-1].think)            # with all earlier reasoning but not the last
    if trimmed is not None:
        earlier = sample[:-1] if budget >= needed else without_reasoning(sample[:-1])
        assert trimmed[:-1] == earlier
        assert (what == 'earlier dropped') == (budget < needed)


@settings(max_examples=100)
@given(tight())
def test_dropped_only_if_questions_and_answers_alone_do_not_fit(sample_and_budget):
    sample, budget = sample_and_budget
    assert (ap_trim(sample, budget)[0] is None) == (length(without_reasoning(sample)) > budget)


@settings(max_examples=100)
@given(tight())
def test_ap_trimming_twice_is_ap_trimming_once(sample_and_budget):
    sample, budget = sample_and_budget
    trimmed, _ = ap_trim(sample, budget)
    if trimmed is not None:
        assert ap_trim(trimmed, budget) == (trimmed, 'kept')


@settings(max_examples=100)
@given(tight())
def test_a_larger_budget_never_gives_a_shorter_result_or_a_later_rule(sample_and_budget):
    sample, budget = sample_and_budget
    (smaller, what), (larger, later) = ap_trim(sample, budget), ap_trim(sample, budget + 1)
    rank = ['kept', 'cut', 'earlier dropped', 'dropped'].index
    assert rank(later) <= rank(what)
    if smaller is not None:
        assert length(larger) >= length(smaller)
        if later == what:                          # same rule: the shorter reasoning is a prefix
            assert all(reasoning(b)[:len(reasoning(a))] == reasoning(a) for a, b in zip(smaller, larger))


@settings(max_examples=100)
@given(samples(), st.integers(0, 60))
def test_truncation_keeps_the_first_tokens_and_their_scores(sample, budget):
    trimmed, _ = truncate(sample, budget)
    tokens, scored = flatten(sample)
    assert flatten(trimmed or []) == (tokens[:budget], scored[:budget])
    assert all(any(turn) for turn in trimmed or [])


@given(tight())
def test_drop_keeps_all_or_nothing(sample_and_budget):
    sample, budget = sample_and_budget
    assert drop(sample, budget) == ((sample, 'kept') if length(sample) <= budget else (None, 'dropped'))


@given(st.lists(samples(), max_size=8), st.integers(0, 60), st.sampled_from(list(RULES)))
def test_trim_counts_outcomes_and_returns_the_trimmed_samples(many, budget, rule):
    flat, done = trim(iter(many), budget, rule)
    each = [RULES[rule](sample, budget) for sample in many]
    assert done == Counter(what for _, what in each)
    assert [(tokens.tolist(), scored.tolist()) for tokens, scored in flat] == [
        flatten(trimmed) for trimmed, _ in each if trimmed is not None]


# --- packing -----------------------------------------------------------------------------------------------


def naive_best_fit_decreasing(lengths, capacity):
    """Return the space left in each bin, by definition: comparing each sample with every bin."""
    spaces = []
    for n in sorted(lengths, reverse=True):
        fitting = [b for b, space in enumerate(spaces) if space >= n]
        if not fitting:
            fitting = [len(spaces)]
            spaces.append(capacity)
        spaces[min(fitting, key=lambda b: spaces[b])] -= n
    return spaces


def first_fit(lengths, capacity):
    """Return the number of bins of first-fit: each sample, in order, goes into the first bin that has room."""
    spaces = np.full(len(lengths), capacity)
    for n in lengths:
        spaces[np.argmax(spaces >= n)] -= n
    return int(np.count_nonzero(spaces < capacity))


LENGTHS = st.integers(1, 40).flatmap(lambda capacity: st.tuples(
    st.lists(st.integers(1, capacity), max_size=60), st.just(capacity)))


@settings(max_examples=100)
@given(LENGTHS)
def test_every_sample_is_in_one_bin_and_no_bin_is_over_full(lengths_and_capacity):
    lengths, capacity = lengths_and_capacity
    bins = pack(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= capacity for members in bins)
    assert bins == pack(np.array(lengths, int), capacity)      # deterministic


@settings(max_examples=150)
@given(LENGTHS)
def test_packing_equals_naive_best_fit_decreasing(lengths_and_capacity):
    lengths, capacity = lengths_and_capacity
    spaces = [capacity - sum(lengths[i] for i in members) for members in pack(lengths, capacity)]
    assert sorted(spaces) == sorted(naive_best_fit_decreasing(lengths, capacity))


CAPACITY = 512
DISTRIBUTIONS = {
    'uniform': lambda rng, n: rng.integers(1, CAPACITY + 1, n),
    'short': lambda rng, n: rng.integers(1, CAPACITY // 8, n),
    'long': lambda rng, n: rng.integers(CAPACITY // 4, CAPACITY + 1, n),
    'trimmed': lambda rng, n: np.minimum(rng.lognormal(np.log(CAPACITY / 6), 1, n).astype(int) + 1, CAPACITY),
    'two sizes': lambda rng, n: rng.choice([CAPACITY // 2 + 1, CAPACITY // 3], n),
}


@pytest.mark.parametrize('name', DISTRIBUTIONS)
def test_packing_needs_at_most_one_percent_more_bins_than_first_fit(name):
    for seed in range(5):
        lengths = DISTRIBUTIONS[name](np.random.default_rng(seed), 2000).tolist()
        assert len(pack(lengths, CAPACITY)) <= 1.01 * first_fit(lengths, CAPACITY) + 1


@pytest.mark.parametrize('name', ['uniform', 'short', 'trimmed'])     # two long samples never fit together
def test_packing_is_within_two_percent_of_the_lower_bound(name):
    for seed in range(5):
        lengths = DISTRIBUTIONS[name](np.random.default_rng(seed), 2000).tolist()
        bins = pack(lengths, CAPACITY)
        wasted, fewest = padding(lengths, bins, CAPACITY)
        assert fewest <= len(bins) <= 1.02 * fewest + 1
        assert wasted == pytest.approx((len(bins) * CAPACITY - sum(lengths)) / (len(bins) * CAPACITY))


def test_a_hundred_thousand_samples_pack_in_seconds():
    lengths = np.random.default_rng(0).integers(1, 4097, 100_000).tolist()
    start = time.perf_counter()
    pack(lengths, 4096)
    assert time.perf_counter() - start < 10        # 0.3 s; comparing with every bin takes minutes


def test_lower_bound_and_padding_of_a_case_computed_by_hand():
    bins = pack([3, 5, 2, 4], 7)                   # 5 + 2, 4 + 3
    assert bins == [[1, 2], [3, 0]]
    assert padding([3, 5, 2, 4], bins, 7) == (0, 2)
    assert padding([3, 5], [[0], [1]], 7) == (pytest.approx(6 / 14), 2)
    assert padding([3, 4, 1], [[0, 1], [2]], 7)[1] == 2


@pytest.mark.parametrize('lengths, says', [([3, 9, 8], 'sample 1 has 9 tokens, must be 1 to 7'), ([3, 0], '1 has 0')])
def test_sample_that_cannot_be_packed_is_a_one_line_error_naming_it(lengths, says):
    with pytest.raises(ValueError, match=says) as raised:
        pack(lengths, 7)
    one_line(raised)


# --- packed datasets----------------------------------------------------------------------------------------


def read_packed(folder, split):
    """Return the documents of a split, each as (tokens, is_target), and the number of padding positions."""
    meta = json.loads((folder / 'meta.json').read_text())
    shape = meta[split]['windows'], meta['packed']
    windows = np.fromfile(folder / f'{split}.bin', meta['dtype']).reshape(shape)
    all_flags = np.fromfile(folder / f'{split}.flags', np.uint8).reshape(shape)
    documents, n_padding = [], 0
    for window, flags in zip(windows, all_flags):
        starts = np.flatnonzero(flags & STARTS)
        assert starts[0] == 0 and flags.max() <= (SCORED | STARTS)
        for tokens, marks in zip(np.split(window, starts)[1:], np.split(flags, starts)[1:]):
            assert not marks[-1] & SCORED          # the next token belongs to another document
            if tokens.any():
                documents.append((tokens.tolist(), [False] + (marks[:-1] & SCORED).astype(bool).tolist()))
            else:
                n_padding += len(tokens)
                assert not (marks & SCORED).any() and len(tokens) == len(window) - starts[-1]   # at the end
    return documents, n_padding


def write(splits, out, capacity):
    """Write a packed dataset to the folder out; return its meta.json."""
    write_packed(splits, out, capacity, ENC)
    return json.loads((out / 'meta.json').read_text())


FLAT = st.integers(1, 12).flatmap(lambda n: st.tuples(        # tokens from 1 (0 is padding) and their scores
    st.lists(st.integers(1, 299), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n)))
SURE = st.just(([5, 6], [False, True]))                        # a split without a target is an error


@settings(max_examples=60)
@given(st.lists(FLAT, max_size=30), st.lists(FLAT, max_size=5), SURE, st.integers(12, 30))
def test_packed_documents_read_back_with_their_targets(tmp_path_factory, train, val, sure, capacity):
    folder = tmp_path_factory.mktemp('packed')
    splits = {'train': train + [sure], 'val': [sure] + val}
    meta = write(splits, folder, capacity)
    for split, flat in splits.items():
        documents, n_padding = read_packed(folder, split)
        # a document's first token is never a target
        assert sorted(documents) == sorted((tokens, [False] + scored[1:]) for tokens, scored in flat)
        n_tokens, counts = sum(len(tokens) for tokens, _ in flat), meta[split]
        assert (counts['tokens'], counts['documents']) == (n_tokens, len(flat))
        assert counts['windows'] * capacity == n_tokens + n_padding
        assert counts['padding'] == pytest.approx(n_padding / (counts['windows'] * capacity), abs=1e-6)
    assert meta['packed'] == capacity and meta['vocab_size'] == ENC.n_vocab and meta['dtype'] == 'uint16'
    assert sorted(path.name for path in folder.iterdir()) == [
        'bpe.json', 'meta.json', 'train.bin', 'train.flags', 'val.bin', 'val.flags']


def test_flags_of_a_window_computed_by_hand(tmp_path):
    write({'train': [([7, 8, 9], [False, True, True]), ([5, 6], [True, False])]}, tmp_path, 8)
    assert np.fromfile(tmp_path / 'train.bin', '<u2').tolist() == [7, 8, 9, 5, 6, 0, 0, 0]
    assert np.fromfile(tmp_path / 'train.flags', np.uint8).tolist() == [3, 1, 0, 2, 0, 2, 0, 0]


def test_large_vocabulary_is_written_as_uint32(tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [b'%06d' % i for i in range(70_000)]
    enc = make_encoding(PATTERN, tokens, SPECIAL_TOKENS)
    write_packed({'train': [([1, 70_000], [False, True])]}, tmp_path, 3, enc)
    assert np.fromfile(tmp_path / 'train.bin', '<u4').tolist() == [1, 70_000, 0]
    assert json.loads((tmp_path / 'meta.json').read_text())['dtype'] == 'uint32'


def test_interrupted_write_leaves_the_old_dataset(tmp_path, monkeypatch):
    write({'train': [([5, 6], [False, True])]}, tmp_path, 8)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(data.reasoning, 'padding', interrupt)
    with pytest.raises(KeyboardInterrupt):
        write({'train': [([7, 8, 9], [False, True, True])]}, tmp_path, 8)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_memory_mapped_old_file_stays_unchanged(tmp_path):
    write({'train': [([5, 6], [False, True])]}, tmp_path, 4)
    old = [np.memmap(tmp_path / f'train.{suffix}', np.uint8, mode='r') for suffix in ('bin', 'flags')]
    before = [bytes(mapped) for mapped in old]
    write({'train': [([9, 9, 9], [False, True, True])]}, tmp_path, 4)
    assert [bytes(mapped) for mapped in old] == before


@pytest.mark.parametrize('flat, says', [
    ([([5, 6, 7], [False, True, True])], 'val: sample 0 has 3 tokens'),
    ([], 'val has nothing to learn from: none of its 0'),
    ([([5, 6], [True, False])], 'val has nothing to learn from'),
])
def test_samples_that_cannot_be_written_are_an_error_before_anything_is_written(tmp_path, flat, says):
    good = [([5, 6], [False, True])]
    write({'train': good, 'val': good}, tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=says) as raised:
        write({'train': good * 3, 'val': flat}, tmp_path, 2)
    one_line(raised)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- data/chat/prepare.py ----------------------------------------------------------------------------------


def run(*arguments, **environment):
    return subprocess.run([sys.executable, '-m', 'data.chat.prepare', *map(str, arguments)],
                          capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)


def write_sums(path, n=40):
    """Write conversations about sums, with reasoning of several lengths; every fifth has two turns. Return the rows."""
    rows = []
    for i in range(n):
        think = ' and then '.join(f'{i} plus {k} is {i + k}' for k in range(i % 7 + 1))
        turns = [(f'{i} + {k}?', '', think, f'It is {i + k}.') for k in range(2 if i % 5 == 0 else 1)]
        rows.append(row_of(turns))
    path.write_text('\n'.join(map(json.dumps, rows)))
    return rows


def test_script_is_deterministic_and_preserves_every_answer(tmp_path):
    rows = write_sums(tmp_path / 'sums.jsonl')
    outs = [tmp_path / 'out0', tmp_path / 'out1']
    for seed, out in enumerate(outs):
        done = run(tmp_path / 'sums.jsonl', f'--out={out}', '--context=48', '--vocab_size=300',
                   PYTHONHASHSEED=str(seed))
        assert done.returncode == 0, done.stderr
        for says in ('with reasoning', 'ap to 48 tokens', ' kept', ' cut', '% padding'):
            assert says in done.stdout
    written = sorted(path.name for path in outs[0].iterdir())
    assert all((outs[0] / name).read_bytes() == (outs[1] / name).read_bytes() for name in written)

    enc = load_tokenizer(outs[0] / 'bpe.json')
    samples = [enc.decode(tokens) for split in ('train', 'val') for tokens, _ in read_packed(outs[0], split)[0]]
    for row in rows:
        history = ''
        for question, reply in zip(row['messages'][::2], row['messages'][1::2]):
            history += f'<|user|>{question["content"]}<|end|><|assistant|>'
            answer = f'{split_think(reply["content"])[1]}<|end|>'
            assert any(text.startswith(history) and text.endswith(answer) for text in samples)
            history += answer
    assert len(samples) == sum(len(row['messages']) // 2 for row in rows)


def test_tokenizer_from_gives_two_datasets_one_vocabulary(tmp_path):
    write_sums(tmp_path / 'sums.jsonl')
    (tmp_path / 'other').mkdir()
    save_tokenizer(tmp_path / 'other' / 'bpe.json', ENC)
    done = run(tmp_path / 'sums.jsonl', f"--out={tmp_path / 'out'}", f"--tokenizer_from={tmp_path / 'other'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'out' / 'bpe.json').read_bytes() == (tmp_path / 'other' / 'bpe.json').read_bytes()
    assert json.loads((tmp_path / 'out' / 'meta.json').read_text())['vocab_size'] == ENC.n_vocab


def test_conversations_with_the_same_question_are_in_the_same_split(tmp_path):
    lines = [line_of(f'question {i // 5}', f'answer {i}') for i in range(500)]
    (tmp_path / 'some.jsonl').write_bytes(b'\n'.join(lines))
    prepare_chat([tmp_path / 'some.jsonl'], ChatConfig(out=str(tmp_path), vocab_size=300))
    enc = load_tokenizer(tmp_path / 'bpe.json')
    questions = [{enc.decode(tokens).split('<|end|>')[0] for tokens, _ in read_packed(tmp_path, split)[0]}
                 for split in ('train', 'val')]
    assert len(questions[0]) + len(questions[1]) == 100 and not questions[0] & questions[1]


def test_think_tags_are_not_in_the_text_that_trains_the_vocabulary():
    found = texts([messages_of(row_of([('<think>q</think>', '', 't', 'a'), ('r', '', None, 'b <think>')]), '')])
    assert list(found) == ['<think>q</think>', 't', 'a', 'r', 'b <think>']


@pytest.mark.parametrize('arguments, says', [
    (['no/such/file'], 'no/such/file'),
    ([], 'FILE.jsonl'),
    (['bad.jsonl'], 'bad.jsonl, line 2: '),
    (['one.jsonl'], 'too few'),
    (['sums.jsonl', '--context=0'], 'context is 0'),
    (['sums.jsonl', '--context=1_000_000_000'], 'context is 1000000000'),
    (['sums.jsonl', '--context=3'], 'larger context'),
    (['sums.jsonl', '--rule=cut'], 'one of ap, truncate, drop'),
    (['sums.jsonl', '--vocab_size=12'], 'vocab_size'),
    (['sums.jsonl', '--tokenizer_from=EMPTY'], 'bpe.json: cannot be read'),
    (['sums.jsonl', '--out=sums.jsonl'], 'sums.jsonl'),
])
def test_bad_arguments_exit_non_zero_with_a_line_and_no_traceback(tmp_path, arguments, says):
    write_sums(tmp_path / 'sums.jsonl')
    (tmp_path / 'bad.jsonl').write_bytes(GOOD + b'\n{}\n')
    (tmp_path / 'one.jsonl').write_bytes(GOOD)
    (tmp_path / 'EMPTY').mkdir()
    for name in ('sums.jsonl', 'bad.jsonl', 'one.jsonl', 'EMPTY'):
        arguments = [argument.replace(name, str(tmp_path / name)) for argument in arguments]
    done = run(f'--out={tmp_path}/out', *arguments)  # the last --out applies
    assert done.returncode == 1 and says in done.stderr
    assert done.stderr.startswith('data.chat.prepare: ') and done.stderr.count('\n') == 1
