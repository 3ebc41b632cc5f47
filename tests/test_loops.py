"""The loops task (tasks/loops/): the verifier, solutions, simulated candidates and the prepared datasets."""
import json
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from common import ENV, ROOT, TINY_RUN
from configurator import read
from data.loader import open_dataset
from tasks.loops import task
from tasks.loops.prepare import LoopsConfig, prepare_loops
from tasks.loops.task import (CLOSE, END, ENC, LENGTHS, OPERATIONS, STEP, THINK, Problem, aggregation_sample, answer_of,
                              build_prompt, continue_chain, draw_problem, encode_chain, judge, majority_vote, parse,
                              simulate_candidate, solve, split_of, tail_of, test_problems as problems_of, trace_sample)
from data.reasoning import flatten
from data.tokenizer import load_tokenizer, save_tokenizer
from model import ZayaConfig
from train import TrainConfig, train

operations = st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=8).map(tuple)
problems = st.builds(Problem, st.integers(1, 9), operations, st.integers(0, 9))
seeds = st.integers(0, 10 ** 6)


def interpret(question):
    """Return the values after 0, 1, 2, ... steps, by Python's own arithmetic; only the results are taken modulo 10."""
    loops, program = question.split('x:')
    program, start = program.split('=')
    operations = re.split('[a-h]', program)[1:]
    values = [int(start)]
    for operation in operations * int(loops):
        values.append(eval(f'{values[-1]} {operation}'))
    return [value % 10 for value in values]


def steps_of(problem, text):
    """Return (first value, [(steps done, value), ...]) of the text of a solution, which must parse completely."""
    first, rest = int(text[0]), text[1:]
    steps = re.findall(r'([1-9])([a-h])([-+*]\d)=(\d)', rest)
    assert ''.join(f'{loop}{label}{op}={value}' for loop, label, op, value in steps) == rest
    K, found = len(problem.operations), []
    for loop, label, op, value in steps:
        i = 'abcdefgh'.index(label)
        assert op == problem.operations[i]
        found.append(((problem.loops - int(loop)) * K + i + 1, int(value)))
    return first, found


# ---- problems ----

@given(problems)
def test_the_verifier_agrees_with_an_independent_interpreter(problem):
    assert solve(problem.question) == interpret(problem.question)[-1]
    assert parse(problem.question) == problem and problem.steps == len(interpret(problem.question)) - 1


def test_by_example():
    assert [solve(q) for q in ('1x:a-2=1', '2x:a*7b+1=3', '3x:a*9=9', '4x:a-2b*7c+3=5')] == [9, 5, 1, 5]
    assert Problem(4, ('-2', '*7'), 0).question == '4x:a-2b*7=0'


@pytest.mark.parametrize('question', [
    '', '4x:a-2', '0x:a-2=1', '4x:=1', '4x:b-2=1', '4x:a-6=1', '4x:a*2=1', '4x:a-2=11', '4x:a-2a+1=3', '4x:a-2=1\n',
    '4x:' + ''.join(f'{label}+1' for label in task.LABELS + '{') + '=3', '٤x:a-2=1', '4x:a-2=٣'])
def test_an_invalid_question_is_a_one_line_error(question):
    with pytest.raises(ValueError, match='is not a question like') as error:
        parse(question)
    assert '\n' not in str(error.value)


def test_every_operation_can_be_undone():
    """So a single error is never undone by later steps: it can only be outvoted."""
    for operation in OPERATIONS:
        assert sorted(task.apply(operation, value) for value in range(10)) == list(range(10))


@pytest.mark.parametrize('split', LENGTHS)
def test_test_problems_are_held_out_different_and_of_the_stated_lengths(split):
    few, many = problems_of(split, 50), problems_of(split, 200)
    assert many[:50] == few and len(set(many)) == 200
    low, high = LENGTHS[split]
    assert all(low <= p.steps <= high and split_of(p.question) == 'test' for p in many)
    assert len({p.steps for p in many}) > 1


