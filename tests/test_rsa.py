"""Markovian RSA (rsa.py) with fake models: special cases, bounds, bookkeeping, and why voting helps; then the command
line, with tiny random models."""
import itertools
import math
import random
import re
import statistics
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st

from common import run_script, tiny_model
from tasks.loops import task
from tasks.loops.task import ENC, test_problems as problems_of
from tasks.problems import majority_vote, mean_ci95, print_population, score
from data.tokenizer import save_tokenizer
from runtime.checkpoint import save_checkpoint
from runtime.pretrained import save_pretrained
from rsa import RSASettings, markovian_rsa
from sample import SamplingOptions
from tasks.policy import load_policy
from test_language import write_language

OPEN, CLOSE, MARK = 100, 101, 9         # a tail's brackets in a prompt; the answer follows the first MARK in an output


def build_prompt(question, tails):
    return question + [token for tail in tails for token in [OPEN, *tail, CLOSE]]


def answer_of(output):
    return output[output.index(MARK) + 1:] or None if MARK in output else None


def rsa(questions, generate, build_prompt=build_prompt, answer_of=lambda output: None, **settings):
    """Run markovian_rsa with a prompt format and settings. Return the rounds of each question."""
    policy = SimpleNamespace(build_prompt=build_prompt, answer_of=answer_of, thought_of=list)
    return markovian_rsa(questions, generate, policy, RSASettings(**settings))


def tokens_of(rounds):
    return sum(now.tokens for now in rounds)


def each(now, field):
    """One field of all candidates of a round."""
    return [getattr(c, field) for c in now.candidates]


def fake_generate(calls=None):
    """A model that depends only on the prompt and on how often the batch held it before: tokens 0-9 at random, ending
    early, with nothing at all, or without an answer, as it happens. Notes (prompts, max_new_tokens) in `calls`."""
    def generate(prompts, max_new_tokens):
        if calls is not None:
            calls.append((prompts, max_new_tokens))
        seen, outputs = Counter(), []
        for prompt in prompts:
            rng = random.Random(f'{prompt} {seen[str(prompt)]}')
            seen[str(prompt)] += 1
            length = rng.choice([0, max_new_tokens, rng.randint(0, max_new_tokens)])
            outputs.append([rng.randrange(10) for _ in range(length)])
        return outputs
    return generate


@st.composite
def settings(draw, **fixed):
    """Keyword arguments that make sense, with those of `fixed` as they are."""
    drawn = {'population': draw(st.integers(1, 6)), 'rounds': draw(st.integers(0, 4)),
             'budget': draw(st.integers(1, 12)), 'final_budget': draw(st.integers(0, 20)),
             'compact': draw(st.sampled_from(['tail', 'answer'])), 'answer_of': answer_of,
             'seed': draw(st.integers(0, 100))} | fixed
    drawn['candidates'] = fixed.get('candidates', draw(st.integers(1, drawn['population'])))
    drawn['tail'] = fixed.get('tail', draw(st.integers(1, drawn['budget'])))
    return drawn


# Different questions: two equal ones would share the fake model's counter of prompts.
questions = st.lists(st.lists(st.integers(20, 22), min_size=1, max_size=6), min_size=1, max_size=4, unique_by=tuple)


def with_before(result):
    """Pairs (a round, the one before it)."""
    return list(zip(result[1:], result))


# ---- special cases ----

@given(questions, settings(rounds=0))
def test_without_rounds_it_is_parallel_sampling(qs, kwargs):
    n, calls = kwargs['population'], []
    results = rsa(qs, fake_generate(calls), **kwargs)
    budget = kwargs['final_budget'] or kwargs['budget']         # the only round is the last
    assert calls == [([q for q in qs for _ in range(n)], budget)]
    for q, result in zip(qs, results):
        assert each(result[-1], 'output') == fake_generate()([q] * n, budget)
        assert each(result[0], 'sampled') == [[]] * n


@given(questions, settings(compact='tail'))
def test_a_tail_as_long_as_the_budget_is_full_chain_rsa(qs, kwargs):
    kwargs['tail'] = kwargs['budget']
    if kwargs['candidates'] == 1:
        kwargs['answer_of'] = lambda output: None               # so that all continue
    for q, result in zip(qs, rsa(qs, fake_generate(), **kwargs)):
        for now, before in with_before(result):
            outputs = each(before, 'output')
            assert each(before, 'tail') == outputs
            assert each(now, 'prompt') == [build_prompt(q, [outputs[j] for j in c.sampled]) for c in now.candidates]


