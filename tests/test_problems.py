"""Problem files: answers, prompts, and a run that is killed and resumed."""
import json
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from common import run_script, tiny_model
from tasks import problems
from runtime.language import released_language
from tasks.problems import canonical, equal, final_answer, majority_vote, message, read_problems, read_words
from rsa import RSASettings, solve_file
from sample import SamplingOptions
from test_language import write_language

nested = st.recursive(st.sampled_from(['7', r'\frac', ' ']), lambda inner: st.lists(inner, max_size=3).map(
    lambda parts: '{' + ''.join(parts) + '}'), max_leaves=6)


@given(st.text(max_size=5), nested, st.text('abc{}', max_size=5))
def test_the_answer_is_what_the_last_box_holds(before, inside, after):
    assert final_answer(f'\\boxed{{no}}{before}\\boxed{{{inside}}}{after}') == inside.strip()


def test_without_a_box_the_answer_is_the_text_and_an_open_box_holds_the_rest():
    assert final_answer(' so it is 4\n') == 'so it is 4' and final_answer(r'\boxed{{1}, 2') == '{1}, 2'


@given(st.integers(-10**6, 10**6), st.integers(1, 999))
def test_a_number_is_the_same_however_it_is_written(a, b):
    sign, n = '-' * (a < 0), abs(a)
    for text in f'{a}', f' ${a}$ ', f'{sign}{n:,}', f'{a}.0', f'{a}.', rf'\({a}\)', rf'\text{{{a}}}', f'{sign}00{n}':
        assert canonical(text) == a
    for text in f'{a}/{b}', rf'{sign}\frac{{{n}}}{{{b}}}', rf'{sign}\dfrac{{{n}}}{{{b}}}':
        assert equal(text, f'{2 * a}/{2 * b}')
    assert not equal(f'{a}', f'{a + 1}') and canonical('0.125') == Fraction(1, 8)


@pytest.mark.parametrize('text', ['', '1/0', '--1', '1,2', 'x' * 2000, '9' * 2000, '1e9', '.', '-', r'\frac{1}{x}'])
def test_what_is_no_number_stays_text(text):
    assert isinstance(canonical(text), str)


def test_words_are_compared_without_case_and_spaces():
    assert equal('Monday', r'\text{ monday }') and equal('(1, 2)', '(1,2)') and not equal('Monday', 'Sunday')


def test_a_majority_counts_answers_that_are_equal():
    assert majority_vote(['2', '1/2', None, '0.5', '2', r'\frac12', '2/4'], equal) == '1/2'
    assert majority_vote([None, None], equal) is None


@pytest.mark.parametrize('line, words', [
    ('{"problem": "a"', 'line 2: is not valid JSON'), ('{"problem": "a"}', 'line 2: answer is missing'),
    ('[1]', 'line 2: the whole is a list'),
    ('{"problem": "", "answer": "1"}', 'line 2: the problem or its answer is empty'),
    ('{"problem": "a", "answer": null}', 'line 2: answer is None, it must be text')])
def test_a_bad_line_of_the_file_is_named(tmp_path, line, words):
    path = tmp_path / 'p.jsonl'
    path.write_text('{"problem": "a", "answer": 1}\n' + line)
    with pytest.raises(ValueError, match=words):
        read_problems(path)
    path.write_text('\n')
    with pytest.raises(ValueError, match='holds no problem'):
        read_problems(path)
    with pytest.raises(ValueError, match='cannot be read'):
        read_problems(tmp_path / 'none')


def test_other_words_must_say_where_problem_and_candidates_go(tmp_path):
    (tmp_path / 'words').write_text('{problem} and {candidates} and {braces}')
    assert message([5], [[6], [7]], read_words(tmp_path / 'words')) == [
        '', [5], ' and ', '--- 1 ---\n', [6], '\n', '--- 2 ---\n', [7], '', ' and {braces}']
    (tmp_path / 'words').write_text('{problem} and {candidate}')
    with pytest.raises(ValueError, match='must hold {candidates} once'):
        read_words(tmp_path / 'words')


@given(st.integers(1, 6), st.integers(1, 50), st.sampled_from(['tail', 'answer']))
def test_a_prompt_s_length_is_that_of_its_tails_and_a_constant(count, length, compact):
    def size(tails):
        return sum(len(part) for part in message([1] * 9, tails, compact=compact))
    assert size([[3] * length] * count) == size([[]] * count) + length * count


def test_one_tail_many_tails_and_answers_have_words_of_their_own():
    text = lambda *args: ''.join(part for part in message(*args) if isinstance(part, str))
    kinds = [text([1], [[2]]), text([1], [[2], [3]]), text([1], [[2], [3]], None, 'answer')]
    assert len(set(kinds)) == 3 and all('\\boxed{}' in words for words in kinds) and '2 attempts' in kinds[1]
    assert message([1], []) == [[1]]


# ---- a run ----

LISTED = [('a', '1'), ('b', '2'), ('c', '3')]
SETTINGS = RSASettings(population=4, candidates=2, rounds=2, budget=6, tail=3, final_budget=6)


