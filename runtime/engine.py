"""Continuous batching: a thread generates for many requests at once, which join and leave the batch between two steps.

    waiting --> reading: one prompt, in chunks --> active: the batch, one token per step --> finished

A prompt is read in a cache of its own, at most `chunk` tokens per step, so that the others keep streaming. Then that
cache is appended to the batch's, whose sequences may differ in length (cache.py). The first in `waiting` starts when
the caches have room for all tokens that it may generate, in addition to those of the others: none is ever evicted.

    (number of sequences) x (most tokens of any of them, prompt and limit) <= capacity

Up to rounding, the tokens of a sequence are those of sample.generate alone with the same seed, whatever else is in the
batch: it has its own random generator, seeded in the same way.
"""
import collections
import queue
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(eq=False)
class Sequence:
    """A prompt that the engine continues. Its events (sequence, token, logprobs, finish), one per token, are arguments
    for `put`. finish is None, with the last token 'stop' or 'length'; of a failed sequence, token is None and finish a
    text. logprobs: of the token and of the `top` likeliest ones, [(token, value), ...], or None."""
    prompt: list                    # of tokens
    limit: int                      # maximum number of new tokens
    options: object                 # sample.SamplingOptions
    index: int                      # of the prompt in sample.generate
    put: Callable
    cancelled: Callable             # () -> whether to leave at the next step
    top: int | None = None
    token: int | None = None        # the newest, which is not in the cache yet
    finish: str | None = None

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(hash((self.options.seed, self.index)))
        self.size, self.new = len(self.prompt) + self.limit, 0  # most tokens; tokens generated


class Engine:
    """step: a decode step without static shapes (decode.py). sample: sample.sample_from_logits. stop: the tokens that
    end a sequence. capacity: of all caches, in tokens. batch: most sequences. chunk: prompt tokens read per step."""

    def __init__(self, model, step, sample, stop, capacity, batch=64, chunk=512):
        self.model, self.step, self.sample_from_logits, self.stop = model, step, sample, set(stop)
        self.capacity, self.batch, self.chunk = capacity, batch, chunk
        self.inbox, self.stopping = queue.SimpleQueue(), False  # set by any thread: all sequences fail, later ones too
        self.waiting, self.reading, self.active = [], [], []    # Sequences; those in `reading` have the same prompt
        self.prompt_cache = self.cache = None                   # of `reading` and of `active`

    @torch.no_grad()
    def run(self):
        """Continue the Sequences of the inbox. Return after a None in it."""
        while self.receive():
            try:
                self.advance()
            except Exception as error:                          # such as out of memory: those that wait are kept
                print(f'a step failed: {type(error).__name__}', file=sys.stderr)
                self.fail(self.reading + self.active, 'the model failed: send fewer or shorter requests')

    def receive(self):
        """Move sequences from the inbox to `waiting`; without other work, wait for one. Return False after None."""
        while not self.inbox.empty() or not (self.waiting or self.reading or self.active):
            if (sequence := self.inbox.get()) is None:
                return False
            self.waiting.append(sequence)
        return True

    def fail(self, sequences, message):
        for s in sequences:
            if not s.finish:
                s.finish = message
                s.put((s, None, None, message))

    def advance(self):
        """Remove finished and cancelled sequences, read up to `chunk` tokens of prompts, and run a step."""
        sequences = self.waiting + self.reading + self.active
        self.fail(sequences if self.stopping else [], 'the server is stopping')
        self.fail([s for s in sequences if s.cancelled()], 'cancelled')
        self.remove_finished()
        self.read_prompts()
        if self.active:
            longest, limit = max(self.cache.lengths), max(s.size for s in self.active)
            if longest == self.cache.capacity or limit < self.cache.capacity:
                merge(self.cache, [], min(limit, longest + max(longest // 2, 64)))
            tokens = torch.tensor([s.token for s in self.active], device=self.model.device)
            self.sample(self.active, self.step(self.cache, tokens))

    def remove_finished(self):
        self.waiting, self.reading = ([s for s in some if not s.finish] for some in (self.waiting, self.reading))
        self.prompt_cache = self.prompt_cache if self.reading else None
        rows = [row for row, s in enumerate(self.active) if not s.finish]
        if len(rows) < len(self.active):
            self.active = [self.active[row] for row in rows]
            if rows:
                self.cache.keep(rows)
        self.cache = self.cache if self.active else None

    def has_room(self):
        """Return whether the first waiting sequence may start."""
        group = self.active + self.reading + self.waiting[:1]
        return self.waiting and len(group) <= self.batch and len(group) * max(s.size for s in group) <= self.capacity

    def read_prompts(self):
        """Read prompts in chunks. At its end, a sequence joins the batch, together with those that wait next and have
        the same prompt, such as the choices of a request."""
        left = self.chunk
        while self.reading or self.has_room():
            if not self.reading:
                self.reading = [self.waiting.pop(0)]
                self.prompt_cache = self.model.make_cache(1, len(self.reading[0].prompt))
            prompt, cache = self.reading[0].prompt, self.prompt_cache
            new = prompt[cache.lengths[0]:][:self.chunk]
            if len(new) > left:
                return
            left -= len(new)
            logits, _ = self.model(torch.tensor([new], device=self.model.device), cache=cache, last_only=True)
            if cache.lengths[0] == len(prompt):                 # logits (1, 1, V)
                while self.has_room() and self.waiting[0].prompt == prompt:
                    self.reading.append(self.waiting.pop(0))
                self.sample(self.reading, logits[0].expand(len(self.reading), -1))
                cache.keep([0] * len(self.reading))
                self.cache = merge(self.cache, [cache], max(self.cache.capacity, len(prompt))) if self.active else cache
                self.active, self.reading = self.active + self.reading, []
                self.remove_finished()

    def sample(self, sequences, logits):
        """Sample the next token of each sequence, together for those with equal options. logits (B, V)."""
        groups = collections.defaultdict(list)
        for row, s in enumerate(sequences):
            groups[s.options.temperature, s.options.top_k, s.options.top_p, s.options.min_p].append(row)
        for options, rows in groups.items():
            u = torch.stack([torch.rand((), generator=sequences[row].generator) for row in rows]).to(logits.device)
            for row, token in zip(rows, self.sample_from_logits(logits[rows], u, *options).tolist()):
                self.add(sequences[row], token, logits[row])

    def add(self, s, token, logits):
        """Add a sampled token, -1 if the logits (V) are not finite, to its sequence."""
        if token < 0:
            return self.fail([s], 'the logits are not finite: the weights are damaged')
        s.token, s.new, logprobs = token, s.new + 1, None
        s.finish = 'stop' if token in self.stop else 'length' if s.new == s.limit else None
        if s.top is not None:
            x = logits.float().log_softmax(-1)
            values, likeliest = x.topk(s.top)
            logprobs = [(token, x[token].item()), *zip(likeliest.tolist(), values.tolist())]
        s.put((s, token, logprobs, s.finish))


def merge(cache, others, capacity):
    """Append the sequences of other Caches to a Cache, set its capacity, which may also become smaller, and return it.
    This takes one layer at a time to bound the peak memory."""
    caches = [cache, *others]
    for name in 'k', 'v', 'qk', 'v_last':
        for layer in range(len(cache.k)):
            parts = [getattr(c, name)[layer] for c in caches]
            if name in ('k', 'v'):                              # a negative number crops
                parts = [F.pad(t, (0, 0, 0, capacity - c.capacity)) for c, t in zip(caches, parts)]
            getattr(cache, name)[layer] = torch.cat(parts)
    cache.lengths, cache.capacity = [n for c in caches for n in c.lengths], capacity
    return cache
