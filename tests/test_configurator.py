"""The settings reader: it reads literals, refuses anything else with a one-line error, and executes nothing."""
import dataclasses
import itertools
import re
import runpy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

import configurator
from common import ENV, ROOT
from layers import bf16_matmuls
from model import logits
from runtime import device
from runtime.device import pick_dtype, matmuls_in


@dataclasses.dataclass
class Settings:
    steps: int = 1
    rate: float = 1.0
    name: str = 'a'
    fast: bool = False

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f'steps is {self.steps}, it must not be negative')


@dataclasses.dataclass
class Other:
    width: int = 8


@pytest.fixture
def read(tmp_path):
    """Return read(text, *flags), which reads a config file with this text, then the flags, as Settings."""
    def read(text, *flags):
        path = tmp_path / 'config.py'
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return configurator.read([str(path), *flags], Settings)[0]
    return read


def refused(read, text, *flags):
    """Return the error message for a config file; it must be one short line."""
    with pytest.raises(ValueError) as error:
        read(text, *flags)
    message = str(error.value)
    assert '\n' not in message and 'line None' not in message and len(message) < 600
    return message


# ---- what is read ----

@pytest.mark.parametrize('source, value', [('3', 3), ('-3', -3), ('600_000 * 2', 1_200_000), ('2 - 3 * (4 + 1)', -13),
                                           ('7 // 2', 3), ('0x10', 16), ('- -2', 2), ('+1', 1)])
def test_integers_and_arithmetic_are_read(source, value):
    assert configurator.read([f'--width={source}'], Other) == [Other(value)]


def test_every_type_is_read(read):
    assert read('''"""A docstring."""
steps = 2 * 3  # a comment
rate = 3e-4 / 3
name = 'x=y # z'
fast = True
''') == Settings(6, 3e-4 / 3, 'x=y # z', True)


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
def test_a_file_of_any_unicode_encoding_is_read(read, encoding):
    assert read('steps = 3\r\nname = "naïve 漢字"'.encode(encoding)) == Settings(3, name='naïve 漢字')


def test_a_file_in_another_encoding_is_refused(read):
    for text in 'name = "naïve"'.encode('latin-1'), b'\xff\xfea':
        assert 'config.py: cannot be read' in refused(read, text)


def test_an_int_is_converted_to_float(read):
    assert read('rate = 2').rate == 2.0 and type(read('rate = 2').rate) is float
    assert type(read('', '--rate=2').rate) is float


def test_files_override_defaults_and_flags_override_files(read):
    assert read('') == Settings()
    assert read('steps = 2').steps == 2
    assert read('steps = 2\nsteps = 3').steps == 3
    assert read('steps = 2', '--steps=3').steps == 3
    assert read('steps = 2', '--steps=3', '--steps=4').steps == 4


def test_flags_override_files_in_any_order(tmp_path):
    (tmp_path / 'a.py').write_text('steps = 2\nrate = 5.0')
    (tmp_path / 'b.py').write_text('rate = 3.0')
    a, b = str(tmp_path / 'a.py'), str(tmp_path / 'b.py')
    for arguments in itertools.permutations(['--steps=7', a, '--fast=True']):
        assert configurator.read(arguments, Settings) == [Settings(7, 5.0, 'a', True)]
    assert configurator.read([b, '--steps=7', a, '--steps=8'], Settings) == [Settings(8, 5.0)]
    assert configurator.read([a, b], Settings, steps=4, name='default') == [Settings(2, 3.0, 'default')]


def test_flags_are_split_at_the_first_equals_sign(read):
    assert read('', '--name=a=b=').name == 'a=b='
    assert read('', '--name=').name == ''
    assert read('', "--name='a'").name == "'a'"         # quotes that the shell left are part of the value


def test_several_classes_share_one_file(tmp_path):
    (tmp_path / 'c.py').write_text('width = 3\nsteps = 4')
    assert configurator.read([str(tmp_path / 'c.py')], Settings, Other) == [Settings(steps=4), Other(3)]


FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = dict(steps=st.integers(0, 2**63 - 1), rate=FINITE, name=st.text(), fast=st.booleans())


@given(st.fixed_dictionaries({}, optional=SCALARS))
def test_what_repr_writes_is_read_back(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / 'written.py'
    path.write_text(''.join(f'{key} = {value!r}\n' for key, value in values.items()), encoding='utf-8')
    assert configurator.read([str(path)], Settings) == [Settings(**values)]
    flags = [f'--{key}={value if key == "name" else repr(value)}' for key, value in values.items()]
    assert configurator.read(flags, Settings) == [Settings(**values)]


# ---- what is refused ----

CODE = ['open(CANARY, "w")', '__import__("os").system("touch " + CANARY)', 'f"{open(CANARY, chr(119))}"',
        '[open(CANARY, "w") for _ in "a"]', '(lambda: open(CANARY, "w"))()', 'lambda: 1', 'print', 'a.b', '[1][0]',
        '[*"ab"]', '1 if True else 2', '2 ** 3', 'not 1', '1 < 2', 'None', 'b"a"', '1j', '...', '(1, 2)', '{1: 2}',
        '"a" * 2', '"a" + "b"', 'True + 1', '-True', '[1] + [2]', '[1]', '1 / 0', '(yield)', '(x := 1)']


@pytest.mark.parametrize('code', CODE)
def test_code_in_a_value_is_refused_and_not_run(read, tmp_path, code):
    canary = tmp_path / 'canary'
    code = code.replace('CANARY', repr(str(canary)))
    for key in 'steps', 'rate', 'fast', 'name':
        assert 'config.py, line 2' in refused(read, f'\n{key} = {code}')
        if key != 'name':                               # a flag of type str is not parsed
            assert f'{key} must be' in refused(read, '', f'--{key}={code}')
    assert not canary.exists()


@pytest.mark.parametrize('statement', [
    'import os', 'open(CANARY, "w")', 'def f():\n    open(CANARY, "w")\nf()', 'for steps in [1]:\n    pass', '1',
    'steps += 1', 'steps: int = 1', 'steps = rate = 1', 'steps, rate = 1, 2', 'a.steps = 1', 'del steps',
    'with open(CANARY, "w"):\n    pass', 'class A(open(CANARY, "w")): pass', 'assert open(CANARY, "w")',
    'try:\n    open(CANARY, "w")\nfinally:\n    pass'])
def test_statements_are_refused_and_not_run(read, tmp_path, statement):
    canary = tmp_path / 'canary'
    assert 'config.py, line 2' in refused(read, f'steps = 1\n{statement.replace("CANARY", repr(str(canary)))}')
    assert not canary.exists()


@pytest.mark.parametrize('source', [
    '(' * 10_000 + '1' + ')' * 10_000, '-' * 10_000 + '1', '-' * 2500 + '1', '*'.join(['9'] * 10_000),
    '+'.join(['1'] * 2500), '[' * 10_000, 'a' + '.a' * 10_000, '9' * 5000, '*'.join(['9' * 4000] * 100),
    '0x' + 'f' * 10_000, str(2**63), '1\0'],
    ids='parentheses signs fewer-signs product sum brackets dots digits large-product hex 64-bit nul'.split())
def test_huge_values_get_a_one_line_error(read, source):
    for key in 'steps', 'rate':
        assert 'config.py' in refused(read, f'{key} = {source}')
        if len(source) < 100:
            assert f'{key} must be' in refused(read, '', f'--{key}={source}')
        else:
            with pytest.raises(ValueError, match=f'{key} must be'):
                read('', f'--{key}={source}')


def test_unknown_key_names_file_line_and_nearest_key(read):
    message = refused(read, '\n\nstesp = 1')
    assert 'config.py, line 3' in message and "'stesp'" in message and "'steps'" in message
    assert "--nmae=x: unknown key 'nmae'; did you mean 'name'?" in refused(read, '', '--nmae=x')


@pytest.mark.parametrize('key, value', [('steps', '1.0'), ('steps', "'1'"), ('steps', 'True'), ('rate', 'False'),
                                        ('rate', "'1'"), ('name', '1'), ('fast', '1'), ('fast', "'True'")])
def test_wrong_type_names_key_line_and_type(read, key, value):
    kind = type(getattr(Settings(), key)).__name__
    message = refused(read, f'\n{key} = {value}')
    assert 'config.py, line 2' in message and f'{key} must be {kind}' in message and value in message
    if key != 'name':
        assert f'--{key}={value}: {key} must be {kind}' in refused(read, '', f'--{key}={value}')


def test_bad_value_names_where_it_was_set(read):
    assert refused(read, 'rate = 1\nsteps = -1').endswith('config.py, line 2: steps is -1, it must not be negative')
    assert refused(read, 'steps = 1', '--steps=-1').startswith('--steps=-1: steps is -1')
    assert refused(read, 'steps = -1', '--rate=2').endswith('config.py, line 1: steps is -1, it must not be negative')


@pytest.mark.parametrize('line', ['steps = = 2', '  rate = 2', 'name = "a', ')'])
def test_syntax_error_names_file_and_line(read, line):
    assert 'config.py, line 2: ' in refused(read, f'steps = 1\n{line}')


def test_missing_file_is_named(tmp_path):
    for path in tmp_path / 'none.py', tmp_path:         # a folder cannot be read either
        with pytest.raises(ValueError, match=f'{path}: cannot be read'):
            configurator.read([str(path)], Settings)


@pytest.mark.parametrize('argument', ['--name=\udcff', '\udcff.py'])
def test_bytes_that_are_not_utf8_are_refused(argument):
    with pytest.raises(ValueError, match='is not valid UTF-8'):
        configurator.read([argument], Settings)


@pytest.mark.parametrize('arguments, answer', [
    (['--fast'], '--fast: write --key=value, here --fast=True'), (['--name'], '--name: write --key=value'),
    (['--rate', '3e-4'], '--rate 3e-4: write --key=value, here --rate=3e-4'),
    (['--rate', '-1'], '--rate -1: write --key=value, here --rate=-1'),
    (['--name', 'a b'], "--name a b: write --key=value, here --name='a b'"),
    (['--fast', 'False'], '--fast False: write --key=value, here --fast=False'),
    (['--fast', 'x.py'], '--fast: write --key=value, here --fast=True'),
    (['nowhere.py', '--steps', '3'], '--steps 3: write --key=value, here --steps=3'),
    (['--nmae=x', '-steps=3'], '-steps=3: write --key=value, here --steps=3'),
    (['-s'], '-s: write --key=value'), (['--steps', '=3'], '--steps: write --key=value, here --steps=3'),
    (['--steps', '--fast=True'], '--steps: write --key=value'), (['--'], '--: write --key=value')])
def test_a_flag_of_another_form_is_answered_before_anything_else(arguments, answer):
    for read in configurator.read, configurator.read_with_files:
        with pytest.raises(ValueError) as error:
            read(arguments, Settings)
        assert str(error.value) == answer


# ---- help, and what the terminal can show ----

@dataclasses.dataclass
class Commented(Other):
    name: str = ''                  # its name; '' or '#': none
    path: str = 'a b'


@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help_lists_every_setting_with_its_default_and_its_comment(monkeypatch, capsys, flag):
    doc = 'Do it: `python it.py`.\n\nWhy.\n\n    python it.py --a=1\n'
    monkeypatch.setattr(sys.modules['__main__'], '__doc__', doc)
    for arguments in [flag], ['--rate', '3', 'nowhere.py', flag]:
        with pytest.raises(SystemExit) as exit:
            configurator.read(arguments, Commented, Settings)
        assert exit.value.code is None                  # exit code 0
        assert capsys.readouterr().out.splitlines() == [
            'Do it: `python it.py`.', '', '    python it.py --a=1', '', '--width=8', "--name=''".ljust(33) +
            "its name; '' or '#': none", "--path='a b'", '--steps=1', '--rate=1.0', '--name=a', '--fast=False']


PROGRAMS = sorted('.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__main__')
                  for folder in ('', 'data', 'tasks', 'runtime', 'evidence', 'exercises')
                  for path in (ROOT.glob('*.py') if not folder else (ROOT / folder).glob('**/*.py'))
                  if re.search("^if __name__ == '__main__':(?!\n    work)", path.read_text(encoding='utf-8'), re.M))


