"""Batches of training windows from a token file: every token a target once per epoch, in shuffled order."""

import json
from pathlib import Path

import numpy as np
import torch

REPAIR = 'run `python data/stdlib/prepare.py`, or data/text/prepare.py for your own text'


class TokenLoader:
    """Batches of one split, as a pure function of (seed, batch index).

    With no state to save, training resumes from its step number alone, and processes that train together
    take different indices (step * world_size + rank) and see different windows without talking.

    The N tokens are cut into ceil((N - 1) / context) windows: window w has tokens[w*context : (w+1)*context]
    as inputs and the same shifted by one as targets. The last window may be short; it is filled up with
    input 0 and target -1, which the loss must ignore. So in one epoch every token but the very first
    (nothing precedes it) is a target exactly once. Each epoch visits the windows in another order, and a
    batch that comes to the end of one epoch goes on with the next, so no window is left out.

    Attributes: meta (the content of meta.json), vocab_size, n_tokens, n_windows.
    Raises ValueError, naming the file, if the data is missing, unfinished or damaged.
    """

    def __init__(self, folder, split, batch_size, context, seed):
        if min(batch_size, context) < 1 or seed < 0:
            raise ValueError(f'batch_size and context must be at least 1 and seed at least 0, '
                             f'got {batch_size}, {context} and {seed}')
        if split not in ('train', 'val'):
            raise ValueError(f"split is {split!r}, must be 'train' or 'val'")
        self.batch_size, self.context, self.seed = batch_size, context, seed

        path = Path(folder) / 'meta.json'
        try:
            self.meta = json.loads(path.read_text(encoding='utf-8'))
            self.vocab_size, self.n_tokens = int(self.meta['vocab_size']), int(self.meta[split]['tokens'])
            dtype = np.dtype({'uint16': '<u2', 'uint32': '<u4'}[self.meta['dtype']])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is missing or damaged ({type(error).__name__}): {REPAIR}') from None

        self.path = Path(folder) / f'{split}.bin'
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self.n_tokens * dtype.itemsize or self.n_tokens < 2:
            raise ValueError(f'{self.path} has {size:,} bytes, but meta.json says {self.n_tokens:,} tokens '
                             f'of {dtype.name} (at least 2 are needed): {REPAIR}')
        self.tokens = np.memmap(self.path, dtype, mode='r')  # read from disk as needed, never as a whole

        self.n_windows = -(-(self.n_tokens - 1) // context)  # rounded up
        self.epoch = self.order = None             # the epoch visited last, and its order of the windows

    def batch(self, index):
        """Batch number index (0, 1, ... without end): inputs and targets, both int64 (batch_size, context).

        Raises ValueError if the file holds a token outside the vocabulary.
        """
        x = np.zeros((self.batch_size, self.context), np.int64)
        y = np.full((self.batch_size, self.context), -1, np.int64)
        for row in range(self.batch_size):
            epoch, position = divmod(index * self.batch_size + row, self.n_windows)
            if epoch != self.epoch:
                self.order = np.random.default_rng((self.seed, epoch)).permutation(self.n_windows)
                self.epoch = epoch
            start = int(self.order[position]) * self.context
            window = self.tokens[start:start + self.context + 1]
            if window.max() >= self.vocab_size:
                raise ValueError(f'{self.path} holds token {window.max()}, outside the vocabulary of '
                                 f'{self.vocab_size}: {REPAIR}')
            x[row, :len(window) - 1] = window[:-1]
            y[row, :len(window) - 1] = window[1:]
        return torch.from_numpy(x), torch.from_numpy(y)
