"""Validation: everything read from a file, JSON or a checkpoint is checked once, on reading, against a schema.

Code behind this check does not validate again. A refused file gives a one-line error: the file, the key, the value
found, and what it must be. A schema is written as data of the shape that it describes:

    int, str, bool, torch.Tensor ...      an instance of this type (True is not an int)
    float                                 any finite number
    range(1, 100)                         an integer from 1 to 99
    None, 'zaya', 2, True                 this value
    (schema, schema, ...)                 any one of these
    [schema]                              a list of such; [schema, schema]: a list of exactly two
    {'key': schema, 'other?': schema}     an object with these keys; those with '?' are optional, others are ignored
    {str: schema}                         an object with any such keys, and only such values
"""
import codecs
import contextlib
import itertools
import json
import os
import re

MAX_BYTES, MAX_DEPTH = 2 ** 28, 100     # of a JSON file, and of its nested brackets: limits against malicious files
# Byte order marks; that of UTF-16 is the start of that of UTF-32.
BOMS = {codecs.BOM_UTF8: 'utf-8', codecs.BOM_UTF32_LE: 'utf-32-le', codecs.BOM_UTF32_BE: 'utf-32-be',
        codecs.BOM_UTF16_LE: 'utf-16-le', codecs.BOM_UTF16_BE: 'utf-16-be'}


def check(value, schema, where, key=''):
    """Raise ValueError unless value matches the schema. where: the file, for the error message."""
    if isinstance(schema, tuple):
        if not matches_any(value, schema):
            for option in schema:                               # an option of the value's type gives a better message
                if isinstance(option, (list, dict)) and isinstance(value, type(option)):
                    check(value, option, where, key)
            refuse(value, schema, where, key)
    elif isinstance(schema, list) and isinstance(value, list):
        if len(schema) > 1 and len(schema) != len(value):
            raise ValueError(f'{where}: {key} has {len(value)} entries, it must have {len(schema)}')
        for i, item in enumerate(value):
            check(item, schema[i] if len(schema) > 1 else schema[0], where, f'{key}[{i}]')
    elif isinstance(schema, dict) and isinstance(value, dict):
        for name, inner in schema.items():
            if isinstance(name, type):
                for k, item in value.items():
                    check(k, name, where, f'a key of {key or "it"}')
                    check(item, inner, where, f'{key}.{k}'.lstrip('.'))
            elif (bare := name.removesuffix('?')) in value:
                check(value[bare], inner, where, f'{key}.{bare}'.lstrip('.'))
            elif bare == name:
                raise ValueError(f'{where}: {f"{key}.{name}".lstrip(".")} is missing')
    elif isinstance(schema, type):
        types = (int, float) if schema is float else schema
        if not isinstance(value, types) or type(value) is bool and schema in (int, float) or \
                schema is float and not -1e308 < value < 1e308:         # also excludes NaN and ints beyond a float
            refuse(value, schema, where, key)
    elif isinstance(schema, range):
        if type(value) is not int or value not in schema:
            refuse(value, schema, where, key)
    elif isinstance(schema, (list, dict)) or type(value) is not type(schema) or value != schema:
        refuse(value, schema, where, key)


def matches_any(value, schemas):
    """Return True if value matches one of the schemas, else None."""
    for schema in schemas:
        with contextlib.suppress(ValueError):
            check(value, schema, '')
            return True


def refuse(value, schema, where, key):
    raise ValueError(f'{where}: {key or "the whole"} is {describe_value(value)}, it must be {describe(schema)}')


def describe_value(value):
    """Return a short text for a value: a scalar, truncated, or the type of a tensor, list or other object."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = f'{value:,}' if type(value) is int and 10**6 <= abs(value) < 10**30 else repr(value)
        return text if len(text) < 60 else f'{text[:60]}...'
    return f'a {type(value).__name__}'


def describe(schema):
    """Return a short text for a schema."""
    if isinstance(schema, tuple):
        return ' or '.join(map(describe, schema))
    if isinstance(schema, range):
        return f'a whole number from {schema.start:,} to {schema.stop - 1:,}'
    if isinstance(schema, (list, dict)):
        return 'a list' if isinstance(schema, list) else 'an object'
    if isinstance(schema, type):
        return {int: 'a whole number', float: 'a finite number', str: 'text', bool: 'true or false'}.get(
            schema, f'a {schema.__name__}')
    return repr(schema)


def parse_json(data, where, schema=None):
    """Return the value of JSON, given as bytes, checked against the schema if there is one. Raise ValueError."""
    try:
        text = data.decode('utf-8-sig')
        brackets = re.findall(r'[][{}]', re.sub(r'"(?:[^"\\]|\\.)*"', '', text, flags=re.S))
        if max(itertools.accumulate(1 if b in '[{' else -1 for b in brackets), default=0) > MAX_DEPTH:
            raise ValueError(f'brackets are nested more than {MAX_DEPTH} deep')
        value = json.loads(text, parse_constant=refuse_constant)
        if '\\ud' in text.lower():
            json.dumps(value, ensure_ascii=False).encode('utf-8')               # fails for an unpaired surrogate
    except UnicodeError:
        raise ValueError(f'{where}: is not valid Unicode') from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{where}: is not valid JSON ({getattr(error, "msg", error)})') from None
    if schema is not None:
        check(value, schema, where)
    return value


def refuse_constant(name):
    raise ValueError(f'{name} is not a number')


def read_bytes(path):
    """Return the content of a file. Raise ValueError if it cannot be read or has more than MAX_BYTES bytes."""
    try:
        if (size := os.stat(path).st_size) > MAX_BYTES:
            raise ValueError(f'{path}: has {size:,} bytes, more than {MAX_BYTES:,}')
        with open(path, 'rb') as file:
            return file.read()
    except OSError as error:
        raise ValueError(f'{path}: cannot be read ({error.strerror})') from None


def to_utf8(data):
    """Return the bytes of a text as UTF-8 without a byte order mark (BOM), which tells UTF-8, UTF-16 and UTF-32. Bytes
    without a BOM are returned unchanged. Raise UnicodeDecodeError if UTF-16 or UTF-32 is damaged."""
    for bom, encoding in BOMS.items():
        if data.startswith(bom):
            rest = data[len(bom):]
            return rest if encoding == 'utf-8' else rest.decode(encoding).encode()
    return data


def read_text(path):
    """Return the text of a file in UTF-8, or in UTF-16 or UTF-32 with a BOM. Raise ValueError naming the file."""
    data = read_bytes(path)
    with reading(path):
        return to_utf8(data).decode()


def read_json(path, schema={str: object}):
    """Return the value of a JSON file, checked against the schema. Raise ValueError naming the file."""
    return parse_json(read_bytes(path), path, schema)


@contextlib.contextmanager
def reading(path):
    """Wrap a library call that reads a file: every error, a Rust panic included, becomes a one-line ValueError."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError, SystemExit):
        raise
    except BaseException as error:                              # pyo3's PanicException is not an Exception
        text = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f'{path}: cannot be read ({text[0]})') from None
