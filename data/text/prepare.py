"""Token files from your own text: any files and folders, in any language or encoding.

    python data/text/prepare.py FILES_OR_FOLDERS... [--out=DIR] [--vocab_size=N] [--tokenizer=bpe|gpt2]

Folders are read recursively, without hidden and binary files. One file is split by position (its end is
val), several by a hash of their names.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
import configurator
from data.prepare import prepare


def text_documents(arguments):
    """[(name, bytes)] of the files among and below the given paths; a file given twice counts once.

    Raises ValueError if a path does not exist.
    """
    tops = [Path(os.path.abspath(argument)) for argument in arguments]
    for top in tops:
        if not top.exists():
            raise ValueError(f'{top} does not exist')
    root = Path(os.path.commonpath(tops))          # names are relative to it, so no two are equal
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
    parser = argparse.ArgumentParser(description='Writes token files of your own text.')
    parser.add_argument('paths', nargs='+', metavar='FILES_OR_FOLDERS')
    parser.add_argument('--out', default=Path(__file__).parent, help='folder to write (default: data/text)')
    parser.add_argument('--vocab_size', type=int, default=4096, help='size of the vocabulary (default: 4096)')
    parser.add_argument('--tokenizer', choices=['bpe', 'gpt2'], default='bpe',
                        help='bpe: trained on this text (default); gpt2: ready made, ignores --vocab_size')
    args = parser.parse_args()
    with configurator.one_line_errors('prepare.py: error'):
        prepare(text_documents(args.paths), args.out, args.vocab_size, args.tokenizer)
