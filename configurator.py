"""Settings: defaults from dataclasses, then config files in the order given, then --key=value; the later wins.

A config file holds plain assignments, `lr = 3e-4` or `max_steps = 600_000 * 2`, and comments. It looks like Python but
is only read, with `ast`: numbers, strings, True, False, and arithmetic. Nothing in it is executed, and a key that no
dataclass has is an error, not a new variable.
"""
import ast
import contextlib
import dataclasses
import difflib
import importlib
import operator
import re
import sys

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.USub: operator.neg, ast.UAdd: operator.pos}
FULL = "can't allocate memory|not enough memory|[Oo]ut of memory|overflow|bad_alloc|Invalid buffer size"
NO_VALUE = ValueError, ArithmeticError, SyntaxError, RecursionError, MemoryError   # the last two: thousands of brackets


def value_of(node):
    """The value of a syntax tree of literals and arithmetic on numbers. Raises one of NO_VALUE for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float, str):
        value = node.value
    elif isinstance(node, (ast.BinOp, ast.UnaryOp)) and type(node.op) in OPERATORS:
        sides = [value_of(side) for side in ast.iter_child_nodes(node) if isinstance(side, ast.expr)]
        if not all(type(side) in (int, float) for side in sides):
            raise ValueError('arithmetic works on numbers only')
        value = OPERATORS[type(node.op)](*sides)
    else:
        raise ValueError(f'`{ast.unparse(node)[:60]}` is neither a literal nor arithmetic on literals')
    if type(value) is int and not -2**63 <= value < 2**63:      # also keeps 9 * 9 * 9 * ... from growing without end
        raise ValueError('a whole number must fit into 64 bits')
    return value


def assignments(path):
    """[(key, value, 'path, line n'), ...] of a config file. Raises ValueError naming file and line."""
    found, place, key = [], path, ''
    try:
        with open(path, encoding='utf-8') as file:
            lines = ast.parse(file.read()).body
        for line in lines:
            place, key = f'{path}, line {line.lineno}', ''
            match line:
                case ast.Assign(targets=[ast.Name(id=name)], value=node):
                    key = f'{name}: '
                    found.append((name, value_of(node), place))
                case ast.Expr(value=ast.Constant(value=str())):                 # a docstring
                    pass
                case _:
                    code = ast.unparse(line).splitlines()[0][:60]
                    raise ValueError(f'only `key = value` lines are read, this is `{code}`')
    except OSError as error:
        raise ValueError(f'{path}: cannot be read ({error.strerror})') from None
    except SyntaxError as error:
        raise ValueError(f'{path}, line {error.lineno or 1}: {error.msg}') from None
    except NO_VALUE as error:
        raise ValueError(f'{place}: {key}{str(error) or "too many brackets"}') from None
    return found


def read(arguments, *classes, **defaults):
    """Command-line arguments [config/NAME.py] [--key=value ...] -> one instance of each dataclass in `classes`.

    Flags win over files wherever they stand. defaults: in place of the classes' own. A key belongs to whichever class
    has the field. Types int, float, str, bool are checked; an int passes for a float.
    Raises ValueError, one line that names the key and where it was set; so do the classes, by check_ranges.
    """
    kinds = {field.name: type(field.default) for cls in classes for field in dataclasses.fields(cls)}
    found, values, made = [], defaults, []
    for argument in sorted(arguments, key=lambda argument: argument.startswith('--')):         # sorted keeps the order
        if re.search('[\ud800-\udfff]', argument):  # so Python spells bytes that are none
            raise ValueError(f'{argument!r}: is not valid UTF-8')
        key, equals, value = argument[2:].partition('=')        # at the first '=': the value may hold more of them
        if not argument.startswith('--'):
            found += assignments(argument)
        elif not equals:
            raise ValueError(f'{argument}: write --key=value')
        else:
            with contextlib.suppress(*NO_VALUE):                # text that is no literal stays text
                value = value if kinds.get(key) is str else value_of(ast.parse(value.strip(), mode='eval').body)
            found.append((key, value, argument))
    for key, value, where in found:
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0)
            raise ValueError(f'{where}: unknown key {key!r}; did you mean {near[0]!r}?')
        values[key] = float(value) if kinds[key] is float and type(value) is int else value
        if type(values[key]) is not kinds[key]:
            raise ValueError(f'{where}: {key} must be {kinds[key].__name__}, got {value!r}')
    for cls in classes:
        names = values.keys() & {field.name for field in dataclasses.fields(cls)}
        try:
            made.append(cls(**{name: values[name] for name in names}))
        except ValueError as error:                             # of the keys it mentions: where the last was set
            mentioned = [where for key, _, where in found if key in re.findall(r'\w+', str(error))]
            raise ValueError(': '.join([*mentioned[-1:], str(error)])) from None
    return made


def check_ranges(settings, **allowed):
    """Raise ValueError for a setting out of its range. key=(low, high): from low to high, both included; high None: to
    any whole number, or a billion for a float. key=('this', 'that'): a choice of strings."""
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


def package(name):
    """Import an optional package. Raises ValueError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        name = name.partition('.')[0]
        raise ValueError(f'this needs the package {name}: pip install {name}') from None


@contextlib.contextmanager
def one_line_errors(program, when_full='', when_stopped=''):
    """Around a program's body: end what a person can put right with one line and exit code 1. The hints say what to try
    when memory is full, and what to know after Ctrl-C."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f'{program}: {error}')
    except KeyboardInterrupt:
        sys.exit(f'{program}: stopped; {when_stopped}'.removesuffix('; '))
    except (RuntimeError, MemoryError) as error:
        text, kind = str(error) or type(error).__name__, type(error).__name__
        if 'InvalidCxxCompiler' in text or 'Python.h' in text:  # what torch.compile found missing
            sys.exit(f"{program}: --compile=True needs a C++ compiler and Python's headers: install g++ and "
                     'python3-dev, or name a compiler in CXX')
        # torch's own kind, on GPUs; on CPUs its allocator says so in words, and sizes may overflow before it is asked.
        if kind not in ('OutOfMemoryError', 'MemoryError') and not re.search(FULL, text):
            raise
        sys.exit(f'{program}: out of memory; {when_full}'.removesuffix('; ') + f' ({text.splitlines()[0]})')
