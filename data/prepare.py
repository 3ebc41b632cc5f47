"""Documents to token files: split, train the tokenizer, encode, write. Used by data/stdlib and data/text.

A prepared folder contains

    train.bin, val.bin   the tokens only, as little-endian integers; every document ends in <|endoftext|>
    bpe.json             the tokenizer
    meta.json            vocab_size, the tokenizer's digest, dtype, and per split the number of tokens, bytes and files

A folder without meta.json is incomplete. An earlier dataset in the folder stays until the new one is complete.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np

from data.tokenizer import digest, encode_bytes, gpt2_encoding, load_tokenizer, save_tokenizer, train_bpe

VAL_PERCENT = 5
CHUNK = 1 << 20    # bytes that are encoded at once


def prepare(documents, out, vocab_size, tokenizer='bpe', tokenizer_from=''):
    """Write train.bin, val.bin, bpe.json and meta.json to the folder out.

    documents: list of (name, bytes), held in memory; tokenizer: "bpe", trained on the train split to vocab_size tokens,
    or "gpt2", downloaded; tokenizer_from: a prepared folder whose tokenizer is used instead. Raise ValueError if there
    is too little text.
    """
    start = time.time()
    splits = split_documents(documents)
    for split, docs in splits.items():
        print(f'{split}: {len(docs):,} documents, {sum(len(data) for _, data in docs):,} bytes')
    if tokenizer_from:
        enc = load_tokenizer(Path(tokenizer_from) / 'bpe.json')
    elif tokenizer == 'gpt2':
        enc = gpt2_encoding()
    else:
        # Invalid UTF-8 is replaced for training only; encode_bytes preserves it.
        enc = train_bpe((chunk.decode('utf-8', 'replace') for _, data in splits['train']
                         for chunk in line_chunks(data)), vocab_size)
    print(f'bpe.json: {enc.n_vocab:,} tokens, ready at {time.time() - start:.1f} s')
    meta = {}
    with replacing(out) as folder:
        for split, docs in splits.items():
            meta[split] = counts = write_documents(folder / f'{split}.bin', docs, enc)
            print(f"{split}.bin: {counts['tokens']:,} tokens of {token_dtype(enc.n_vocab).name}, "
                  f"{counts['bytes'] / counts['tokens']:.2f} bytes per token, ready at {time.time() - start:.1f} s")
        write_tokenizer_and_meta(folder, enc, meta)


def write_documents(path, documents, enc):
    """Write the tokens of the documents to path. Return their entry in meta.json."""
    n_tokens, dtype = 0, token_dtype(enc.n_vocab)
    with open(path, 'wb') as file:
        for _, data in documents:
            for tokens in *(encode_bytes(enc, chunk) for chunk in line_chunks(data)), [enc.eot_token]:
                file.write(np.array(tokens, dtype).tobytes())
                n_tokens += len(tokens)
    return {'tokens': n_tokens, 'bytes': sum(len(data) for _, data in documents), 'files': len(documents)}


def write_tokenizer_and_meta(folder, enc, meta):
    """Write bpe.json, and meta.json with the dict meta and what the tokenizer says."""
    save_tokenizer(folder / 'bpe.json', enc)
    meta = {'vocab_size': enc.n_vocab, 'tokenizer': digest(enc), 'dtype': token_dtype(enc.n_vocab).name} | meta
    (folder / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n', encoding='utf-8')


@contextlib.contextmanager
def replacing(out):
    """Yield a new folder for the files of a dataset; at the end they replace those of the folder out.

    On an exception, Ctrl-C included, out is unchanged. Old files are replaced, not overwritten: a running training may
    have them memory-mapped.
    """
    out = Path(out)
    folder = out / '.unfinished'
    shutil.rmtree(folder, ignore_errors=True)      # of a process that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
        (out / 'meta.json').unlink(missing_ok=True)             # until all files are replaced, out is incomplete
        for path in sorted(folder.iterdir(), key=lambda path: path.name == 'meta.json'):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def split_documents(documents):
    """Return {"train": [...], "val": [...]}, neither empty, with about VAL_PERCENT of the documents in val.

    documents: list of (name, data); empty ones are dropped. A hash of the name decides the split, so that adding a
    document moves no other (unless a split was empty). A single document is cut in two: its last lines, at least
    VAL_PERCENT of it, are val. Raise ValueError if there is nothing to split.
    """
    documents = sorted((name, data) for name, data in documents if data)
    if not documents:
        raise ValueError('there is no text to prepare: no files were found, or all are empty')
    if len(documents) == 1:
        name, data = documents[0]
        if len(data) < 2:
            raise ValueError(f'{name} has a single byte: too short to split into train and val')
        cut = max(1, len(data) * (100 - VAL_PERCENT) // 100)
        cut = data.rfind(b'\n', 0, cut) + 1 or cut
        return {'train': [(name, data[:cut])], 'val': [(name, data[cut:])]}

    def bucket(document):                          # 0..99, uniform, and the same on every machine
        return int(hashlib.sha256(document[0].encode('utf-8', 'surrogateescape')).hexdigest(), 16) % 100

    n_val = sum(bucket(document) < VAL_PERCENT for document in documents)
    n_val = min(max(n_val, 1), len(documents) - 1)
    documents.sort(key=bucket)
    return {'train': sorted(documents[n_val:]), 'val': sorted(documents[:n_val])}


def line_chunks(data):
    """Yield the bytes in chunks of whole lines of about 1 MB, so that large files are not encoded at once.

    A line of more than 2 MB is cut, between two characters of UTF-8: tiktoken's time per byte grows with the length of
    text without spaces.
    """
    start = 0
    while start < len(data):
        end = data.find(b'\n', start + CHUNK - 1) + 1 or len(data)
        if end - start > 2 * CHUNK:
            end = start + CHUNK // 8                            # data[end] may continue a character: 10xxxxxx
            end -= next((k for k in range(4) if data[end - k] & 0xc0 != 0x80), 0)
        yield data[start:end]
        start = end


def token_dtype(vocab_size):
    """Return the smallest unsigned dtype that holds every token: 2 bytes per token for most vocabularies."""
    return np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')