@given(questions, settings(candidates=1, compact='tail'))
def test_one_candidate_carries_its_own_tail(qs, kwargs):
    for q, result in zip(qs, rsa(qs, fake_generate(), **kwargs)):
        for now, before in with_before(result):
            for i, (c, own) in enumerate(zip(now.candidates, before.candidates)):
                assert c.sampled == [i]
                if own.answer is None:
                    assert c.prompt == q + [OPEN, *own.output[-kwargs['tail']:], CLOSE]
                else:
                    assert c.prompt is None


@given(questions, settings(candidates=1))
def test_a_finished_chain_stays_finished_and_costs_nothing(qs, kwargs):
    for result in rsa(qs, fake_generate(), **kwargs):
        for now, before in with_before(result):
            pairs = list(zip(now.candidates, before.candidates))
            for c, own in pairs:
                if own.answer is not None:
                    assert (c.output, c.answer, c.tail) == (own.output, own.answer, own.tail)
            assert now.tokens == sum(len(c.output) for c, own in pairs if own.answer is None)


def count_to(prompts, max_new_tokens):
    """Counts 1, 2, ... up to the question, then -1 and the question; goes on from the tail's last number."""
    outputs = []
    for target, *tail in prompts:
        start = tail[-2] if len(tail) > 2 else 0                # tail: nothing, or OPEN ... CLOSE
        outputs.append([*range(start + 1, target + 1), -1, target][:max_new_tokens])
    return outputs


def test_a_chain_reaches_what_no_single_rollout_can():
    def run(rounds):
        return rsa([[30], [12]], count_to, population=2, candidates=1, rounds=rounds, budget=8, tail=2,
                   answer_of=lambda output: output[-1:] if -1 in output[:-1] else None)
    deep, shallow = run(9)
    answers = lambda result: each(result[-1], 'answer')
    assert answers(deep) == [[30]] * 2 and answers(shallow) == [[12]] * 2
    assert tokens_of(deep) == 2 * 32 and tokens_of(shallow) == 2 * 14           # counted once, not a token more
    assert [now.tokens for now in shallow] == [16, 12, *[0] * 8]
    assert all(len(c.prompt) <= 5 for now in deep for c in now.candidates if c.prompt)
    assert [answers(result) for result in run(2)] == [[None] * 2, [[12]] * 2]
    assert [answers(result) for result in run(0)] == [[None] * 2] * 2


def test_generate_is_not_called_with_an_empty_batch():
    calls = []
    rsa([[3]], lambda *a: calls.append(a) or count_to(*a), population=2, candidates=1, rounds=5, budget=8, tail=2,
        answer_of=lambda output: output[-1:])                   # every output is an answer
    assert len(calls) == 1


# ---- sampled candidates ----

@given(questions, settings())
def test_candidates_are_sampled_without_replacement_from_the_population(qs, kwargs):
    for result in rsa(qs, fake_generate(), **kwargs):
        assert len(result) == kwargs['rounds'] + 1
        for now, _ in with_before(result):
            assert len(now.candidates) == kwargs['population']
            for reads in each(now, 'sampled'):
                assert len(set(reads)) == len(reads) == kwargs['candidates']
                assert set(reads) <= set(range(kwargs['population']))


def all_sampled(population, candidates, rounds, questions=((1,),), seed=0):
    results = rsa([list(q) for q in questions], lambda prompts, n: [[0]] * len(prompts), population=population,
                  candidates=candidates, rounds=rounds, budget=1, tail=1, seed=seed)
    return [[each(now, 'sampled') for now in result[1:]] for result in results]


def chi_square(samples, outcomes):
    """Pearson's statistic of `samples` against equally likely `outcomes`, in standard deviations above its mean."""
    counts, expected = Counter(samples), len(samples) / len(outcomes)
    assert set(counts) <= set(outcomes)
    statistic = sum((counts[outcome] - expected) ** 2 / expected for outcome in outcomes)
    return (statistic - (len(outcomes) - 1)) / math.sqrt(2 * (len(outcomes) - 1))


