"""Settings: dataclass defaults, then config files in the order given, then --key=value flags; later values override.

A config file holds plain assignments, `lr = 3e-4` or `max_steps = 600_000 * 2`, and comments. It has Python's syntax,
but it is only parsed, with `ast`: numbers, strings, True, False and arithmetic. Nothing in it is executed, and a key
that is not a field of a dataclass is an error.
"""
import ast
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import itertools
import operator
import os
import re
import shlex
import sys

from validate import read_text

# OpenMP threads spin at a barrier before they sleep. If another program occupies a core, torch's default (libgomp:
# 300,000 turns) makes a step of config/loops.py take 10 s instead of 0.2; with 5,000 turns it takes 0.6, and 0.2 alone.
# The variable is read when torch is imported, so programs import this file first.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '5000')

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.USub: operator.neg, ast.UAdd: operator.pos}
OUT_OF_MEMORY = "can't allocate memory|not enough memory|[Oo]ut of memory|overflow|bad_alloc|Invalid buffer size"
# What evaluate_literal raises; thousands of nested brackets give the last two.
NOT_A_VALUE = ValueError, ArithmeticError, SyntaxError, RecursionError, MemoryError


def evaluate_literal(node):
    """Return the value of a syntax tree of literals and arithmetic on numbers. Raise one of NOT_A_VALUE otherwise."""
    if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float, str):
        value = node.value
    elif isinstance(node, (ast.BinOp, ast.UnaryOp)) and type(node.op) in OPERATORS:
        operands = [evaluate_literal(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        if not all(type(operand) in (int, float) for operand in operands):
            raise ValueError('arithmetic works on numbers only')
        value = OPERATORS[type(node.op)](*operands)
    else:
        raise ValueError(f'`{ast.unparse(node)[:60]}` is neither a literal nor arithmetic on literals')
    if type(value) is int and not -2**63 <= value < 2**63:      # also bounds the time of 9 * 9 * 9 * ...
        raise ValueError('a whole number must fit into 64 bits')
    return value


def assignments(path):
    """Return [(key, value, 'path, line n'), ...] of a config file. Raise ValueError naming the file and the line."""
    found, place, key, text = [], path, '', read_text(path)
    try:
        for line in ast.parse(text).body:
            place, key = f'{path}, line {line.lineno}', ''
            match line:
                case ast.Assign(targets=[ast.Name(id=name)], value=node):
                    key = f'{name}: '
                    found.append((name, evaluate_literal(node), place))
                case ast.Expr(value=ast.Constant(value=str())):                 # a docstring
                    pass
                case _:
                    code = ast.unparse(line).splitlines()[0][:60]
                    raise ValueError(f'only `key = value` lines are read, this is `{code}`')
    except SyntaxError as error:
        raise ValueError(f'{path}, line {error.lineno or 1}: {error.msg}') from None
    except NOT_A_VALUE as error:
        raise ValueError(f'{place}: {key}{str(error) or "too many brackets"}') from None
    return found


def parse_flag(flag, types):
    """Return (key, value, flag) of --key=value. The value stays text if the key has type str or it is not a literal."""
    key, _, value = flag[2:].partition('=')                     # at the first '=': the value may contain others
    if types.get(key) is not str:
        with contextlib.suppress(*NOT_A_VALUE):
            value = evaluate_literal(ast.parse(value.strip(), mode='eval').body)
    return key, value, flag


def check_flags(arguments, classes):
    """Print the settings and exit for -h and --help. Raise ValueError for the first flag that is not --key=value."""
    if {'-h', '--help'} & set(arguments):
        print_settings(classes)
        sys.exit()
    switches = {field.name for cls in classes for field in dataclasses.fields(cls) if type(field.default) is bool}
    for flag, after in itertools.pairwise([*arguments, '']):
        key, equals, value = flag.lstrip('-').partition('=')
        after = '' if after.startswith('--') else after
        if flag.startswith('-') and not (flag.startswith('--') and equals):
            value = value or ('True' if key in switches and after not in ('True', 'False') else after.lstrip('='))
            shown = f'{flag} {after}' if value and value == after else flag
            raise ValueError(f'{shown}: write --key=value' + (f', here --{key}={shlex.quote(value)}' if value else ''))


def print_settings(classes):
    """Print the start of the program's docstring, then each setting with its default and its comment in the source."""
    first, *others = (inspect.getdoc(sys.modules['__main__']) or '').split('\n\n')
    lines = ['\n\n'.join([first, *(paragraph for paragraph in others if 'python ' in paragraph)]), '']
    for cls in classes:
        source = ''.join(map(inspect.getsource, cls.__mro__[-2::-1]))           # inherited fields first
        comments = dict(re.findall(r'^    (\w+): .*?  # (.*)$', source, re.M))
        for field in dataclasses.fields(cls):
            flag = f'--{field.name}={shlex.quote(str(field.default))}'
            lines.append(f'{flag:<32} {comments.get(field.name, "")}'.rstrip())
    print('\n'.join(lines))


def read(arguments, *classes, **defaults):
    """Return one instance per dataclass in `classes` for the command line [config/NAME.py] [--key=value ...].

    Flags override files, in any order. defaults: override those of the classes. A key belongs to the class that has the
    field. The types int, float, str and bool are checked; an int is accepted for a float. -h prints the settings.
    Raise ValueError, one line that names the key and where it was set, also for what the classes' own checks refuse.
    """
    types = {field.name: type(field.default) for cls in classes for field in dataclasses.fields(cls)}
    found, values, made = [], defaults, []
    check_flags(arguments, classes)
    for argument in sorted(arguments, key=lambda argument: argument.startswith('--')):          # a stable sort
        if re.search('[\ud800-\udfff]', argument):             # how Python represents invalid bytes
            raise ValueError(f'{argument!r}: is not valid UTF-8')
        found += [parse_flag(argument, types)] if argument.startswith('--') else assignments(argument)
    for key, value, where in found:
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1, cutoff=0)
            hint = f'did you mean {near[0]!r}?' if near else 'this program has no settings'
            raise ValueError(f'{where}: unknown key {key!r}; {hint}')
        values[key] = float(value) if types[key] is float and type(value) is int else value
        if type(values[key]) is not types[key]:
            raise ValueError(f'{where}: {key} must be {types[key].__name__}, got {value!r}')
    for cls in classes:
        names = values.keys() & {field.name for field in dataclasses.fields(cls)}
        try:
            made.append(cls(**{name: values[name] for name in names}))
        except ValueError as error:                             # the message names keys: add where they were set
            mentioned = [where for key, _, where in found if key in re.findall(r'\w+', str(error))]
            raise ValueError(': '.join([*mentioned[-1:], str(error)])) from None
    return made


def read_with_files(arguments, *classes):
    """Split arguments into file names and flags. Return [names, *settings], one instance per dataclass in `classes`."""
    check_flags(arguments, classes)
    files = [argument for argument in arguments if not argument.startswith('--')]
    return [files, *read([argument for argument in arguments if argument.startswith('--')], *classes)]


def check_ranges(settings, **allowed):
    """Raise ValueError for a setting outside its allowed values.

    key=(low, high): from low to high, both included; high None: no upper bound for an int, 1e9 for a float.
    key=('this', 'that'): one of these strings.
    """
    for key, choices in allowed.items():
        value, low, high = getattr(settings, key), choices[0], choices[-1]
        if isinstance(low, str):
            fits, wanted = value in choices, f'be one of {", ".join(choices)}'
        elif high is None and isinstance(value, int):
            fits, wanted = low <= value, f'be at least {low}'
        else:
            fits, wanted = low <= value <= (high or 1e9), f'lie between {low} and {high or 1e9:g}'
        if not fits:
            raise ValueError(f'{key} is {value!r}, it must {wanted}')


def refuse_unused(settings, keys, when):
    """Raise ValueError if one of `keys`, separated by spaces, is not at its default: it has no effect `when`."""
    for field in dataclasses.fields(settings):
        if field.name in keys.split() and getattr(settings, field.name) != field.default:
            raise ValueError(f'{field.name} has no effect {when}: leave it out')


def package(name):
    """Import and return an optional package. Raise ValueError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        name = name.partition('.')[0]
        raise ValueError(f'this needs the package {name}: pip install {name}') from None


@contextlib.contextmanager
def one_line_errors(program, when_full='', when_stopped=''):
    """Wrap a program's main function: exit with code 1 and a one-line message for errors that the user can fix.

    when_full, when_stopped: hints for the messages of an out-of-memory error and of Ctrl-C.
    Also, characters that the encoding of standard output or error does not have are replaced in all of its output.
    """
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):                      # not if it was replaced by a StringIO
            stream.reconfigure(errors='replace')
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f'{program}: {error}')
    except KeyboardInterrupt:
        sys.exit(f'{program}: stopped; {when_stopped}'.removesuffix('; '))
    except (RuntimeError, MemoryError) as error:
        text, kind = str(error) or type(error).__name__, type(error).__name__
        if 'InvalidCxxCompiler' in text or 'Python.h' in text:  # raised by torch.compile
            sys.exit(f"{program}: --compile=True needs a C++ compiler and Python's headers: install g++ and "
                     'python3-dev, or name a compiler in CXX')
        # On GPUs torch raises OutOfMemoryError; on CPUs a RuntimeError, or sizes overflow before any allocation.
        if kind not in ('OutOfMemoryError', 'MemoryError') and not re.search(OUT_OF_MEMORY, text):
            raise
        sys.exit(f'{program}: out of memory; {when_full}'.removesuffix('; ') + f' ({text.splitlines()[0]})')
