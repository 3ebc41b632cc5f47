"""Problem files: answers, prompts, and a run that is killed and resumed."""
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from configurator import package
from common import ENV, ROOT, run_script, tiny_model
from tasks import problems
from runtime.checkpoint import exclusive_lock
from runtime.language import released_language
from runtime.pretrained import save_pretrained
from tasks.answers import equal
from tasks.problems import merge_equal, message, read_problems, read_words
from rsa import RSASettings, solve_file
from sample import SamplingOptions
from test_language import write_language

def test_votes_are_merged_by_the_first_answer_that_is_equal(monkeypatch):
    asked = []
    monkeypatch.setattr(problems, 'equal', lambda a, b: asked.append((a, b)) or equal(a, b))
    assert merge_equal(['2', '1/2', None, '0.5', '2', r'\frac12', '3', '2/4', '']) == {
        '2': '2', '1/2': '1/2', '0.5': '1/2', r'\frac12': '1/2', '3': '3', '2/4': '1/2'}
    assert len(asked) == 1 + 2 + 2 + 2 + 2 and merge_equal(['7'] * 99) == {'7': '7'} and len(asked) == 9


def test_the_table_s_majority_counts_answers_that_are_equal_and_gold_is_first():
    row = {'answers': ['2', '1/2', None, '0.5', '2', r'\frac12', '2/4', '(-\\infty,5)'], 'tokens': 8, 'seconds': 1,
           'longest_prompt': 9}
    rows = {0: [row], 1: [row], 2: [row]}
    line = problems.table([('a', '0.5'), ('b', '2'), ('c', 'x<5')], rows).splitlines()[-1]
    assert [cell.strip() for cell in line.split('|')[2:5]] == [
        f'{100 * 7 / 24:.1f} +-{100 * 1.96 * statistics.stdev([4 / 8, 2 / 8, 1 / 8]) / 3 ** 0.5:.1f}', '33.3', '100.0']
    assert line.endswith('| exact text, then math-verify 0.9.0 |')


def test_one_problem_has_no_interval():
    row = {'answers': ['2'], 'tokens': 8, 'seconds': 1, 'longest_prompt': 9}
    assert problems.table([('a', '2')], {0: [row]}).splitlines()[-1].startswith('| 1 | 100.0 - | 100.0 |')
    assert problems.percent(0.5, 0.125) == '50.0 +-12.5'


@pytest.mark.parametrize('line, words', [
    ('{"problem": "a"', 'line 2: is not valid JSON'), ('[1]', 'line 2: the whole is a list, it must be an object'),
    ('{"problem": "a"}', 'line 2: answer, or solution with a .* answer is missing or empty'),
    ('{"problem": "a", "answer": null}', 'line 2: answer'), ('{"problem": "a", "answer": " "}', 'line 2: answer'),
    ('{"problem": "a", "answer": "3 + 4 ####"}', 'line 2: answer'),
    ('{"problem": "a", "solution": "It is 7."}', 'line 2: answer'),
    ('{"problem": "", "answer": "1"}', 'line 2: problem or question is missing or empty'),
    ('{"text": "a", "answer": "1"}', 'line 2: problem or question is missing or empty'),
    ('{"Problem": 3, "answer": "1"}', 'line 2: Problem is 3, it must be text'),
    ('{"problem": "a", "answer": true}', 'line 2: answer is True, it must be text or a finite number'),
    ('{"problem": "a", "Answer": ["1"]}', 'line 2: Answer is a list, it must be text or a finite number')])
def test_a_bad_line_of_the_file_is_named(tmp_path, line, words):
    path = tmp_path / 'p.jsonl'
    path.write_text('{"problem": "a", "answer": 1}\n' + line)
    with pytest.raises(ValueError, match=words):
        read_problems(path)
    for nothing in '\n', '[]':
        path.write_text(nothing)
        with pytest.raises(ValueError, match='holds no problem'):
            read_problems(path)
    path.write_text('[{"problem": "a", "answer": 1}, {"problem": "a"}]')
    with pytest.raises(ValueError, match='entry 2: answer'):
        read_problems(path)
    with pytest.raises(ValueError, match='cannot be read'):
        read_problems(tmp_path / 'none')


