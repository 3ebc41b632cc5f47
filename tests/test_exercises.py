"""The tests of each exercise accept the project's own function, and reject the blank and typical wrong answers."""
import ast
import importlib
import importlib.util
import inspect
import itertools

import hypothesis
import pytest
import torch

from common import ROOT, run_script
from exercises import copies
from exercises.table import EXERCISES

# Typical wrong answers: (text in the function's source, its replacement).
WRONG = {
    'rmsnorm': [(' * upcast(self.weight)', ''), (' / x.shape[-1]', ''), ('mean_square + self.eps', 'mean_square')],
    'residual': [('self.residual_bias * self.residual_scale', 'self.residual_bias'),
                 ('(constant, x, self.residual_scale)', '(constant, x, self.branch_scale)'),
                 ('constant, x, self.residual_scale), upcast(f)', 'constant, upcast(f), self.residual_scale), x')],
    'cache': [('self.newest is None', 'True'), (':, self.target]', ':, self.target - self.target[:, :1]]'),
              ('if self.P is None', 'if True')],
    'convolution': [('W_old * w_old, W_old * w_new + W_new * w_old, W_new * w_new',
                     'W_new * w_new, W_old * w_new + W_new * w_old, W_old * w_old'),
                    (' + W_new * w_old', ''), ('(W_old + W_new) @', 'W_new @')],
    'qk_mean': [('(len(k), -1)', '(-1, len(k))'), ('m_q.mean(1)', 'k'), (' / 2', '')],
    'norm': [('.clamp_min(torch.finfo(x.dtype).eps)', ''), ('(x, dim=-1', '(x, dim=0'),
             ('size[:, None, None, None] /', 'size[:, None, None, None] * x.shape[-1] ** 0.5 /')],
    'rope': [('a * cos - b * sin, b * cos + a * sin', 'a * cos + b * sin, b * cos - a * sin'),
             (', rest]', ', 0 * rest]'), ('x[..., :n], x[..., n:2 * n]', 'x[..., :2 * n:2], x[..., 1:2 * n:2]')],
    'attention': [('v2[:, :-1] if start', 'v2[:, 1:] if start'), ('.masked_fill(start[..., None], 0)', ''),
                  (', cache.v_last[self.layer].to(v2.dtype)', ', v_last')],
    'router': [('return expert, weight, r', 'return expert, weight, self.norm(r)'),
               ('self.eda_scale * r_below', 'r_below'), ('F.gelu(self.fc2(h))', 'self.fc2(h)')],
    'balancer': [('error = fractions -', 'error = -fractions +'), ('router.load.zero_()', 'pass'),
                 (' - loads.any(-1, keepdim=True) / loads.shape[-1]', '')],
    'experts': [(' * weight[:, None].to(dtype)', ''), ('.index_select(0, place)', '[:T]'),
                ('y.masked_fill(skipped, 0)', 'y')],
    'sample': [('right=True', 'right=False'), ('probs.cumsum(-1) - probs < top_p', 'probs.cumsum(-1) < top_p'),
               ('u * cdf[:, -1]', 'u')],
    'orthogonalize': [('X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)', 'X'),
                      ('dim=(-2, -1), keepdim=True', ''), ('X.mT if tall else X', 'X')],
    'muon': [('alpha=-lr', 'alpha=lr'), ('torch._foreach_lerp_(grads, averages, momentum)', 'grads = averages'),
             ('0.2 * max', '0.2 * min')],
    'trim': [('<= budget', '< budget'), ('in sample[:-1]] + sample[-1:]', 'in sample]'),
             ('cut_last(sample, budget)', 'None')],
    'rsa': [('{settings.seed} {list(question)}', '{settings.seed}'), ('[-settings.tail:]', '[:settings.tail]'),
            ('settings.budget if t < settings.rounds else settings.final_budget', 'settings.budget')],
    'vote': [(' if answer is not None', ''), ('max(votes,', 'max(votes[::-1],'), (', default=None', '')],
}


@pytest.fixture(scope='module')
def load():
    """Return a function that loads a test file as a separate module whose tests do not shrink failing examples, which
    takes long."""
    modules = {}

    def load(name):
        if name not in modules:
            spec = importlib.util.spec_from_file_location(f'exercise_{name}', ROOT / 'tests' / f'{name}.py')
            modules[name] = importlib.util.module_from_spec(spec)
            hypothesis.settings.load_profile('exercises')
            spec.loader.exec_module(modules[name])
            hypothesis.settings.load_profile('nanozaya')
        return modules[name]
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile('exercises', deadline=None, max_examples=15, derandomize=True,
                                          phases=phases, report_multiple_bugs=False)
    return load


