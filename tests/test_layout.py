"""The layout: imports run one way, the core is read in one order, and files stay as short as they were meant to be."""
import ast
import subprocess

import pytest

from common import ROOT

CORE = 'layers cache cca router model sample optim train rsa'.split()          # the reading order, as README lists it
ROOT_FILES = {*CORE, *'rl decode quantize evaluate configurator validate bench'.split()}
FOLDERS = {'runtime', 'data', 'tasks', 'kernels', 'evidence', 'exercises'}
# What a folder may import besides itself.
ALLOWED = {'data': {'configurator', 'validate'}, 'kernels': {'layers', 'cca'},
           'runtime': {'configurator', 'validate', 'data', 'model', 'quantize'},
           'tasks': {'configurator', 'validate', 'data', 'runtime', 'decode', 'sample'}}


def module_files():
    """{module: path} of everything that users run or import."""
    paths = [*ROOT.glob('*.py'), *(path for folder in FOLDERS for path in (ROOT / folder).glob('**/*.py'))]
    return {'.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path for path in paths}


def imports(path, modules):
    """The project's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return found & set(modules)


MODULES = module_files()
GRAPH = {name: imports(path, MODULES) - {name} for name, path in MODULES.items()}
# Programs that stand in a folder but import what is above it, and which nothing may import.
PROGRAMS = {'runtime.serve'}
node_of = lambda module: module if module in PROGRAMS else module.partition('.')[0]         # a root file, or a folder


def assert_acyclic(graph):
    done = set()

    def visit(node, path):
        assert node not in path, ' > '.join([*path[path.index(node):], node])
        if node not in done:
            for other in sorted(graph[node]):
                visit(other, [*path, node])
            done.add(node)
    for node in graph:
        visit(node, [])


def test_imports_run_one_way_between_root_files_and_folders():
    nodes = {node_of(module): set() for module in GRAPH}
    for module, others in GRAPH.items():
        nodes[node_of(module)] |= {node_of(other) for other in others} - {node_of(module)}
    assert_acyclic(nodes)


def test_imports_run_one_way_between_modules():
    assert_acyclic(GRAPH)


def test_nothing_imports_a_program_of_a_folder():
    assert PROGRAMS <= set(GRAPH)
    for module, others in GRAPH.items():
        assert not others & PROGRAMS, module


@pytest.mark.parametrize('name', CORE)
def test_a_core_file_imports_no_core_file_that_is_read_after_it(name):
    later = set(CORE[CORE.index(name):]) | {'rl', 'evaluate', 'bench', 'evidence', 'exercises'}
    assert not {node_of(other) for other in GRAPH[name]} & later


@pytest.mark.parametrize('folder', ALLOWED)
def test_a_folder_imports_only_what_it_may(folder):
    for module, others in GRAPH.items():
        if node_of(module) == folder:
            assert {node_of(other) for other in others} <= ALLOWED[folder] | {folder}, module


def test_the_root_has_only_files_and_folders_that_the_layout_knows():
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    names = tracked or [str(path.relative_to(ROOT)) for path in MODULES.values()]          # not a git checkout
    assert {name[:-3] for name in names if '/' not in name and name.endswith('.py')} == ROOT_FILES
    assert {name.split('/')[0] for name in names if name.endswith('.py') and '/' in name} \
        == FOLDERS | {'config', 'tests'} & {name.split('/')[0] for name in names}


def count_lines(name):
    return (ROOT / f'{name}.py').read_text().count('\n')


def test_readme_lists_the_core_in_reading_order_with_its_true_line_counts():
    readme, places = (ROOT / 'README.md').read_text(), []
    for name in CORE:
        row = f'| `{name}.py` | {count_lines(name)} |'
        assert row in readme, row
        places.append(readme.index(row))
    assert places == sorted(places)


def test_the_core_has_at_most_1500_lines():
    assert sum(map(count_lines, CORE)) <= 1500


def test_functions_are_short_and_have_few_parameters():
    for module, path in MODULES.items():
        for f in ast.walk(ast.parse(path.read_text())):
            if isinstance(f, ast.FunctionDef):
                lines, parameters = f.end_lineno - f.lineno + 1, len(f.args.args) + len(f.args.kwonlyargs)
                assert lines <= 50, f'{module}.{f.name} has {lines} lines'
                few = parameters <= 9 or f.name in ('mix', 'cca_mix', '_')         # a kernel's arguments
                assert few, f'{module}.{f.name} has {parameters} parameters'


def test_readme_and_results_stay_short():
    assert (ROOT / 'README.md').read_text().count('\n') <= 200
    assert (ROOT / 'RESULTS.md').read_text().count('\n') <= 450
