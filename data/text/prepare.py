"""Write token files from your own text: any files and folders, in any language or encoding. From the project's root:

    python -m data.text.prepare FILES_OR_FOLDERS... [--out=DIR] [--vocab_size=N] [--tokenizer=bpe|gpt2]

Folders are read recursively, without hidden and binary files. Several files are split into train and val by a hash of
their names, a single file by position: its end is val.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import configurator
from data.prepare import prepare


@dataclass
class TextConfig:
    out: str = str(Path(__file__).parent)          # folder to write: data/text
    vocab_size: int = 4096                         # tokens of the vocabulary that is trained
    tokenizer: str = 'bpe'                         # 'bpe': trained on this text; 'gpt2': downloaded, 50,262 tokens

    def __post_init__(self):
        configurator.check_ranges(self, tokenizer=('bpe', 'gpt2'))


def text_documents(paths):
    """Return [(name, bytes)] of all files in the given files and folders, each once.

    Raise ValueError if there are no paths, or one does not exist.
    """
    if not paths:
        raise ValueError('name the files or folders to read: python -m data.text.prepare FILES_OR_FOLDERS...')
    tops = [Path(os.path.abspath(path)) for path in paths]
    for top in tops:
        if not top.exists():
            raise ValueError(f'{top} does not exist')
    root = Path(os.path.commonpath(tops))          # names are relative to it, so all differ
    root = root.parent if root.is_file() else root
    documents = {}                                 # path -> (name, bytes): each file once
    for top in tops:
        for path in [top] if top.is_file() else sorted(top.rglob('*')):
            hidden = any(part.startswith('.') for part in path.relative_to(top).parts)
            if not hidden and path.is_file():
                documents[path] = (path.relative_to(root).as_posix(), path.read_bytes())
    text = [(name, data) for name, data in documents.values() if b'\0' not in data]
    if len(text) < len(documents):
        print(f'skipped {len(documents) - len(text)} binary files')
    return text


if __name__ == '__main__':
    with configurator.one_line_errors('data.text.prepare'):
        paths, config = configurator.read_with_files(sys.argv[1:], TextConfig)
        prepare(text_documents(paths), config.out, config.vocab_size, config.tokenizer)
