"""Create a student's copy of the project without the body of one function, and check what the student wrote.

The function is found by its name in the syntax tree, so the rest of its file may change. The tests in tests/ decide
whether it is correct; their names are the claims that `check` prints.
"""
import ast
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import configurator

ROOT = Path(__file__).parent.parent
COPIED = ('*.py *.toml README.md config/*.py runtime/*.py data/**/*.py tasks/**/*.py tasks/words/*.txt evidence/*.py '
          'kernels/*.* tests/*.py tests/*.h').split()
SECONDS = 600                                                   # time limit of a check


# ---- one function of a file ----

def locate(function):
    """Return the file of a function and the names in it: 'cca.CCA.forward' -> 'cca.py', ['CCA', 'forward']."""
    parts = function.split('.')
    n = next(n for n in range(1, len(parts)) if ROOT.joinpath(*parts[:n]).with_suffix('.py').is_file())
    return '/'.join(parts[:n]) + '.py', parts[n:]


def find(source, names):
    """Return the syntax tree node of a function, given by its qualified name, or None."""
    node = ast.parse(source)
    for name in names:
        node = next((child for child in getattr(node, 'body', ()) if getattr(child, 'name', None) == name), None)
    return node


def blank(source, names, exercise):
    """Return the source with the function's body, after its docstring, replaced by the task as a comment."""
    node, lines = find(source, names), source.splitlines(keepends=True)
    head = max([node.lineno, *(part.end_lineno for part in ast.walk(node.args) if hasattr(part, 'end_lineno'))])
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        head = first.end_lineno
    task = [f'EXERCISE {exercise.name}', *textwrap.dedent(exercise.task).strip().splitlines()]
    body = [f'# {line}'.rstrip() for line in task] + [f"raise NotImplementedError('{exercise.name}: not written yet')"]
    return ''.join([*lines[:head], *(' ' * first.col_offset + line + '\n' for line in body), *lines[node.end_lineno:]])


# ---- the copy ----

def start(exercise, folder):
    """Copy the project without the body of the function. Raise ValueError if the copy exists."""
    file, names = locate(exercise.function)
    if folder.exists():
        raise ValueError(f'{folder} exists already: continue in {folder / file}, or remove the folder to restart')
    text = {path: path.read_bytes() for pattern in COPIED for path in ROOT.glob(pattern)}
    source = blank(text[ROOT / file].decode(), names, exercise)
    text[ROOT / file] = source.encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:          # so that a copy is always complete
        for path, content in text.items():
            target = Path(unfinished, 'copy', path.relative_to(ROOT))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        os.rename(Path(unfinished, 'copy'), folder)
    print(f'{folder / file}, line {find(source, names).lineno}: write {".".join(names)}.',
          textwrap.dedent(exercise.task).strip(), f'\nThen: python -m exercises check {exercise.name}', sep='\n')


def check(exercise, folder):
    """Run the exercise's tests in the copy, and print which claims hold. Raise ValueError if any does not."""
    file, names = locate(exercise.function)
    path = folder / file
    if not path.is_file():
        raise ValueError(f'{path} does not exist: run python -m exercises start {exercise.name}')
    try:
        source = path.read_text(encoding='utf-8')
        node = find(source, names)
    except SyntaxError as error:
        raise ValueError(f'{path}, line {error.lineno}: {error.msg}') from None
    if node is None:
        raise ValueError(f'{path} has no function {".".join(names)}: restore its name')
    original = (ROOT / file).read_text(encoding='utf-8')
    if ast.unparse(node) == ast.unparse(find(blank(original, names, exercise), names)):
        raise ValueError(f'{path}, line {node.lineno}: {".".join(names)} is not written yet')
    results = run_tests(exercise, folder, file)
    for claim, problem in results.items():
        print(f'{"not yet" if problem else "holds":10}{claim}', *([f'{"":10}{problem}'] if problem else ()), sep='\n')
    wrong = sum(map(bool, results.values()))
    if wrong:
        raise ValueError(f'{exercise.name}: {wrong} of {len(results)} do not hold yet; '
                         f'python -m exercises hint {exercise.name}')
    print(f'{exercise.name} is done. How the project writes it: {file}, {".".join(names)}')


def tests_of(exercise):
    """Return the tests of an exercise: [(test file, test)]."""
    file, _, tests = exercise.tests.partition(': ')
    return [(file, test) for test in tests.split()]


def run_tests(exercise, folder, file):
    """Run the tests in one pytest process. Return {claim: '' if it holds, else the error in one line}."""
    for package in 'pytest', 'hypothesis':
        configurator.package(package)
    ids = [f'tests/{module}.py::{test}' for module, test in tests_of(exercise)]
    with tempfile.TemporaryDirectory() as reports:
        report = Path(reports, 'report.xml')
        command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'--junitxml={report}', *ids]
        environment = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(folder.resolve())}
        try:
            said = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise ValueError(f'{exercise.name}: not finished after {SECONDS} s: is there an endless loop?') from None
        cases = ElementTree.parse(report).findall('.//testcase') if report.is_file() else []
    results = {}
    for case in cases:
        claim = case.get('name').partition('[')[0].removeprefix('test_').replace('_', ' ')
        claim = claim if case.get('classname') else f'{file} can be imported'   # else the import failed
        bad = next((child for child in case if child.tag in ('failure', 'error', 'skipped')), None)
        results[claim] = results.get(claim) or ('' if bad is None else one_line(bad, file))
    if len(results) < len(ids) and not any(results.values()):
        last = (said.stdout + said.stderr).strip().splitlines()[-1:]
        raise ValueError(f'{folder}: the tests could not be run: {"".join(last)}')
    return results


def one_line(bad, file):
    """Summarize a failed test in one line: the error and the line of the student's file that raised it, or the failed
    assertion."""
    lines = (bad.text or '').splitlines()
    errors = [line[1:].strip() for line in lines if re.match(r'E\s+\S', line)] or [bad.get('message', '')]
    error = next((line for line in errors if re.match(r'[\w.]+(Error|Exception)\b', line)), errors[0])
    asserted = [line[1:].strip() for line in lines if re.match(r'>\s+assert ', line)]
    places = [match[1] for line in lines if (match := re.match(rf'(?:.*[/\\])?{re.escape(file)}:(\d+): ', line))]
    if places:
        error += f' ({file}, line {places[-1]})'
    elif asserted:
        error = asserted[-1]
    return textwrap.shorten(error, 110)
