"""The house: files are read in one direction, and stay as short as they were meant to be."""
import ast
from pathlib import Path

import pytest

from common import ROOT

CORE = 'layers cache cca router model sample optim train rsa'.split()          # the reading order, as README lists it
# What stands below the core and a file of it may use.
HELPERS = {'model': {'configurator'}, 'train': {'configurator', 'checkpoint', 'kernels', 'data'},
           'sample': {'configurator', 'checkpoint', 'decode', 'kernels', 'data'},
           'rsa': {'configurator', 'checkpoint', 'decode', 'data'}}
LINES = {'layers': 60, 'cca': 210, 'cache': 98, 'router': 109, 'model': 306, 'sample': 190, 'optim': 87, 'train': 302,
         'rsa': 201, 'checkpoint': 383, 'configurator': 199, 'decode': 230, 'quantize': 229, 'rl': 300, 'bench': 274,
         'data/loops/evaluate': 136}


def module_files():
    """{module: path} of all that users run or import."""
    folders = [ROOT / folder for folder in ('data', 'kernels', 'evidence', 'exercises')]
    files = [*ROOT.glob('*.py'), *(path for folder in folders for path in folder.glob('**/*.py'))]
    names = {path: '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__') for path in files}
    return {name: path for path, name in names.items()}


def imported(path, modules):
    """The modules of the project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return found & set(modules)


MODULES = module_files()
GRAPH = {name: imported(path, MODULES) - {name} for name, path in MODULES.items()}


def test_no_imports_go_in_a_circle():
    done = set()

    def visit(name, path):
        assert name not in path, ' > '.join([*path[path.index(name):], name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, [*path, name])
            done.add(name)
    for name in GRAPH:
        visit(name, [])


@pytest.mark.parametrize('name', CORE)
def test_a_file_of_the_core_imports_only_what_is_read_before_it(name):
    before = set(CORE[:CORE.index(name)]) | HELPERS.get(name, set())
    assert {other.partition('.')[0] for other in GRAPH[name]} <= before


def test_data_needs_nothing_of_the_model_and_kernels_only_what_they_replace():
    allowed = {'data': {'configurator', 'data'}, 'kernels': {'layers', 'cca', 'kernels'}}
    for name, others in GRAPH.items():
        folder = name.partition('.')[0]
        if folder in allowed and name != 'data.loops.evaluate':                # the tables, which measure a model
            assert {other.partition('.')[0] for other in others} <= allowed[folder], name


def test_readme_lists_the_core_in_reading_order_with_its_true_line_counts():
    readme, places = (ROOT / 'README.md').read_text(), []
    for name in CORE:
        row = f'| `{name}.py` | {count(name)} |'
        assert row in readme, row
        places.append(readme.index(row))
    assert places == sorted(places)


def count(name):
    return (ROOT / f'{name}.py').read_text().count('\n')


def test_the_core_has_at_most_1500_lines_and_no_file_more_than_its_share():
    assert sum(map(count, CORE)) <= 1500
    assert {name: count(name) for name in LINES if count(name) > LINES[name]} == {}
    assert (ROOT / 'README.md').read_text().count('\n') <= 220


def test_the_project_has_no_file_at_its_top_that_the_house_does_not_know():
    known = {*CORE, 'configurator', 'checkpoint', 'decode', 'quantize', 'rl', 'bench'}
    assert {Path(name).stem for name in ROOT.glob('*.py')} == known