def test_candidates_are_sampled_uniformly():
    (rounds,) = all_sampled(5, 3, 3000)
    orders = list(itertools.permutations(range(5), 3))          # the order of the tails is uniform, too
    for i in range(5):                                          # no preference for itself, or any other
        assert chi_square([tuple(now[i]) for now in rounds], orders) < 4


def test_samples_of_candidates_and_of_rounds_are_independent():
    (rounds,) = all_sampled(4, 2, 8000)
    pairs = list(itertools.product(itertools.combinations(range(4), 2), repeat=2))
    subset = lambda reads: tuple(sorted(reads))
    assert chi_square([(subset(now[0]), subset(now[1])) for now in rounds], pairs) < 4
    assert chi_square([(subset(now[0]), subset(after[0])) for now, after in zip(rounds[::2], rounds[1::2])], pairs) < 4


def test_seeds_reproduce_the_samples_and_questions_have_their_own():
    a, b = all_sampled(16, 4, 3, [(1,), (2,)])
    assert [a, b] == all_sampled(16, 4, 3, [(1,), (2,)])
    assert a != b and a != all_sampled(16, 4, 3, [(1,)], seed=1)[0]
    assert all(x != y for x, y in itertools.combinations(a, 2))                 # no round repeats another's
    on_any_machine = [[[0, 2], [1, 2], [1, 2]], [[0, 1], [2, 0], [0, 2]]]
    assert all_sampled(3, 2, 2, [(1, 2, 3)], seed=7) == [on_any_machine]


@given(questions, settings())
def test_a_question_does_not_depend_on_its_neighbours(qs, kwargs):
    together = rsa(qs, fake_generate(), **kwargs)
    assert together == [rsa([q], fake_generate(), **kwargs)[0] for q in qs]
    assert together[::-1] == rsa(qs[::-1], fake_generate(), **kwargs)


@given(questions, settings(final_budget=0))
def test_more_rounds_start_with_the_same_rounds(qs, kwargs):
    few = rsa(qs, fake_generate(), **kwargs)
    more = rsa(qs, fake_generate(), **kwargs | {'rounds': kwargs['rounds'] + 2})
    for a, b in zip(few, more):
        assert b[:len(a)] == a


# ---- bounds and bookkeeping ----

@given(questions, settings())
def test_no_prompt_is_longer_than_question_and_tails(qs, kwargs):
    for q, result in zip(qs, rsa(qs, fake_generate(), **kwargs)):
        for c in [c for now in result for c in now.candidates]:
            assert len(c.tail) <= kwargs['tail']
            assert c.prompt is None or len(c.prompt) <= len(q) + kwargs['candidates'] * (kwargs['tail'] + 2)


def test_the_longest_prompt_is_the_same_for_every_budget_and_number_of_rounds():
    full = lambda prompts, n: [[0] * n for _ in prompts]
    for budget, rounds in itertools.product((5, 50, 500), (1, 2, 20)):
        result, = rsa([[1, 2]], full, budget=budget, rounds=rounds, tail=5)
        assert max(len(prompt) for now in result for prompt in each(now, 'prompt')) == 2 + 4 * (5 + 2)
        assert tokens_of(result) == 16 * (rounds + 1) * budget


@given(questions, settings())
def test_the_record_is_what_happened(qs, kwargs):
    """Every prompt holds the sampled tails of the previous round, every round is one batch of all questions, and tokens
    are those that generate returned."""
    calls, produced, model = [], [], fake_generate()

    def generate(prompts, max_new_tokens):
        calls.append((prompts, max_new_tokens))
        produced.append(model(prompts, max_new_tokens))
        return produced[-1]
    results = rsa(qs, generate, **kwargs)
    n, T, tail = kwargs['population'], kwargs['rounds'], kwargs['tail']
    for t, (prompts, limit) in enumerate(calls):
        last = t == T and kwargs['final_budget']
        assert limit == (kwargs['final_budget'] if last else kwargs['budget'])
        assert prompts == [p for result in results for p in each(result[t], 'prompt') if p is not None]
        assert len(prompts) == len(qs) * n or kwargs['candidates'] == 1
        new = iter(produced[t])
        for result in results:
            assert all(c.output == next(new) for c in result[t].candidates if c.prompt is not None)
    assert len(calls) == T + 1 or kwargs['candidates'] == 1
    assert sum(map(tokens_of, results)) == sum(len(output) for batch in produced for output in batch)
    for q, result in zip(qs, results):
        assert each(result[0], 'prompt') == [q] * n
        for now in result:
            assert len(now.candidates) == n
            assert now.tokens == sum(len(c.output) for c in now.candidates if c.prompt is not None)
            for c in now.candidates:
                assert c.answer == answer_of(c.output)
                source = c.output if c.answer is None or kwargs['compact'] == 'tail' else c.answer
                assert c.tail == source[max(0, len(source) - tail):]
        for now, before in with_before(result):
            for c in now.candidates:
                assert c.prompt is None or c.prompt == build_prompt(q, [before.candidates[j].tail for j in c.sampled])