FORMS = {                           # of public problem files
    'GSM8K': ({'question': 'Bo has 3 apples.', 'answer': 'He buys 4: 3+4=<<3+4=7>>7 apples.\n#### 7'}, '7',
              'question (\'Bo has 3 apples.\'), answer: what follows #### in answer (\'7\')'),
    'thousands': ({'question': 'a', 'answer': 'It is\n#### 1,200 '}, '1,200', 'what follows #### in answer'),
    'MATH-500': ({'problem': 'a', 'solution': r'so $\boxed{2}$.', 'answer': r'\frac{1}{2}', 'level': 3}, r'\frac{1}{2}',
                 'answer: answer ('),
    'MATH': ({'problem': 'a', 'level': 'Level 5', 'solution': r'First \boxed{1}, so $\boxed{\frac{1}{2}}$.'},
             r'\frac{1}{2}', 'the last box in solution'),
    'AIME': ({'ID': '2024-I-1', 'Problem': 'a', 'Solution': r'\boxed{1}', 'Answer': 204}, '204', 'Answer (\'204\')'),
    'a number': ({'Question': 'a', 'answer': 142.0}, '142.0', 'Question (\'a\'), answer: answer (\'142.0\')'),
    'no answer': ({'question': 'a', 'answer': None, 'solution': r'\fbox{3}'}, '3', 'the last box in solution'),
    'boxed': ({'problem': 'a', 'answer': r'The answer is $\boxed{5}$.'}, '5', 'the last box in answer'),
    'both': ({'question': 'the second', 'problem': 'the first', 'answer': 1}, '1', "problem ('the first')"),
    'long': ({'problem': 'word ' * 99, 'answer': 1}, '1', f"problem ('{'word ' * 9}wo...')")}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('array', [False, True])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16', 'utf-8-sig'])
def test_public_forms_of_problem_files_are_read_and_reported(form, array, encoding, tmp_path, capsys):
    entry, answer, words = FORMS[form]
    path = tmp_path / 'p.jsonl'
    path.write_text(json.dumps([entry] * 2, indent=1) if array else 2 * f'{json.dumps(entry)}\n\n', encoding=encoding)
    assert [found for _, found in read_problems(path)] == [answer] * 2
    report = capsys.readouterr().err
    assert report.startswith(f'{path}: 2 problems; problem: ') and words in report and report.count('\n') == 1


def test_every_key_that_was_read_is_reported(tmp_path, capsys):
    (tmp_path / 'p').write_text('{"problem": "a", "answer": 1}\n{"question": "b", "solution": "\\\\boxed{2}"}')
    assert read_problems(tmp_path / 'p') == [('a', '1'), ('b', '2')]
    assert "problem or question ('a'), answer: answer or the last box in solution ('1')" in capsys.readouterr().err


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


def solve(path, stop_after=None, calls=None, listed=LISTED, digests={}, **changes):
    """Run solve_file with a fake policy, whose outputs are the right answer and others, as character codes; 0 ends an
    output. stop_after: number of rounds after which the run is stopped. Return the lines of the results file."""
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
    solve_file(policy, listed, str(path), replace(SETTINGS, **changes), SamplingOptions(), digests)
    return [{key: value for key, value in json.loads(line).items() if key != 'seconds'}
            for line in path.read_text().splitlines()]


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
    older = '{"settings": {"population": 4}}\n'
    for text in 'my notes\n', 'my notes', 'my notes\nmore', older:             # the last line may be incomplete
        (tmp_path / 'run').write_text(text)
        with pytest.raises(ValueError, match='is no results file of this version: name another file with --out'):
            solve(tmp_path / 'run')
        assert (tmp_path / 'run').read_text() == text


@pytest.mark.parametrize('listed, words', [
    ([('a', '1'), ('b', '2'), ('c', '4')], r"problem 3 \('c'\) or its answer was changed since .*run was started"),
    ([('a', '1'), ('bb', '2'), ('c', '3')], r"problem 2 \('bb'\) or its answer was changed"),
    ([('0', '1'), *LISTED], 'problem 1 .* was changed'), (LISTED[::-1], 'problem 1 .* was changed'),
    (LISTED[1:], 'problem 1 .* was changed'),
    (LISTED[:2], 'problem 3, which has results in .*run, was removed')])
