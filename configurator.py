"""Settings: defaults from dataclasses, then a config file, then --key=value, in this order; the later wins.

A config file holds plain assignments, `lr = 3e-4` or `max_steps = 600_000 * 2`, and comments. It looks like Python but
is only read, with `ast`: numbers, strings, True, False, and arithmetic. Nothing in it is executed, and a
key that no dataclass has is an error, not a new variable.
"""
import ast
import contextlib
import dataclasses
import difflib
import operator
import re
import sys
import textwrap

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv}


def value_of(node):
    """The value of a syntax tree made of literals and arithmetic on numbers. Raises ValueError for anything else."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            pass
        case ast.UnaryOp(op=ast.USub(), operand=operand) if type(value := value_of(operand)) in (int, float):
            value = -value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            left, right = value_of(left), value_of(right)
            if not all(type(side) in (int, float) for side in (left, right)):
                raise ValueError('arithmetic works on numbers only')
            try:
                value = OPERATORS[type(op)](left, right)
            except ArithmeticError as error:
                raise ValueError(str(error)) from None
        case _:
            raise ValueError(f'{source(node)} is neither a literal nor arithmetic on literals')
    if type(value) is int and not -2**63 <= value < 2**63:      # also keeps 9 * 9 * 9 * ... from growing without end
        raise ValueError('a whole number must fit into 64 bits')
    return value


def source(node):
    """A syntax tree as source again, for an error message: one line, not too long."""
    return textwrap.shorten(ast.unparse(node), 60, placeholder=' ...')


def assignments(path):
    """[(key, value, 'path, line n'), ...] of a config file. Raises ValueError naming file and line."""
    try:
        with open(path, encoding='utf-8') as file:
            tree = ast.parse(file.read())
    except OSError as error:
        raise ValueError(f'{path}: cannot be read ({error.strerror})') from None
    except SyntaxError as error:
        where = f'{path}, line {error.lineno}' if error.lineno else path
        raise ValueError(f'{where}: {error.msg}') from None
    except ValueError as error:                                 # not UTF-8, or a NUL byte
        raise ValueError(f'{path}: {error}') from None
    except (RecursionError, MemoryError):                       # how ast.parse gives up on thousands of brackets or signs
        raise ValueError(f'{path}: an expression is too deeply nested') from None
    found = []
    for statement in tree.body:
        where = f'{path}, line {statement.lineno}'
        match statement:
            case ast.Assign(targets=[ast.Name(id=key)], value=node):
                try:
                    found.append((key, value_of(node), where))
                except ValueError as error:
                    raise ValueError(f'{where}: {key}: {error}') from None
                except RecursionError:
                    raise ValueError(f'{where}: {key}: the expression is too deeply nested') from None
            case ast.Expr(value=ast.Constant(value=str())):     # a docstring
                pass
            case _:
                raise ValueError(f'{where}: only `key = value` lines are read, this is `{source(statement)}`')
    return found


def read(arguments, *classes):
    """Command-line arguments [config/NAME.py] [--key=value ...] -> one instance of each dataclass in `classes`.

    A key belongs to whichever class has the field. Field types int, float, str, bool are checked; an int passes
    for a float. A class reports a bad value by a ValueError that mentions the field's name. Raises ValueError, one
    line that names the key and where it was set.
    """
    kinds = {field.name: type(field.default) for cls in classes for field in dataclasses.fields(cls)}
    found = []
    for argument in arguments:
        if not argument.startswith('--'):
            found += assignments(argument)
            continue
        key, equals, text = argument[2:].partition('=')         # at the first '=': the value may hold more of them
        if not equals:
            raise ValueError(f'{argument}: write --key=value; the keys are the fields of {", ".join(cls.__name__ for cls in classes)}')
        try:
            value = text if kinds.get(key) is str else value_of(ast.parse(text.strip(), mode='eval').body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            value = text                                        # the type check below says what was expected
        found.append((key, value, argument))
    values = {}
    for key, value, where in found:
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0)
            raise ValueError(f'{where}: unknown key {key!r}; did you mean {near[0]!r}?')
        if kinds[key] is float and type(value) is int:
            value = float(value)
        if type(value) is not kinds[key]:
            raise ValueError(f'{where}: {key} must be {kinds[key].__name__}, got {value!r}')
        values[key] = value
    made = []
    for cls in classes:
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            made.append(cls(**{key: value for key, value in values.items() if key in names}))
        except ValueError as error:
            words = re.findall(r'\w+', str(error))
            mentioned = [where for key, _, where in found if key in words]
            raise ValueError(': '.join([*mentioned[-1:], str(error)])) from None    # whoever spoke last is to blame
    return made


@contextlib.contextmanager
def one_line_errors(program, when_full='', when_stopped=''):
    """Around a program's body: what a person can put right ends it with one line and exit code 1. The two hints: what to try
    when memory is full, and what to know after Ctrl-C."""
    hint = lambda text: f'; {text}' if text else ''
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        import torch                                            # here: who prepares data need not wait for it
        if any(name in str(error) for name in ('InvalidCxxCompiler', 'Python.h')):              # what torch.compile found missing
            sys.exit(f"{program}: --compile=True needs a C++ compiler and Python's headers: install g++ and python3-dev, "
                     'or name a compiler in CXX')
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise
        sys.exit(f'{program}: out of memory{hint(when_full)} ({(str(error) or type(error).__name__).splitlines()[0]})')
    except (ValueError, OSError) as error:
        sys.exit(f'{program}: {error}')
    except KeyboardInterrupt:
        sys.exit(f'{program}: stopped{hint(when_stopped)}')
