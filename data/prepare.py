"""Documents to token files: split, train the tokenizer, encode, write. Used by data/stdlib and data/text.

A prepared folder contains

    train.bin, val.bin   the tokens only, as little-endian integers; every document ends in <|endoftext|>
    bpe.json             the tokenizer
    meta.json            vocab_size, the tokenizer's digest, dtype, and per split the number of tokens, bytes and files

meta.json is written last: a folder without it is incomplete.
"""

import hashlib
import io
import json
import os
import time
from pathlib import Path

import numpy as np

from data.tokenizer import digest, encode_bytes, gpt2_encoding, save_tokenizer, train_bpe

VAL_PERCENT = 5


def prepare(documents, out, vocab_size, tokenizer='bpe'):
    """Write train.bin, val.bin, bpe.json and meta.json to the folder out.

    documents: list of (name, bytes), held in memory; tokenizer: "bpe", trained on the train split to vocab_size tokens,
    or "gpt2", downloaded. Raise ValueError if there is too little text.
    """
    start = time.time()
    splits = split_documents(documents)
    for split, docs in splits.items():
        print(f'{split}: {len(docs):,} files, {sum(len(data) for _, data in docs):,} bytes')

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / 'meta.json').unlink(missing_ok=True)    # from here on, the folder is incomplete
    if tokenizer == 'gpt2':
        enc = gpt2_encoding()
    else:
        # Invalid UTF-8 is replaced for training only; encode_bytes preserves it.
        enc = train_bpe((chunk.decode('utf-8', 'replace') for _, data in splits['train']
                         for chunk in line_chunks(data)), vocab_size)
    save_tokenizer(out / 'bpe.json', enc)
    print(f'bpe.json: {enc.n_vocab:,} tokens, ready at {time.time() - start:.1f} s')
    dtype = token_dtype(enc.n_vocab)
    meta = {'vocab_size': enc.n_vocab, 'tokenizer': digest(enc), 'dtype': dtype.name}
    for split, docs in splits.items():
        n_tokens, n_bytes = 0, 0
        path = out / f'{split}.bin'
        path.unlink(missing_ok=True)               # not overwritten: a running training may have it memory-mapped
        with open(path, 'wb') as file:
            for _, data in docs:
                for chunk in line_chunks(data):
                    tokens = encode_bytes(enc, chunk)
                    file.write(np.array(tokens, dtype).tobytes())
                    n_tokens += len(tokens)
                file.write(np.array([enc.eot_token], dtype).tobytes())
                n_tokens += 1
                n_bytes += len(data)
        meta[split] = {'tokens': n_tokens, 'bytes': n_bytes, 'files': len(docs)}
        print(f'{split}.bin: {n_tokens:,} tokens of {dtype.name}, {n_bytes / n_tokens:.2f} bytes per token, '
              f'ready at {time.time() - start:.1f} s')
    write_meta(out, meta)


def write_meta(out, meta):
    """Write the dict meta to meta.json in the folder out, atomically, which marks the folder as complete."""
    (out / 'meta.json.tmp').write_text(json.dumps(meta, indent=2) + '\n', encoding='utf-8')
    os.replace(out / 'meta.json.tmp', out / 'meta.json')


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
    """Yield the bytes in chunks of whole lines of about 1 MB, so that large files are not encoded at once."""
    lines = io.BytesIO(data)
    while chunk := lines.readlines(1 << 20):
        yield b''.join(chunk)


def token_dtype(vocab_size):
    """Return the smallest unsigned dtype that holds every token: 2 bytes per token for most vocabularies."""
    return np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')