@pytest.mark.filterwarnings('ignore:.*found in sys.modules')
@pytest.mark.parametrize('program', PROGRAMS)
def test_every_program_prints_its_settings_and_answers_key_value(monkeypatch, capsys, program):
    run = lambda: runpy.run_module(program, run_name='__main__', alter_sys=True)
    monkeypatch.setattr(sys, 'argv', [program, 'x', '-h'])
    with pytest.raises(SystemExit) as exit:
        run()
    out = capsys.readouterr().out
    assert exit.value.code is None and 'python' in out
    monkeypatch.setattr(sys, 'argv', [program, 'x', '--seed', '3'])
    with pytest.raises(SystemExit) as exit:
        run()
    assert exit.value.code.endswith(': --seed 3: write --key=value, here --seed=3')


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp1252', 'ascii:strict', 'utf-8'])
def test_what_the_terminal_cannot_show_is_replaced(encoding):
    code = """if True:
        import sys, configurator
        with configurator.one_line_errors('it'):
            print('naïve 漢字')
            print('漢', file=sys.stderr)
            raise ValueError('字')"""
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=ENV | {'PYTHONIOENCODING': encoding},
                         capture_output=True)
    seen = lambda text: (text + '\n').encode(encoding.removesuffix(':strict'), 'replace')
    assert out.stdout.replace(b'\r', b'') == seen('naïve 漢字')
    assert out.stderr.replace(b'\r', b'') == seen('漢') + seen('it: 字') and out.returncode == 1