def test_prepared_programs_have_at_most_as_many_operations_as_asked_for(tmp_path):
    for least, operations in (4, 4), (16, 26):
        prepare_loops(LoopsConfig(str(tmp_path / f'{operations}'), traces=40, votes=40, operations=operations))
        for name in 'traces', 'votes':
            questions = questions_in(tmp_path / f'{operations}' / name, 'train')
            assert least <= max(len(parse(question).operations) for question in questions) <= operations


def test_the_hash_divides_questions_in_a_fixed_proportion():
    rng = random.Random(0)
    counts = Counter(split_of(f'{rng.random()}') for _ in range(8000))
    assert abs(counts['test'] - 1000) < 120 and abs(counts['val'] - 1000) < 120
    assert [split_of(q) for q in ('1x:a-2=1', '1x:a-2=2', '1x:a-2=3')] == ['train', 'train', 'test']    # on any machine


def questions_in(folder, split):
    """Return the questions of a prepared dataset, one per document."""
    meta, enc = json.loads((folder / 'meta.json').read_text()), load_tokenizer(folder / 'bpe.json')
    text = enc.decode(np.fromfile(folder / f'{split}.bin', meta['dtype']).tolist())
    found = re.findall(r'<\|user\|>(.*?=\d)', text)
    assert len(found) == meta[split]['documents']
    return found


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('loops')
    prepare_loops(LoopsConfig(str(folder), context=128, traces=300, votes=300, high=30))
    return folder


@pytest.mark.parametrize('name', ['traces', 'votes'])
def test_train_val_and_test_share_no_question(prepared, name):
    for split in ('train', 'val'):
        assert {split_of(question) for question in questions_in(prepared / name, split)} == {split}


# ---- tokens ----

def test_an_operation_and_every_other_character_is_one_token(tmp_path):
    save_tokenizer(tmp_path / 'bpe.json', ENC)
    for enc in ENC, load_tokenizer(tmp_path / 'bpe.json'):      # the file is complete
        pieces = [enc.decode([token]) for token in enc.encode_ordinary('4x:a-2b*7=0[4a-2=8]\n')]
        assert pieces == ['4', 'x', ':', 'a', '-2', 'b', '*7', '=', '0', '[', '4', 'a', '-2', '=', '8', ']', '\n']
        assert ENC.decode(enc.encode_ordinary('any é text +12')) == 'any é text +12'


@given(st.lists(st.lists(st.integers(0, 255), max_size=10), max_size=4))
def test_a_prompt_consists_of_question_and_tails(tails):
    question = ENC.encode_ordinary('4x:a-2=0')
    prompt = build_prompt(question, tails)
    assert len(prompt) == len(question) + 4 + sum(len(tail) + 2 for tail in tails)
    assert prompt[-1] == THINK
    assert build_prompt(question, [[*tail, CLOSE, 55, END] for tail in tails]) == \
        build_prompt(question, [[*tail, CLOSE, 55] for tail in tails])          # a tail ends in its last value


def test_only_a_complete_answer_is_an_answer():
    said = [*ENC.encode_ordinary('81a-2=6'), CLOSE, *ENC.encode_ordinary('6'), END]
    assert ENC.decode(answer_of(said)) == '6'
    assert [answer_of(said[:n]) for n in range(len(said))] == [None] * len(said)
    assert answer_of([CLOSE, END]) is None and answer_of([CLOSE, 54, 55, END]) is None


# ---- solutions ----

@given(problems, seeds)
def test_a_solution_without_noise_runs_the_program(problem, seed):
    (turn,) = trace_sample(random.Random(seed), problem, noise=0)
    assert [turn.think[0], turn.think[-1], turn.answer[-1]] == [THINK, CLOSE, END]
    assert ENC.decode(turn.prompt) == f'<|user|>{problem.question}<|end|><|assistant|>'
    first, steps = steps_of(problem, ENC.decode(turn.think[1:-1]))
    assert [(0, first), *steps] == list(enumerate(interpret(problem.question)))
    assert ENC.decode(turn.answer[:-1]) == str(solve(problem.question))
    assert len(turn.think) == 3 + STEP * problem.steps


