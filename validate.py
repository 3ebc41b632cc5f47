"""The gate: all that is read from a file, JSON or a checkpoint, is compared here with what it should be, once.

Behind the gate nobody has to check. A file that is refused gets one line: file, key, what is there, what should be.
What should be is written as data that looks like what it describes, a `kind`:

    int, str, bool, torch.Tensor ...      this type, and no other (True is no int)
    float                                 any finite number
    range(1, 100)                         a whole number from 1 to 99
    None, 'zaya', 2, True                 this value
    (kind, kind, ...)                     one of these
    [kind]                                a list of such; [kind, kind]: of two, one of each
    {'key': kind, 'other?': kind}         an object with these keys, of which '?' may be left out; more do no harm
    {str: kind}                           an object with any such keys, and only such values
"""
import contextlib
import itertools
import json
import os
import re

LARGEST, DEEPEST = 2 ** 28, 100     # bytes of a JSON file; brackets in brackets. More is no honest file's, and costs


def check(value, kind, where, key=''):
    """Raise ValueError unless value is of the kind. where: the file, for the error."""
    if isinstance(kind, tuple):
        if not is_any(value, kind):
            for inner in kind:                                  # the one that it looks like has more to say
                if isinstance(inner, (list, dict)) and isinstance(value, type(inner)):
                    check(value, inner, where, key)
            refuse(value, kind, where, key)
    elif isinstance(kind, list) and isinstance(value, list):
        if len(kind) > 1 and len(kind) != len(value):
            raise ValueError(f'{where}: {key} has {len(value)} entries, it must have {len(kind)}')
        for i, item in enumerate(value):
            check(item, kind[i] if len(kind) > 1 else kind[0], where, f'{key}[{i}]')
    elif isinstance(kind, dict) and isinstance(value, dict):
        for name, inner in kind.items():
            if isinstance(name, type):
                for k, item in value.items():
                    check(k, name, where, f'a key of {key or "it"}')
                    check(item, inner, where, f'{key}.{k}'.lstrip('.'))
            elif (bare := name.removesuffix('?')) in value:
                check(value[bare], inner, where, f'{key}.{bare}'.lstrip('.'))
            elif bare == name:
                raise ValueError(f'{where}: {f"{key}.{name}".lstrip(".")} is missing')
    elif isinstance(kind, type):
        types = (int, float) if kind is float else kind         # True is an int to isinstance
        if not isinstance(value, types) or type(value) is bool and kind in (int, float) or \
                kind is float and not -1e308 < value < 1e308:   # nor is NaN, or a whole number that no float can hold
            refuse(value, kind, where, key)
    elif isinstance(kind, range):
        if type(value) is not int or value not in kind:
            refuse(value, kind, where, key)
    elif isinstance(kind, (list, dict)) or type(value) is not type(kind) or value != kind:
        refuse(value, kind, where, key)


def is_any(value, kinds):
    for kind in kinds:
        with contextlib.suppress(ValueError):
            check(value, kind, '')
            return True


def refuse(value, kind, where, key):
    raise ValueError(f'{where}: {key or "the whole"} is {shown(value)}, it must be {words(kind)}')


def shown(value):
    """A value in a few words: of a tensor, say, or a long list, not all of it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = f'{value:,}' if type(value) is int and abs(value) >= 10**6 and abs(value) < 10**30 else repr(value)
        return text if len(text) < 60 else f'{text[:60]}...'
    return f'a {type(value).__name__}'


def words(kind):
    """A kind in words."""
    if isinstance(kind, tuple):
        return ' or '.join(map(words, kind))
    if isinstance(kind, range):
        return f'a whole number from {kind.start:,} to {kind.stop - 1:,}'
    if isinstance(kind, (list, dict)):
        return 'a list' if isinstance(kind, list) else 'an object'
    if isinstance(kind, type):
        return {int: 'a whole number', float: 'a finite number', str: 'text', bool: 'true or false'}.get(
            kind, f'a {kind.__name__}')
    return repr(kind)


def parse_json(data, where, kind=None):
    """The value that JSON, as bytes, spells. kind: to check it against, if not None. Raises ValueError."""
    try:
        text = data.decode('utf-8-sig')
        brackets = re.findall(r'[][{}]', re.sub(r'"(?:[^"\\]|\\.)*"', '', text, flags=re.S))
        if max(itertools.accumulate(1 if b in '[{' else -1 for b in brackets), default=0) > DEEPEST:
            raise ValueError(f'more than {DEEPEST} brackets in brackets')
        value = json.loads(text, parse_constant=refuse_constant)
        if '\\ud' in text.lower():
            json.dumps(value, ensure_ascii=False).encode('utf-8')               # half of a pair is no character
    except UnicodeError:
        raise ValueError(f'{where}: is not valid Unicode') from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{where}: is not valid JSON ({getattr(error, "msg", error)})') from None
    if kind is not None:
        check(value, kind, where)
    return value


def refuse_constant(name):
    raise ValueError(f'{name} is no number')


def read_bytes(path):
    """What a file holds. Raises ValueError that names it, also if it is too large for a file of its sort."""
    try:
        if (size := os.stat(path).st_size) > LARGEST:
            raise ValueError(f'{path}: has {size:,} bytes, more than {LARGEST:,}')
        with open(path, 'rb') as file:
            return file.read()
    except OSError as error:
        raise ValueError(f'{path}: cannot be read ({error.strerror})') from None


def read_json(path, kind={str: object}):
    """The value in a JSON file, an object unless `kind` says otherwise. Raises ValueError that names the file."""
    return parse_json(read_bytes(path), path, kind)


@contextlib.contextmanager
def reading(path):
    """Around a library that reads a file: whatever it says, a panic of Rust too, becomes one line that names it."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError, SystemExit):
        raise
    except BaseException as error:                              # pyo3's PanicException is no Exception
        text = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f'{path}: cannot be read ({text[0]})') from None