# ---- outputs that end early ----

def run(outputs, **kwargs):
    """Two rounds of four candidates whose first outputs are given; the second are [7]."""
    batches = iter([outputs, [[7]] * 4])
    kwargs = dict(population=4, candidates=2, rounds=1, budget=6, tail=3, answer_of=answer_of) | kwargs
    return rsa([[1]], lambda prompts, n: next(batches)[:len(prompts)], **kwargs)[0]


OUTPUTS = [[1, 2, 3, 4, 5, 6], [1], [], [2, MARK, 8]]           # cut, early without an answer, empty, finished


def test_short_empty_and_answerless_outputs_are_passed_on():
    first, second = run(OUTPUTS)
    assert each(first, 'tail') == [[4, 5, 6], [1], [], [2, MARK, 8]]
    assert each(first, 'answer') == [None, None, None, [8]]
    for c in second.candidates:                                 # always two tails, also the empty one
        assert c.prompt == [1, *(x for j in c.sampled for x in [OPEN, *first.candidates[j].tail, CLOSE])]
    assert any(2 in c.sampled for c in second.candidates)
    assert (first.tokens, second.tokens) == (10, 4)


def test_nothing_but_empty_outputs_is_a_result_too():
    result, = rsa([[1]], lambda prompts, n: [[] for _ in prompts], budget=5, tail=2)
    assert each(result[-1], 'output') == [[]] * 16 and each(result[-1], 'answer') == [None] * 16
    assert tokens_of(result) == 0


def test_a_chain_that_ended_without_an_answer_gets_another_try():
    first, second = run(OUTPUTS, candidates=1)
    assert each(second, 'prompt') == [[1, OPEN, 4, 5, 6, CLOSE], [1, OPEN, 1, CLOSE], [1, OPEN, CLOSE], None]
    assert each(second, 'output') == [[7], [7], [7], [2, MARK, 8]]
    assert each(second, 'answer') == [None, None, None, [8]] and second.tokens == 3


def test_compact_answer_passes_on_the_answer_of_the_finished_and_the_tail_of_others():
    first, second = run(OUTPUTS, compact='answer')
    assert each(first, 'tail') == [[4, 5, 6], [1], [], [8]]
    assert each(first, 'output') == OUTPUTS
    assert len(second.candidates) == 4 and second.tokens == 4   # the finished are generated again
    assert each(run([[MARK, 1, 2, 3, 4, 5]] * 4, compact='answer')[0], 'tail') == [[3, 4, 5]] * 4   # tau bounds it too


def test_without_answers_no_candidate_is_finished():
    _, second = run(OUTPUTS, candidates=1, answer_of=lambda output: None)
    assert each(second, 'output') == [[7]] * 4 and each(second, 'answer') == [None] * 4


# ---- refused ----

@pytest.mark.parametrize('changes, words', [
    ({'candidates': 5}, 'candidates is 5, it must lie between 1 and 4'), ({'candidates': 0}, 'candidates is 0'),
    ({'population': 0, 'candidates': 0}, 'population is 0'), ({'rounds': -2}, 'rounds is -2'),
    ({'budget': -1}, 'budget is -1'), ({'tail': -1}, 'tail is -1'), ({'budget': 0, 'tail': 16385}, 'tail is 16385'),
    ({'tail': 7}, 'tail is 7, it must lie between 0 and 6'),
    ({'final_budget': -1}, 'final_budget is -1'), ({'compact': 'head'}, "compact is 'head'"),
    ({'questions': []}, 'questions: give at least one'), ({'questions': [[1], []]}, 'questions: give at least one')])