@given(problems, seeds)
def test_after_an_error_a_solution_continues_from_the_wrong_value(problem, seed):
    chain = continue_chain(problem, [(0, problem.start)], problem.steps, random.Random(seed), 0.3)
    right = [task.apply(problem.operations[i % len(problem.operations)], value) for i, value in chain[:-1]]
    errors = [said != value for (_, said), value in zip(chain[1:], right)]
    assert [done for done, _ in chain] == list(range(problem.steps + 1))
    if sum(errors) == 1:                                        # a single error is never undone
        assert chain[-1][1] != solve(problem.question)
    done, value = continue_chain(problem, [(0, problem.start)], 1, random.Random(seed), 1)[-1]
    assert done == 1 and value != interpret(problem.question)[1]                # with noise 1 every value is wrong


def test_the_fraction_of_wrong_values_is_the_noise_rate():
    rng, n, wrong = random.Random(0), 0, 0
    for _ in range(400):
        problem = draw_problem(rng, 20, 40, 'train')
        chain = continue_chain(problem, [(0, problem.start)], problem.steps, rng, 0.02)
        for (i, before), (_, value) in zip(chain, chain[1:]):
            n, wrong = n + 1, wrong + (task.apply(problem.operations[i % len(problem.operations)], before) != value)
    assert abs(wrong / n - 0.02) < 3 * (0.02 * 0.98 / n) ** 0.5


@given(problems, seeds)
def test_judge_tells_right_from_wrong_values(problem, seed):
    rng = random.Random(seed)
    chain = continue_chain(problem, [(0, problem.start)], rng.randint(1, problem.steps), rng, 0.2)
    done, value = chain[-1]
    right = 'ok' if value == interpret(problem.question)[done] else 'wrong'
    text = ENC.decode(encode_chain(problem, chain))
    assert judge(problem.question, text) == right and judge(problem.question, text[:1]) == ''
    marks = [judge(problem.question, f'{text}</think>{digit}<|end|>') for digit in range(10)]
    assert marks.pop(solve(problem.question)) == 'ok' and set(marks) == {'wrong'}
    assert judge('4x:a-2b*7c+3=5', '59b*7=5') == judge('4x:a-2b*7c+3=5', '54z-2=5') == 'wrong'     # no such steps


def test_rounds_needed_by_a_solution():
    """Count rollouts that each state the value, then write whole steps, and the answer if it fits."""
    def rollouts(steps, budget):
        n = 0
        while True:
            n, room = n + 1, budget - 1
            done = min(steps, room // STEP)
            steps, room = steps - done, room - done * STEP
            if steps == 0 and room >= 3:
                return n
    for steps in range(3, 73):
        for budget in (6, 21, 41, 81):
            assert task.rounds_needed(steps, budget) == max(1, rollouts(steps, budget) - 1)


# ---- aggregation ----

@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=5))
def test_the_vote_is_over_the_steps_done_and_then_over_the_value(ends):
    places = [place for place, _ in ends]
    place = max(p for p in places if places.count(p) == max(map(places.count, places)))
    values = [value for p, value in ends if p == place]
    best = sorted({value for value in values if values.count(value) == max(map(values.count, values))})
    assert majority_vote(ends) == ((place, best[0]) if len(best) == 1 else None)