def test_changed_and_removed_problems_are_named(listed, words, tmp_path):
    solve(tmp_path / 'run')
    before = (tmp_path / 'run').read_bytes()
    with pytest.raises(ValueError, match=words + '.*: name another file with --out'):
        solve(tmp_path / 'run', listed=listed)
    assert (tmp_path / 'run').read_bytes() == before


def test_appended_problems_continue_and_those_without_results_may_change(tmp_path, capsys):
    longer, calls = [*LISTED, ('d', '1'), ('e', '2')], []
    whole = solve(tmp_path / 'whole', listed=longer)
    solve(tmp_path / 'run')
    assert solve(tmp_path / 'run', listed=longer, calls=calls) == whole and len(calls) == 2 * 3
    assert capsys.readouterr().out.splitlines()[-1].startswith('| 5 | ')
    with pytest.raises(KeyboardInterrupt):
        solve(tmp_path / 'other', stop_after=3)
    assert len(solve(tmp_path / 'other', listed=[LISTED[0], ('z', '9')])) == 1 + 2 * 3


def test_a_changed_digest_is_named(tmp_path):
    solve(tmp_path / 'run', digests={'a.safetensors of --ckpt': '1'})
    for digests in {'a.safetensors of --ckpt': '2'}, {}, {'a.safetensors of --ckpt': '2', 'b.safetensors': '3'}:
        with pytest.raises(ValueError, match='a.safetensors of --ckpt was changed since .*run was started: name'):
            solve(tmp_path / 'run', digests=digests)