def test_what_makes_no_sense_is_refused_in_one_line(changes, words):
    kwargs = dict(questions=[[1]], population=4, candidates=2, rounds=1, budget=6, tail=3,
                  answer_of=answer_of) | changes

    def generate(prompts, max_new_tokens):
        raise AssertionError('refuse before you generate')
    with pytest.raises(ValueError, match=words) as error:
        rsa(kwargs.pop('questions'), generate, **kwargs)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('outputs', [[[1]], [[1]] * 3, [[1], [1, 2, 3]]])
def test_a_generate_that_breaks_its_contract_is_noticed(outputs):
    with pytest.raises(AssertionError, match='generate gave'):
        rsa([[1]], lambda prompts, n: outputs, population=2, candidates=2, budget=2, tail=2)


# ---- why it works ----

def test_voting_corrects_what_a_lone_chain_keeps():
    """A model that agrees with most of the tails it reads, and errs with probability e, each time in a new way. A lone
    chain never recovers: after T rounds (1 - e)^(T + 1) of them are right. With C = 4 two right tails outvote two wrong
    ones that differ, so the share p of the right ones follows p <- (1 - e) P(Binomial(4, p) >= 2), which stays up."""
    e, T = 0.1, 8

    def accuracy(candidates):
        rng, new_errors = random.Random(0), itertools.count(1)                  # 0 is right, every error a new number

        def generate(prompts, max_new_tokens):
            outputs = []
            for prompt in prompts:
                values = prompt[1:] or [0]                      # round 0 sees the question alone
                most = max(values, key=lambda value: (values.count(value), rng.random()))
                outputs.append([next(new_errors) if rng.random() < e else most])
            return outputs
        results = rsa([[i] for i in range(150)], generate, lambda question, tails: question + sum(tails, []),
                      candidates=candidates, rounds=T, budget=1, tail=1)
        outputs = [each(rounds[-1], 'output') for rounds in results]
        return mean_ci95([score(of_question, lambda output: output == [0])['mean'] for of_question in outputs])

    (alone, alone_ci), (voted, voted_ci) = accuracy(1), accuracy(4)
    p = 1 - e
    for _ in range(T):
        p = (1 - e) * (1 - (1 - p) ** 4 - 4 * p * (1 - p) ** 3)
    assert abs(alone - (1 - e) ** (T + 1)) < 2 * alone_ci < 0.06                # 0.387
    assert abs(voted - p) < 2 * voted_ci < 0.06                                 # 0.896
    assert voted > alone + 0.4


# ---- scores ----

answers = st.lists(st.none() | st.lists(st.integers(0, 2), max_size=1), min_size=1, max_size=8)


@given(answers)
def test_majority_is_the_first_of_the_most_frequent(answers):
    votes = Counter(tuple(a) for a in answers if a is not None)                 # keeps the order of appearance
    expected = next((list(a) for a, n in votes.items() if n == max(votes.values())), None)
    assert majority_vote(answers) == expected


def test_majority_by_example():
    assert majority_vote([[1], [2], [1], [2], [3]]) == [1]                      # a tie
    assert majority_vote([None, None, None, [2]]) == [2]                        # no answer is no vote
    assert majority_vote([None]) is None and majority_vote([]) is None


@given(answers)
def test_scores_match_the_naive_formulas(answers):
    verify = lambda answer: len(answer) and answer[0] == 1                      # fails if asked about None
    got = score(answers, verify)
    assert got['mean'] == pytest.approx(statistics.mean(a == [1] for a in answers))
    assert got['majority'] == (majority_vote(answers) == [1])
    assert got['best_of_n'] == ([1] in answers)
    assert got['best_of_n'] >= max(got['mean'], got['majority'])


def test_an_interval_is_that_of_the_problems_means():
    mean, half = mean_ci95([0.0, 0.5, 1.0, 1.0])
    assert mean == 0.625
    assert half == pytest.approx(1.96 * math.sqrt((0.625 ** 2 + 0.125 ** 2 + 2 * 0.375 ** 2) / 3) / 2)
    assert mean_ci95([1.0] * 5) == (1, 0)
    assert mean_ci95([0.3])[0] == 0.3 and math.isnan(mean_ci95([0.3])[1])
    with pytest.raises(ValueError, match='no values'):
        mean_ci95([])


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng, hits = random.Random(0), 0
    for _ in range(1000):
        mean, half = mean_ci95([rng.betavariate(2, 1) for _ in range(60)])      # true mean 2/3
        hits += abs(mean - 2 / 3) < half
    assert 930 < hits < 965