def aggregated(n=300, candidates=4, **kwargs):
    """Return [(problem, tails, continuation)], the latter as text, of n aggregation samples."""
    rng, found = random.Random(0), []
    for _ in range(n):
        problem = draw_problem(rng, 3, 72, 'train')
        sample = aggregation_sample(rng, problem, candidates, **dict(budget=41, tail=10) | kwargs)
        tokens, scored = flatten(sample)
        n_prompt = tokens.index(THINK)
        assert scored == [False] * n_prompt + [True] * (len(tokens) - n_prompt)
        assert len(tokens) - n_prompt - 1 <= kwargs.get('budget', 41)
        prompt = ENC.decode(tokens[:n_prompt])
        question, brackets = re.fullmatch(r'<\|user\|>(.*?=\d)((?:\[.*?\])*)<\|end\|><\|assistant\|>', prompt).groups()
        assert question == problem.question
        tails = re.findall(r'\[(.*?)\]', brackets)
        assert len(tails) == candidates
        assert all(len(ENC.encode(tail, allowed_special='all')) <= kwargs.get('tail', 10) for tail in tails)
        found.append((problem, tails, ENC.decode(tokens[n_prompt + 1:])))
    return found


@pytest.mark.parametrize('candidates', [1, 2, 4, 7])
def test_the_value_stated_after_aggregation_is_right_whatever_the_noise(candidates):
    for problem, tails, said in aggregated(candidates=candidates, noise=0.9):
        truth = interpret(problem.question)
        if '</think>' in said[:10]:
            assert int(said[0]) == truth[-1] and re.fullmatch(r'(\d)</think>\1<\|end\|>', said)
            continue
        loop, label = int(said[1]), said[2]
        done = (problem.loops - loop) * len(problem.operations) + 'abcdefgh'.index(label)       # index of the next step
        assert int(said[0]) == truth[done]


def test_a_continuation_is_cut_after_one_step_or_at_the_budget():
    lengths = Counter(len(ENC.encode(said, allowed_special='all')) for _, _, said in aggregated(1000))
    assert max(lengths) == 41 and 0.55 < lengths[6] / (1000 - lengths[4]) < 0.75 and lengths[41] > 50
    assert lengths[4] > 50                                      # value, </think>, answer, <|end|>
    full = aggregated(200, short=0)
    assert all(len(said) > 20 or '</think>' in said for _, _, said in full)
    assert max(len(ENC.encode(said, allowed_special='all')) for _, _, said in aggregated(600, budget=13, tail=5)) == 13