def test_a_digest_covers_small_files_and_samples_large_ones_from_start_to_end(tmp_path):
    path = tmp_path / 'ckpt.pt'

    def digest(size, changed=None):
        with open(path, 'wb') as file:
            file.truncate(size)                                 # zeros
            if changed is not None:
                file.seek(changed)
                file.write(b'x')
        return problems.digests_of(tmp_path, None)['ckpt.pt of --ckpt']
    for size in 1, 2 ** 18, 2 ** 18 + 1, 5 * 2 ** 20 + 7, 2 ** 24:
        places = {0, size // 3, size // 2, size * 2 // 3, size - 1}
        assert len({digest(size), *(digest(size, place) for place in places)}) == 1 + len(places)
    size = 2 ** 31
    assert len({digest(size), digest(size, 0), digest(size, size - 1), digest(size + 1)}) == 4
    assert digest(0) != digest(1)
    start = time.perf_counter()
    digest(size)
    assert time.perf_counter() - start < 5


def test_digests_are_of_the_files_of_a_model_and_of_the_wording(tmp_path):
    for name in 'model.safetensors', 'config.json', 'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja', \
            'generation_config.json', 'p.jsonl', 'p.rsa.jsonl', 'README.md', 'log.csv':
        (tmp_path / name).write_text('')
    (tmp_path / 'ckpt.pt').mkdir()
    (tmp_path / 'ckpt.pt/0').write_text('')                     # of a sharded run
    assert {name.removesuffix(' of --ckpt') for name in problems.digests_of(tmp_path, None)} == {
        'model.safetensors', 'config.json', 'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja',
        'generation_config.json', 'ckpt.pt/0', 'the wording of the prompts'}
    assert len(problems.digests_of('', None)) == 1 and problems.digests_of('', None) != problems.digests_of('', 'a')


def test_two_runs_on_one_results_file_are_refused(tmp_path):
    solve(tmp_path / 'run')
    before, calls = (tmp_path / 'run').read_bytes(), []
    with exclusive_lock(tmp_path / 'run.lock'), pytest.raises(ValueError, match='run.lock: in use by process'):
        solve(tmp_path / 'run', calls=calls)
    assert not calls and (tmp_path / 'run').read_bytes() == before
    solve(tmp_path / 'run')


@pytest.fixture(scope='module')
def released_folder(tmp_path_factory):
    pytest.importorskip('safetensors')
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


@pytest.fixture
def solved(released_folder, tmp_path, monkeypatch, capsys):
    """A folder with a model, problems and their results, and a function that runs rsa.py on them again."""
    shutil.copytree(released_folder, tmp_path / 'model')
    path = tmp_path / 'p.jsonl'
    path.write_text('{"problem": "What is 2 + 2?", "answer": 4}\n{"problem": "And 3?", "answer": "3"}\n')
    (tmp_path / 'words').write_text('{problem} {candidates}')
    run = lambda *flags: run_script(
        monkeypatch, capsys, 'rsa.py', f'--ckpt={tmp_path / "model"}', f'--problems={path}', '--population=2',
        '--candidates=2', '--budget=4', '--tail=2', '--rounds=1', '--device=cpu', *flags)
    assert run()[1] is None
    return tmp_path, run


def write_other_weights(folder):
    model = tiny_model(1, vocab_size=300, context=2048, skip_expert=True)
    model.released_config = {'eos_token_id': 2}
    save_pretrained(model, folder / 'model')


def replace_in(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
    return change


@pytest.mark.parametrize('change, flags, words', [
    (write_other_weights, [], 'model.safetensors of --ckpt was changed since'),
    (replace_in('model/chat_template.jinja', 'assistant', 'model'), [], 'chat_template.jinja of --ckpt was changed'),
    (replace_in('model/config.json', '_id": 2', '_id": 3'), [], 'config.json of --ckpt was changed since'),
    (replace_in('p.jsonl', 'And 3?', 'And 4?'), [], "problem 2 ('And 4?') or its answer was changed since"),
    (replace_in('p.jsonl', '"answer": 4', '"answer": 5'), [], "problem 1 ('What is 2 + 2?') or its answer was changed"),
    (replace_in('p.jsonl', '{"problem": "And 3?", "answer": "3"}', ''), [],
     'problem 2, which has results in '),
    (lambda folder: None, ['--aggregation_prompt=words'], 'the wording of the prompts was changed since'),
    (lambda folder: None, ['--temperature=0.5'], 'belongs to a run with temperature = 1.0')])
def test_old_results_do_not_count_for_other_inputs(solved, change, flags, words):
    folder, run = solved
    results = (folder / 'p.rsa.jsonl').read_bytes()
    change(folder)
    flags = [flag.replace('=words', f'={folder / "words"}') for flag in flags]
    _, message = run(*flags)
    assert words in message and message.endswith('name another file with --out') and '\n' not in message
    assert (folder / 'p.rsa.jsonl').read_bytes() == results
    assert run(*flags, f'--out={folder / "other"}')[1] is None


def test_a_moved_model_and_file_resume(solved, monkeypatch):
    folder, run = solved
    (folder / 'model').rename(folder / 'moved')
    (folder / 'p.jsonl').rename(folder / 'q.jsonl')
    before = (folder / 'p.rsa.jsonl').read_bytes()
    assert run(f'--ckpt={folder / "moved"}', f'--problems={folder / "q.jsonl"}',
               f'--out={folder / "p.rsa.jsonl"}')[1] is None
    assert (folder / 'p.rsa.jsonl').read_bytes() == before


def test_of_two_processes_on_one_results_file_one_is_refused(solved):
    folder, _ = solved
    command = [sys.executable, 'rsa.py', f'--ckpt={folder / "model"}', f'--problems={folder / "p.jsonl"}',
               f'--out={folder / "out"}', '--population=2', '--candidates=2', '--budget=50', '--tail=2', '--rounds=3',
               '--device=cpu']
    first = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (folder / 'out').exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)                           # as if it took long
    second = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1 and 'out.lock: in use by process' in second.stderr.splitlines()[-1]
    table, _ = first.communicate()
    assert first.returncode == 0 and table.startswith('| problems |')
    third = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert third.returncode == 0 and third.stdout == table      # nothing is left to do


def test_without_math_verify_nothing_is_generated(solved, monkeypatch):
    folder, run = solved
    monkeypatch.setattr(problems, 'start_worker', lambda: package('math_verify_that_is_not_there'))
    _, message = run(f'--out={folder / "other"}')
    assert 'this needs the package' in message and not (folder / 'other').exists()


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