# ---- the command line ----

FLAGS = ['--population=4', '--candidates=2', '--device=cpu']


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    """A tiny model with random weights, as a run on the loops task leaves it."""
    folder = tmp_path_factory.mktemp('run')
    model = tiny_model(vocab_size=ENC.n_vocab, context=256)
    save_checkpoint(folder, {'model': model.state_dict(), 'model_config': asdict(model.config), 'step': 1})
    save_tokenizer(folder / 'bpe.json', ENC)
    return folder


@pytest.fixture(scope='module')
def released_folder(tmp_path_factory):
    """A tiny random model in the released layout, with a chat template."""
    pytest.importorskip('safetensors')
    folder = write_language(tmp_path_factory.mktemp('released'))
    model = tiny_model(vocab_size=300, context=1024, skip_expert=True)
    model.released_config = {'eos_token_id': 2}
    save_pretrained(model, folder)
    return folder


def test_no_two_calls_use_the_same_random_numbers(run_folder):
    sampler = lambda **options: load_policy(run_folder, torch.device('cpu')).sampler(SamplingOptions(**options))
    generate, prompts = sampler(), [[task.USER, 50]] * 2
    first, second = generate(prompts, 20), generate(prompts, 20)
    assert len({tuple(output) for output in first + second}) == 4
    assert first == sampler()(prompts, 20) != sampler(seed=1)(prompts, 20)


def test_show_tells_every_round_and_who_read_whom(run_folder, monkeypatch, capsys):
    question = problems_of('medium', 1)[0].question
    out, message = run_script(monkeypatch, capsys, 'rsa.py', f'--ckpt={run_folder}', '--show=True',
                              f'--question={question}', *FLAGS)
    assert message is None and out.startswith(f'{question}   ') and f'the answer is {task.solve(question)}' in out
    T = task.rounds_needed(task.parse(question).steps, 41)
    assert re.findall(r'^round (\d)', out, re.M) == [str(t) for t in range(T + 1)]
    assert len(re.findall(r"^ \d  reads  \d. +\d. ", out, re.M)) == 4 * T and 'answers: none' in out


def test_a_question_typed_in_is_run_as_long_as_it_needs(run_folder, monkeypatch, capsys):
    flags = [f'--ckpt={run_folder}', '--question=8x:a-2b*7c+3=5', *FLAGS]
    out, message = run_script(monkeypatch, capsys, 'rsa.py', *flags, '--show=True')
    short, _ = run_script(monkeypatch, capsys, 'rsa.py', *flags)
    assert short.splitlines() == [out.splitlines()[0], out.splitlines()[-1]]
    assert message is None and '24 steps, the answer is' in out and len(re.findall('^round', out, re.M)) == 4


def test_show_marks_what_is_right_so_far(capsys):
    """Three chains of one step: one right, one wrong, one that is done before the second round."""
    said = iter([ENC.encode_ordinary('51a-2=3'), ENC.encode_ordinary('51a-2=4'),
                 [*ENC.encode_ordinary('3'), task.CLOSE, *ENC.encode_ordinary('3'), task.END]] * 2)
    result, = rsa([ENC.encode_ordinary('1x:a-2=5')], lambda prompts, n: [next(said) for _ in prompts],
                  task.build_prompt, task.answer_of, population=3, candidates=1, rounds=1, budget=11, tail=5)
    print_population(result, '1x:a-2=5', ENC.decode, task.judge, task.spaced)
    assert capsys.readouterr().out.splitlines() == [
        '', 'round 0: 2 of 3 are right so far', ' 0  ok    5 1a-2=3', ' 1  wrong 5 1a-2=4',
        ' 2  ok    3</think>3<|end|>',
        '', 'round 1: 2 of 3 are right so far', ' 0  reads  0  ok    5 1a-2=3', ' 1  reads  1! wrong 5 1a-2=4',
        ' 2  reads  2  ok    (finished) 3</think>3<|end|>', '']