def run(test):
    """Call a test like pytest: with all of its parameters, and with monkeypatch if it has that argument."""
    marks = [mark for mark in getattr(test, 'pytestmark', ()) if mark.name == 'parametrize']
    names = [[name.strip() for name in mark.args[0].split(',')] for mark in marks]
    for values in itertools.product(*(mark.args[1] for mark in marks)):
        given = {}
        for some, value in zip(names, values):
            given |= zip(some, value if len(some) > 1 else [value])
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            test(**given, **{'monkeypatch': patch} if 'monkeypatch' in inspect.signature(test).parameters else {})


def test_the_functions_and_tests_of_the_table_exist(load):
    assert len(EXERCISES) >= 14 and list(WRONG) == [exercise.name for exercise in EXERCISES]
    order = ['layers', 'cache', 'cca', 'router', 'model', 'sample', 'optim', 'data', 'rsa']
    read = [order.index(exercise.function.partition('.')[0]) for exercise in EXERCISES[:-1]]
    assert read[:14] == sorted(read[:14])
    for exercise in EXERCISES:
        assert all(callable(getattr(load(file), test)) for file, test in copies.tests_of(exercise))


@pytest.mark.parametrize('exercise', EXERCISES, ids=lambda exercise: exercise.name)
def test_the_original_passes_and_a_blank_and_three_wrong_answers_fail(exercise, load):
    """Replaces the code of the function in this process, so that all modules that imported it use the new code."""
    file, names = copies.locate(exercise.function)
    source = (ROOT / file).read_text()
    owner = importlib.import_module(file.removesuffix('.py').replace('/', '.'))
    space = vars(owner)
    for name in names[:-1]:
        owner = getattr(owner, name)
    function = inspect.unwrap(getattr(owner, names[-1]))
    original, segment = function.__code__, ast.get_source_segment(source, copies.find(source, names))

    def passes(source):
        node = copies.find(source, names)
        node.decorator_list, made = [], {}
        exec(compile(ast.Module([node], []), file, 'exec'), space | made, made)
        function.__code__ = made[names[-1]].__code__
        try:
            for module, test in copies.tests_of(exercise):
                run(getattr(load(module), test))
        except (Exception, pytest.fail.Exception):
            return False
        finally:
            function.__code__ = original
        return True

    assert passes(source)
    without = copies.blank(source, names, exercise)
    assert not passes(without) and max(map(len, without.splitlines())) <= 120
    assert len(WRONG[exercise.name]) == 3
    for right, wrong in WRONG[exercise.name]:
        assert segment.count(right) == 1, right
        assert not passes(source.replace(segment, segment.replace(right, wrong))), f'{right} -> {wrong}'


def test_the_command_line_from_the_blank_to_the_answer(tmp_path, monkeypatch, capsys):
    """On the command line. Errors have one line, and the student's code is kept."""
    exercises = lambda *words: run_script(monkeypatch, capsys, 'exercises', *words, f'--folder={tmp_path / "my"}')
    file = tmp_path / 'my' / 'norm' / 'cca.py'
    assert 'norm           cca.norm' in exercises('list')[0]
    assert 'Clamp' in exercises('hint', 'norm')[0]
    assert 'start norm' in exercises('check', 'norm')[1]
    assert f'{file}, line ' in exercises('start', 'norm')[0]
    assert 'norm is not written yet' in exercises('check', 'norm')[1]
    assert 'exists already' in exercises('start', 'norm')[1]
    start, line = file.read_text(), "    raise NotImplementedError('norm: not written yet')\n"
    file.write_text(start.replace('def norm', 'def size'))
    assert 'has no function norm' in exercises('check', 'norm')[1]
    file.write_text(start.replace(line, '    return (\n'))
    assert "'(' was never closed" in exercises('check', 'norm')[1]
    file.write_text(start.replace(line, '    return size[:, None, None, None] * x / x.norm(dim=-1, keepdim=True)\n'))
    out, message = exercises('check', 'norm')
    assert 'holds     queries have length sqrt d and keys t sqrt d\n' in out
    assert 'not yet   norm of zero is zero\n          assert norm(torch.zeros(' in out
    assert '2 of 4 do not hold yet' in message
    norm, = (exercise for exercise in EXERCISES if exercise.name == 'norm')
    monkeypatch.setattr(copies, 'run_tests', lambda *args: {'norm of zero is zero': ''})        # as if it were correct
    copies.check(norm, file.parent)
    assert 'norm is done' in capsys.readouterr().out


@pytest.mark.parametrize('words, message', [
    ([], 'use list'), (['begin', 'rope'], 'use list'), (['start'], 'use list'),
    (['start', 'rop'], "did you mean 'rope'"), (['list', '--folders=x'], 'did you mean')])
def test_bad_arguments_get_one_line(words, message, monkeypatch, capsys):
    assert message in run_script(monkeypatch, capsys, 'exercises', *words)[1]