# ---- settings without effect ----

def test_a_setting_without_effect_is_refused():
    configurator.refuse_unused(Settings(steps=2), 'rate fast', 'here')
    with pytest.raises(ValueError, match='^fast has no effect with --steps: leave it out$'):
        configurator.refuse_unused(Settings(fast=True), 'rate fast', 'with --steps')


SNIPPETS = 'steps|name| = |1|-|*|(|)|[|]|,|.|\'|"""|#|\\|\n|\r|\t|é|\0'.split('|')


@given(st.one_of(st.binary(), st.text(), st.lists(st.sampled_from(SNIPPETS)).map(''.join)))
@example('steps = "\\ud800"')
def test_any_file_is_read_or_refused_with_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / 'any.py'
    path.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8', 'surrogatepass'))
    try:
        configurator.read([str(path)], Settings)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and 'any.py' in str(error)


@given(st.sampled_from(['steps', 'rate', 'name', 'fast', 'other']), st.text())
def test_any_flag_is_read_or_refused(key, text):
    try:
        settings, = configurator.read([f'--{key}={text}'], Settings)
    except ValueError as error:
        assert key in str(error)
    else:
        assert key != 'name' or settings.name == text


NEEDS_COMPILER = ("p.py: --compile=True needs a C++ compiler and Python's headers: install g++ and python3-dev, "
                  'or name a compiler in CXX')