def test_a_released_model_is_asked_in_its_chat_format(released_folder, monkeypatch, capsys):
    policy = load_policy(str(released_folder), torch.device('cpu'))
    question = policy.encode('2 + 2?')
    text = lambda tokens: policy.decode(tokens)
    assert text(policy.build_prompt(question, [])) == \
        '<bos><|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n'
    tails = [policy.encode('so it is 4'), policy.encode('</think>5<|im_end|>'), []]
    prompt = text(policy.build_prompt(question, tails))
    assert prompt.startswith('<bos><|im_start|>user\nBelow') and '# Problem\n2 + 2?\n' in prompt
    assert prompt.endswith('\\boxed{}.<|im_end|>\n<|im_start|>assistant\n<think>\n') and '3 attempts' in prompt
    assert '--- 1 ---\nso it is 4\n--- 2 ---\n</think>5<|im_end|>\n--- 3 ---\n\n' in prompt
    assert sum(token == 2 for token in policy.build_prompt(question, tails)) == 1    # text makes none
    long = len(policy.build_prompt(question, [[9] * 100] * 4))
    assert long - len(policy.build_prompt(question, [[9]] * 4)) == 4 * 99
    ended = [97, 4, 98, 4, 99, 2]                                               # a </think> b </think> c <|im_end|>
    assert policy.answer_of(ended) == [99] and policy.thought_of(ended) == [97, 4, 98]

    out, message = run_script(monkeypatch, capsys, 'rsa.py', f'--ckpt={released_folder}', '--question=2 + 2?',
                              '--budget=6', '--tail=3', '--show=True', *FLAGS)
    assert message is None and len(re.findall('^round', out, re.M)) == 3
    assert re.search(r'answers: none; \d+ tokens generated$', out)


BAD_ARGUMENTS = {
    '--ckpt=nowhere': 'nowhere: no such folder',
    '--candidates=5': 'candidates is 5, it must lie between 1 and 4',
    '--population=0': 'population is 0',
    '--tail=50': 'tail is 50, it must lie between 0 and 41',
    '--compact=head': "compact is 'head'",
    '--question=4x:a-2': 'is not a question like',
    '--budget=500': 'more than the context of 256',
    '--final_budget=500': 'more than the context of 256',
    '--question=': 'is not a question like',
    '--temperature=1e999': 'temperature is inf',
    '--sho=True': "unknown key 'sho'; did you mean 'show'?",
    '--out=x': 'out has no effect without --problems: leave it out',
    '--dry_run=True': 'dry_run has no effect without --problems: leave it out',
    '--model=x': 'model has no effect without --server: leave it out',
    '--parallel=2': 'parallel has no effect without --server: leave it out',
    '--problems=x --question=y': 'question has no effect with --problems: leave it out',
    '--problems=x --show=True': 'show has no effect with --problems: leave it out',
    '--server=http://x --device=cpu': 'device has no effect with --server: leave it out',
    '--aggregation_prompt=WORDS': 'aggregation_prompt has no effect on a model trained on the loops task: leave it out',
}


@pytest.mark.parametrize('argument', BAD_ARGUMENTS)
def test_bad_arguments_get_one_line(run_folder, tmp_path, monkeypatch, capsys, argument):
    (tmp_path / 'words').write_text('{problem} {candidates}')
    arguments = argument.replace('WORDS', str(tmp_path / 'words')).split(' ')
    _, message = run_script(monkeypatch, capsys, 'rsa.py', f'--ckpt={run_folder}', *FLAGS, *arguments)
    assert BAD_ARGUMENTS[argument] in message


def test_a_model_of_something_else_gets_one_line(released_folder, dataset, tmp_path, monkeypatch, capsys):
    model = tiny_model(vocab_size=300)
    save_checkpoint(tmp_path, {'model': model.state_dict(), 'model_config': asdict(model.config), 'step': 1})
    (tmp_path / 'bpe.json').write_bytes((dataset / 'bpe.json').read_bytes())
    for folder in tmp_path, released_folder:
        _, message = run_script(monkeypatch, capsys, 'rsa.py', f'--ckpt={folder}', *FLAGS)
        assert 'needs a --question or a file of --problems' in message