def test_continuations_follow_the_program():
    for problem, tails, said in aggregated(noise=0, short=0):
        truth, text = interpret(problem.question), said.partition('</think>')[0]
        first, steps = steps_of(problem, text[:1 + 6 * (len(text) // 6)] if len(text) % 6 == 1 else text)
        if steps:
            begin = steps[0][0] - 1
            assert [(begin, first), *steps] == [(begin + i, truth[begin + i]) for i in range(len(steps) + 1)]


def test_without_candidates_it_is_the_first_round():
    for problem, tails, said in aggregated(candidates=0, noise=0):
        first, _ = steps_of(problem, said.partition('</think>')[0])
        assert first == problem.start
        assert len(ENC.encode(said, allowed_special='all')) == min(41, 1 + STEP * problem.steps + 3)


def test_simulated_candidates_err_lag_skip_and_finish():
    rng, seen = random.Random(0), Counter()
    for _ in range(2000):
        problem = draw_problem(rng, 20, 40, 'train')
        end, truth = rng.randrange(9, problem.steps + 1), interpret(problem.question)
        chain = simulate_candidate(rng, problem, end, error_rate=0.5)
        done, value = chain[-1]
        text = ENC.decode(tail_of(rng, problem, chain, 10, 8, rng.random() < 0.7))
        assert text[-1] == str(value)
        seen['right'] += value == truth[done]
        seen['behind'] += done < end
        seen['skipped'] += done > len(chain) - 1
        seen['early'] += '</think>' in text and done < problem.steps
        seen['finished'] += '</think>' in text and done == problem.steps
        seen['unfinished at the end'] += '</think>' not in text and done == problem.steps
        short = ENC.decode(tail_of(rng, problem, chain, 10, written=0))         # a step shows the position
        assert '=' in short if done < problem.steps else re.fullmatch(fr'{value}(</think>{value})?', short)
    assert 0.45 < seen['right'] / 2000 < 0.65
    assert len(seen) == 6 and min(seen.values()) > 20, seen


def test_candidates_often_stop_at_the_end_of_a_round_and_finished_ones_have_few_steps_left():
    seen = Counter()
    for problem, tails, said in aggregated(1000):
        if problem.steps < 16:
            continue
        seen['problems'] += 1
        finished = [re.fullmatch(r'(\d)</think>\1', tail) is not None for tail in tails]
        seen['all finished in the round before'] += all(finished)
        ends = [(problem.loops - int(loop)) * len(problem.operations) + 'abcdefgh'.index(label) + 1
                for tail in tails for loop, label in re.findall(r'(\d)([a-h])[-+*]\d=\d$', tail)]
        seen['at the end of a round'] += bool(ends) and max(Counter(ends), key=Counter(ends).get) % 8 == 0
    assert seen['at the end of a round'] / seen['problems'] > 0.3               # 1 / 8 if they stopped anywhere
    assert seen['all finished in the round before'] > 5


# ---- prepared datasets ----

def test_a_mixture_of_both_datasets_can_be_trained_on(prepared):
    loader, _ = open_dataset(f'{prepared}/traces:0.5 {prepared}/votes:0.5', 'train', 4, 128, seed=0)
    x, y, start = loader.batch(0)
    assert x.shape == y.shape == start.shape == (4, 128) and (y >= 0).any() and start[:, 0].all()
    assert loader.vocab_size == ENC.n_vocab


def test_training_prints_the_solution_of_a_held_out_problem(prepared, tmp_path, capsys):
    config, model_config = read([*TINY_RUN, '--context=128', f'--out_dir={tmp_path}', '--max_steps=1', '--eval_every=1',
                                 f'--dataset={prepared}/traces:0.5 {prepared}/votes:0.5'], TrainConfig, ZayaConfig)
    train(config, model_config)
    shown = re.findall(r'<\|user\|>(.*?=\d)', capsys.readouterr().out)
    assert len(shown) == 2 and {split_of(question) for question in shown} == {'val'}        # before and after the step


def test_the_same_seed_prepares_the_same_datasets(prepared, tmp_path):
    prepare_loops(LoopsConfig(str(tmp_path / 'again'), context=128, traces=300, votes=300, high=30))
    prepare_loops(LoopsConfig(str(tmp_path / 'other'), context=128, traces=300, votes=300, high=30, seed=1))
    for path in 'traces/train.bin', 'traces/val.flags', 'votes/train.bin', 'votes/val.bin':
        assert (tmp_path / 'again' / path).read_bytes() == (prepared / path).read_bytes()
        assert (tmp_path / 'other' / path).read_bytes() != (prepared / path).read_bytes()


@pytest.mark.parametrize('rule, answers', [('ap', True), ('truncate', False), ('drop', True)])
def test_the_rules_keep_or_drop_answers_of_long_solutions(tmp_path, rule, answers):
    low = 3 if rule == 'drop' else 25                           # with 25 steps or more, every sample would be dropped
    prepare_loops(LoopsConfig(str(tmp_path), context=128, traces=100, votes=10, low=low, rule=rule))
    enc = load_tokenizer(tmp_path / 'traces/bpe.json')
    text = enc.decode(np.fromfile(tmp_path / 'traces/train.bin', '<u2').tolist())
    n, ends = text.count('<think>'), len(re.findall(r'</think>\d<\|end\|>', text))
    assert n and (ends == n if answers else ends == 0)
    assert n == 100 or rule == 'drop'


def test_the_script_prints_what_it_wrote_and_gives_errors_one_line(tmp_path):
    command = [sys.executable, '-m', 'tasks.loops.prepare', f'--out={tmp_path}', '--traces=40', '--votes=40']
    good, out = (subprocess.run([*command, flag], cwd=ROOT, env=ENV, capture_output=True, text=True)
                 for flag in ('--context=128', '--context=3'))
    assert good.stdout.count('windows of 128') == 4
    assert out.returncode == 1 and out.stderr.startswith('tasks.loops.prepare: ') and out.stderr.count('\n') == 1
