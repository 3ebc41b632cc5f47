"""Write token files from your own text: any files and folders, in any language or encoding. From the project's root:

    python -m data.text.prepare FILES_OR_FOLDERS... [--out=DIR] [--vocab_size=N] [--tokenizer=bpe|gpt2]
                                [--tokenizer_from=FOLDER] [--separator='<|endoftext|>']

Folders are read recursively, without hidden and binary files. A file is one document, except that in a .jsonl file the
"text" of each line is one, and --separator divides files into documents. Several documents are split into train and val
by a hash of their names (file and number), a single one by position: its end is val. UTF-16 with a byte order mark
(BOM) becomes UTF-8; other bytes are kept.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import configurator
from data.prepare import prepare
from validate import parse_json, to_utf8


@dataclass
class TextConfig:
    out: str = str(Path(__file__).parent)          # folder to write: data/text
    vocab_size: int = 4096                         # tokens of the vocabulary that is trained
    tokenizer: str = 'bpe'                         # 'bpe': trained on this text; 'gpt2': downloaded, 50,262 tokens
    tokenizer_from: str = ''                       # a prepared folder whose tokenizer is used instead
    separator: str = ''                            # text between two documents of a file; '': a file is one document

    def __post_init__(self):
        configurator.check_ranges(self, tokenizer=('bpe', 'gpt2'))
        if self.tokenizer_from and self.tokenizer == 'gpt2':
            raise ValueError('tokenizer_from and tokenizer=gpt2 name two tokenizers: give one')


def text_documents(paths, separator=''):
    """Return [(name, bytes)] of the documents in the given files and folders, each once; name files that are left out.

    Raise ValueError if there are no paths, one does not exist, or a line of a .jsonl file has no text.
    """
    if not paths:
        raise ValueError('name the files or folders to read: python -m data.text.prepare FILES_OR_FOLDERS...')
    documents = []
    for name, path in named_files(paths):
        data = path.read_bytes()
        try:
            data = to_utf8(data)
            problem = binary_problem(data)
        except UnicodeDecodeError:
            problem = 'it starts with the byte order mark of UTF-16 or UTF-32, but is not valid'
        if problem:
            print(f'left out {path}: {problem}')
            continue
        texts = jsonl_texts(path, data) if name.endswith('.jsonl') else [data]
        if separator:
            texts = [part for text in texts for part in text.split(separator.encode()) if part.strip()]
        numbered = separator or name.endswith('.jsonl')
        documents += [(f'{name}#{i:06}' if numbered else name, text) for i, text in enumerate(texts)]
    return documents


def named_files(paths):
    """Return [(name, path)] of all files in the given files and folders, each once. Raise ValueError if one is missing.
    """
    tops = [Path(os.path.abspath(path)) for path in paths]
    for top in tops:
        if not top.exists():
            raise ValueError(f'{top} does not exist')
    root = Path(os.path.commonpath(tops))          # names are relative to it, so all differ
    root = root.parent if root.is_file() else root
    found = {}
    for top in tops:
        for path in [top] if top.is_file() else sorted(top.rglob('*')):
            hidden = any(part.startswith('.') for part in path.relative_to(top).parts)
            if not hidden and path.is_file():
                found[path.relative_to(root).as_posix()] = path
    return list(found.items())


def binary_problem(data):
    """Return None for text, else why the bytes are not text: too large a share of NUL bytes, which text hardly has.

    Of compressed data 0.4% are NUL, of UTF-16 up to half. Valid UTF-8 is text up to 25%, other bytes up to 0.1%.
    """
    n, most = data.count(0), len(data) / 4
    try:
        if n:
            data.decode()
    except UnicodeDecodeError:
        most = max(1, len(data) / 1000)
    if n > most:
        return f'{n / len(data):.2%} of its bytes are NUL: it is binary, or UTF-16 without a byte order mark'


def jsonl_texts(path, data):
    """Return the "text" of each line of a JSONL file, as bytes. Raise ValueError naming the line."""
    return [parse_json(line, f'{path}, line {number}', {'text': str})['text'].encode()
            for number, line in enumerate(data.split(b'\n'), 1) if line.strip()]


if __name__ == '__main__':
    with configurator.one_line_errors('data.text.prepare'):
        paths, config = configurator.read_with_files(sys.argv[1:], TextConfig)
        prepare(text_documents(paths, config.separator), config.out, config.vocab_size, config.tokenizer,
                config.tokenizer_from)
