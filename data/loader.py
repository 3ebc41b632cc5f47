"""Batches of training sequences from token files: every token is a target once per epoch, in shuffled order."""
import os
import re
from pathlib import Path

import numpy as np
import torch

from validate import read_json
from data.reasoning import SCORED, STARTS
from data.tokenizer import digest, load_tokenizer

REPAIR = 'write it with the prepare.py of its folder, or name another dataset (data/README.md has them)'
SIZE = range(2 ** 50)
SPLIT = {'tokens': SIZE, 'windows?': SIZE}
META = {'vocab_size': range(1, 2 ** 31), 'tokenizer': str, 'dtype': ('uint16', 'uint32'), 'packed?': range(2 ** 31),
        'train': SPLIT, 'val': SPLIT}


class TokenLoader:
    """Batches of one split, a pure function of (seed, batch index).

    There is no state to save: training resumes from its step number alone. In data-parallel training each rank asks for
    the batches step * world_size + rank, so ranks read different windows without communication.

    The N tokens are cut into ceil((N - 1) / context) windows: window w has tokens[w*context : (w+1)*context] as inputs
    and the same shifted by one as targets. The last window may be short: it is padded with input 0 and target -1, which
    the loss ignores. So every token except the first, which has no predecessor, is a target exactly once per epoch.
    Each epoch visits the windows in a different order.

    A packed dataset (reasoning.py) is stored as windows of whole documents; its flags mark targets and document starts.

    Attributes: meta (the content of meta.json), vocab_size, n_tokens, n_windows; packed (the context of a packed
    dataset, else 0). Raise ValueError, naming the file, if the data is missing, unfinished or damaged.
    """

    def __init__(self, folder, split, batch_size, context, seed):
        if min(batch_size, context) < 1 or seed < 0:
            raise ValueError(f'batch_size and context must be at least 1 and seed at least 0, '
                             f'got {batch_size}, {context} and {seed}')
        if split not in ('train', 'val'):
            raise ValueError(f"split is {split!r}, must be 'train' or 'val'")
        self.batch_size, self.context, self.seed = batch_size, context, seed

        try:
            self.meta = read_json(Path(folder) / 'meta.json', META)
        except ValueError as error:
            raise ValueError(f'{error}: {REPAIR}') from None
        self.vocab_size, self.n_tokens = self.meta['vocab_size'], self.meta[split]['tokens']
        self.packed = self.meta.get('packed', 0)
        if self.packed not in (0, context):
            raise ValueError(f'{folder} is packed into windows of {self.packed}, but context is {context}: '
                             'prepare it again with --context, or change context')
        n_stored = self.meta[split].get('windows', 0) * self.packed if self.packed else self.n_tokens
        dtype = np.dtype({'uint16': '<u2', 'uint32': '<u4'}[self.meta['dtype']])
        self.path = Path(folder) / f'{split}.bin'
        self.tokens = map_file(self.path, dtype, n_stored)
        self.flags = map_file(self.path.with_suffix('.flags'), np.dtype('u1'), n_stored) if self.packed else None
        self.n_windows = n_stored // context if self.packed else -(-(n_stored - 1) // context)  # rounded up
        self.epoch = self.order = None             # the epoch of the last window, and its order of the windows

    def sequence(self, i):
        """Return sequence i (0, 1, ..., epoch after epoch): inputs and targets, int64, and document starts, bool.

        All three are arrays of length context. Raise ValueError for a token outside the vocabulary.
        """
        epoch, i = divmod(i, self.n_windows)
        if epoch != self.epoch:
            self.order = np.random.default_rng((self.seed, epoch)).permutation(self.n_windows)
            self.epoch = epoch
        first = int(self.order[i]) * self.context
        window = self.tokens[first:first + self.context + 1].astype(np.int64)
        if window.max() >= self.vocab_size:
            raise ValueError(f'{self.path} holds token {window.max()}, outside the vocabulary of '
                             f'{self.vocab_size}: {REPAIR}')
        x, y, start = np.zeros(self.context, np.int64), np.full(self.context, -1), np.arange(self.context) == 0
        if self.packed:
            flags = self.flags[first:first + self.context]
            scored, start = flags & SCORED != 0, flags & STARTS != 0
            x[:] = window[:self.context]
            y[scored] = window[1:][scored[:len(window) - 1]]
        else:
            x[:len(window) - 1] = window[:-1]
            y[:len(window) - 1] = window[1:]
        return x, y, start

    def batch(self, index):
        """Return batch number `index`, as stack_sequences does."""
        return stack_sequences(self, index)


def map_file(path, dtype, n):
    """Return the n elements of a file as a memory-mapped array. Raise ValueError if its size differs, or n < 2."""
    size = path.stat().st_size if path.exists() else 0
    if size != n * dtype.itemsize or n < 2:
        raise ValueError(f'{path} has {size:,} bytes, but meta.json says {n:,} elements '
                         f'of {dtype.name} (at least 2 are needed): {REPAIR}')
    return np.memmap(path, dtype, mode='r')