def solve(path, stop_after=None, calls=None, **changes):
    """Run solve_file with a fake policy, whose outputs are the right answer and others, as character codes; 0 ends an
    output. stop_after: number of rounds after which the run is stopped. Return the rows of the results file."""
    left = [stop_after]

    def sampler(options, stream, first):
        def generate(prompts, budget):
            if left[0] == 0:
                raise KeyboardInterrupt
            if left[0]:
                left[0] -= 1
            if calls is not None:
                calls.append((first // 1000, prompts))
            stream(0, 1)
            return [[ord('1') + (sum(map(ord, str((first // 1000, prompt, i)))) % 3), 0]
                    for i, prompt in enumerate(prompts)]
        return generate
    policy = SimpleNamespace(
        encode=lambda text: [ord(text[0])], decode=lambda tokens: ''.join(map(chr, tokens)), sampler=sampler,
        build_prompt=lambda question, tails: question + sum(tails, []), answer_of=lambda output: output[:-1],
        thought_of=list)
    solve_file(policy, LISTED, path, replace(SETTINGS, **changes), SamplingOptions())
    return kept(problems.read_results(path, {}))


def kept(rows):
    return {k: [{key: value for key, value in row.items() if key != 'seconds'} for row in rounds]
            for k, rounds in rows.items()}


@given(st.integers(0, 9), st.integers(0, 40))
def test_a_killed_run_resumes_where_it_was(tmp_path_factory, rounds, cut):
    folder, calls, again = tmp_path_factory.mktemp('run'), [], []
    whole = solve(folder / 'whole', calls=calls)
    try:
        solve(folder / 'killed', stop_after=rounds)
    except KeyboardInterrupt:
        content = (folder / 'killed').read_bytes()
        (folder / 'killed').write_bytes(content + b'{"problem": 1, "rou'[:cut])        # killed while it wrote a line
    resumed = solve(folder / 'killed', calls=again)
    assert resumed == whole and again == calls[min(rounds, 9):]
    assert (folder / 'killed').read_text().count('\n') == 1 + 9


def test_the_table_is_printed(tmp_path, capsys):
    solve(tmp_path / 'run')
    assert capsys.readouterr().out.splitlines()[-1].startswith('| 3 | ')


def test_a_run_resumes_with_the_same_settings_only(tmp_path):
    solve(tmp_path / 'run')
    with pytest.raises(ValueError, match='belongs to a run with tail = 3: name another file with --out'):
        solve(tmp_path / 'run', tail=2)
    for text in 'my notes\n', 'my notes', 'my notes\nmore':     # the last line may be incomplete
        (tmp_path / 'run').write_text(text)
        with pytest.raises(ValueError, match='was not written by such a run'):
            solve(tmp_path / 'run')
        assert (tmp_path / 'run').read_text() == text


@pytest.fixture(scope='module')
def released_folder(tmp_path_factory):
    pytest.importorskip('safetensors')
    from runtime.pretrained import save_pretrained
    model = tiny_model(vocab_size=300, context=2048, skip_expert=True)
    model.released_config = {'eos_token_id': 2}
    folder = write_language(tmp_path_factory.mktemp('released'))
    save_pretrained(model, folder)
    return folder


def test_a_released_model_solves_a_file_from_the_command_line(released_folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / 'p.jsonl'
    path.write_text('{"problem": "What is 2 + 2?", "answer": 4}\n{"problem": "And 3?", "answer": "3"}\n')
    flags = [f'--ckpt={released_folder}', f'--problems={path}', '--population=3', '--candidates=2', '--budget=12',
             '--tail=5', '--rounds=1', '--device=cpu']
    plan, message = run_script(monkeypatch, capsys, 'rsa.py', *flags, '--dry_run=True')
    assert message is None and 'at most 72 per problem, 144 in all' in plan and not (tmp_path / 'p.rsa.jsonl').exists()
    out, message = run_script(monkeypatch, capsys, 'rsa.py', *flags)
    assert message is None and out.splitlines()[-1].startswith('| 2 | 0.0')
    header, *rows = map(json.loads, (tmp_path / 'p.rsa.jsonl').read_text().splitlines())
    assert header['settings']['budget'] == 12 and [(r['problem'], r['round']) for r in rows] == [
        (0, 0), (0, 1), (1, 0), (1, 1)]
    language, longest = released_language(released_folder), max(row['longest_prompt'] for row in rows)
    assert longest <= len(language.prompt([{'role': 'user', 'content': message_of(2)}])) + 2 * 5 + 200
    again, _ = run_script(monkeypatch, capsys, 'rsa.py', *flags)
    assert again == out                                         # nothing is left to do


def message_of(count):
    return message([9] * 20, [[]] * count)


@pytest.mark.parametrize('flag, words', [
    ('--problems=nowhere.jsonl', 'nowhere.jsonl: cannot be read'), ('--aggregation_prompt=nowhere', 'nowhere'),
    ('--budget=9999', 'more than the context of 2,048')])
def test_bad_arguments_are_one_line(released_folder, tmp_path, monkeypatch, capsys, flag, words):
    path = tmp_path / 'p.jsonl'
    path.write_text('{"problem": "What is 2 + 2?", "answer": 4}\n')
    _, message = run_script(monkeypatch, capsys, 'rsa.py', f'--ckpt={released_folder}', f'--problems={path}',
                            '--tail=5', '--device=cpu', flag)
    assert words in message and '\n' not in message