@pytest.mark.parametrize('error, line', [
    (ValueError('lr is -1'), 'p.py: lr is -1'), (OSError(2, 'gone', 'x'), "p.py: [Errno 2] gone: 'x'"),
    (torch.OutOfMemoryError('2 GiB\nmore'), 'p.py: out of memory; try less (2 GiB)'),
    (MemoryError(), 'p.py: out of memory; try less (MemoryError)'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"),
     "p.py: out of memory; try less (DefaultCPUAllocator: can't allocate memory: 9)"),
    (RuntimeError('Storage size calculation overflowed\nmore'),
     'p.py: out of memory; try less (Storage size calculation overflowed)'),
    (RuntimeError('InvalidCxxCompiler: none'), NEEDS_COMPILER),
    (RuntimeError('fatal error: Python.h: No such file'), NEEDS_COMPILER),
    (KeyboardInterrupt(), 'p.py: stopped; run it again')])
def test_errors_that_the_user_can_fix_are_one_line_and_exit_code_1(error, line):
    with pytest.raises(SystemExit) as exit, configurator.one_line_errors('p.py', 'try less', 'run it again'):
        raise error
    assert exit.value.code == line              # sys.exit(text) prints it and exits with 1


@pytest.mark.parametrize('error', [TypeError, RuntimeError])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(error), configurator.one_line_errors('p.py'):
        raise error


# ---- dtype of matrix products ----

@pytest.mark.parametrize('seconds, units, chosen', [
    ((3, 1), True, torch.bfloat16), ((1, 3), True, torch.float32), ((3, 1), False, torch.float32)])
def test_auto_is_bf16_on_a_cpu_with_bf16_units_that_is_faster(monkeypatch, seconds, units, chosen):
    """On a CPU without bf16 units the dtype is float32, whatever the timing on a busy machine."""
    clock, turn = itertools.accumulate(itertools.cycle([0, seconds[0], 0, seconds[1]])), itertools.count()
    monkeypatch.setattr(device.time, 'perf_counter', lambda: next(clock))
    monkeypatch.setattr(torch.Tensor, '__matmul__', lambda x, W: torch.full((1,), float(next(turn) % 2 * units)))
    assert pick_dtype('auto', torch.device('cpu')) == chosen
    assert pick_dtype('float32', torch.device('cpu')) == torch.float32


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_products_in_bf16_leave_the_head_in_float32(monkeypatch, dtype):
    """Checked by the setting, not by the result: a CPU without bf16 units gives the same products in both."""
    linear, seen = F.linear, []
    monkeypatch.setattr(F, 'linear', lambda x, W: [seen.append(bf16_matmuls()), linear(x, W)][1])
    x, W = torch.randn(6, 8), torch.randn(5, 8)
    with matmuls_in(dtype, torch.device('cpu')):
        F.linear(x, W)
        assert logits(x, W).equal(x @ W.T) or dtype == torch.bfloat16
        F.linear(x, W)
    assert seen == [dtype == torch.bfloat16, False, dtype == torch.bfloat16]


@pytest.mark.parametrize('user', [{}, {'GOMP_SPINCOUNT': '7'}, {'OMP_WAIT_POLICY': 'PASSIVE'}])
@pytest.mark.parametrize('program', ['train', 'sample', 'rsa', 'rl', 'evaluate', 'bench', 'runtime.serve',
                                     'tests.conftest'])
def test_how_threads_wait_is_set_before_torch_is_imported_unless_the_user_set_it(program, user):
    code = '''
import os, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == 'torch':
            print(os.environ.get('GOMP_SPINCOUNT'))
            os._exit(0)
sys.meta_path.insert(0, Finder)
'''
    env = {key: value for key, value in ENV.items() if key not in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')} | user
    out = subprocess.run([sys.executable, '-c', f'{code}import {program}'], cwd=ROOT, env=env, capture_output=True)
    expected = user.get('GOMP_SPINCOUNT', 'None' if user else '5000')
    assert out.stdout.decode().split() == [expected], out.stderr.decode()[-300:]