class MixtureLoader:
    """Batches whose sequences come from several datasets, in proportion to weights: also a pure function of the index.

    A schedule of 1000 entries, shuffled once and repeated, gives the dataset of each sequence; the weights are rounded
    to 1/1000. The sequences of each dataset come in its own order, none skipped: an epoch of it holds each window once.

    loaders: a TokenLoader per dataset, all of one batch_size, context and vocabulary; weights: positive.
    """

    def __init__(self, loaders, weights, seed):
        self.loaders = loaders
        self.batch_size, self.context = loaders[0].batch_size, loaders[0].context
        self.vocab_size, self.packed = loaders[0].vocab_size, any(loader.packed for loader in loaders)
        self.n_tokens = sum(loader.n_tokens for loader in loaders)
        self.n_windows = sum(loader.n_windows for loader in loaders)
        ends = np.round(np.cumsum(weights) / sum(weights) * 1000).astype(int)
        self.counts = np.diff(ends, prepend=0)     # entries per dataset in the schedule
        self.schedule = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(loaders)), self.counts))
        is_from = self.schedule[:, None] == np.arange(len(loaders))
        self.before = is_from.cumsum(0) - is_from  # (1000, datasets): earlier entries per dataset

    def sequence(self, i):
        """Return sequence i (0, 1, ...), as TokenLoader.sequence does."""
        cycle, i = divmod(i, len(self.schedule))
        k = self.schedule[i]
        return self.loaders[k].sequence(int(cycle * self.counts[k] + self.before[i, k]))

    def batch(self, index):
        """Return batch number `index`, as stack_sequences does."""
        return stack_sequences(self, index)


def stack_sequences(loader, index):
    """Return batch number `index` (0, 1, ...) of a loader: its sequences index * batch_size and following.

    Three tensors (batch_size, context): inputs and targets, int64, and document starts, bool; None instead of the
    starts if no dataset is packed: then a sequence is not divided into documents.
    """
    shape = loader.batch_size, loader.context
    # Allocate first: a batch that does not fit into memory fails at once.
    x, y, start = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, bool)
    for i in range(loader.batch_size):
        x[i], y[i], start[i] = loader.sequence(index * loader.batch_size + i)
    x, y, start = map(torch.from_numpy, (x, y, start))
    return x, y, start if loader.packed else None


def dataset_folders(dataset):
    """Return [(folder, weight), ...] of a string: 'data/stdlib', or 'data/stdlib:0.3 data/chat:0.7' for a mixture.

    Folders are separated by spaces; the name of an existing folder may contain spaces and colons. Raise ValueError for
    a weight that is not a positive number, and for a string without a folder.
    """
    words, found = re.split(r'\s', dataset), []
    while words:
        parts = {n: ' '.join(words[:n]) for n in range(len(words), 0, -1)}
        n = next((n for n, part in parts.items() if os.path.isdir(folder_and_weight(part)[0])), 1)
        folder, weight = folder_and_weight(parts[n])
        if not 0 < weight < float('inf'):
            raise ValueError(f'dataset: {parts[n]!r} should be FOLDER or FOLDER:WEIGHT with a positive weight')
        found += [(folder, weight)] * bool(folder)              # two spaces have an empty word between them
        words = words[n:]
    if not found:
        raise ValueError('dataset names no folder')
    return found


def folder_and_weight(text):
    """Return the folder and the number after the last colon: 1.0 if there is no colon, NaN if it is not a number."""
    folder, colon, weight = text.rpartition(':')
    if not colon or os.path.isdir(text) or re.search(r'[/\\]', weight):        # the colon of C:/data is part of it
        return text, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        return text, float('nan')


def open_dataset(dataset, split, batch_size, context, seed):
    """Return (loader, tokenizer) of a string as dataset_folders reads it: a TokenLoader; for several a MixtureLoader.

    Raise ValueError if the datasets' tokenizers differ, or one is not the tokenizer of its meta.json.
    """
    folders, weights = zip(*dataset_folders(dataset))
    loaders = [TokenLoader(folder, split, batch_size, context, seed) for folder in folders]
    encs = [load_tokenizer(Path(folder) / 'bpe.json') for folder in folders]
    for folder, loader, enc in zip(folders, loaders, encs):
        if (enc.n_vocab, digest(enc)) != (loader.vocab_size, loader.meta['tokenizer']):
            raise ValueError(f'{folder}: bpe.json is not the tokenizer that meta.json was written with: {REPAIR}')
        if digest(enc) != digest(encs[0]):
            raise ValueError(f'dataset: {folder} and {folders[0]} have different tokenizers: '
                             'prepare one with --tokenizer_from the other')
    return loaders[0] if len(loaders) == 1 else MixtureLoader(loaders, weights, seed), encs[0]
