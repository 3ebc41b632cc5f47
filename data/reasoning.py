"""Reasoning data: conversations to tokens, long ones trimmed to the context, short ones packed into windows.

Each reply of a conversation (conversations.py) is one training sample: the prompt that chat would give the model for
it, rendered by the same template (language.py), and the reply:

    <|user|> q <|end|> <|assistant|> <think> t </think> a <|end|>               a reply with reasoning
    <|user|> q <|end|> <|assistant|> <think> </think> a <|end|>                 without: --think=False asks this way

In the prompt, earlier replies are without their reasoning. The loss covers what follows <|assistant|>, except an
empty <think> </think>, which belongs to the prompt. No <|endoftext|> follows: <|end|> ends the turn, and the flags of
write_packed mark where the next document starts.

Two methods let a model with a short context learn from long reasoning (ZAYA1-8B report, arXiv 2605.05365, III):

  - Answer-preserving (AP) trimming makes a sample fit the context by the first of these rules that suffices. (1) Keep
    the sample unchanged. (2) Cut the end of the last turn's reasoning, no more than needed. (3) Drop the reasoning of
    the earlier turns, and cut that of the last as in (2). (4) Drop the sample: its questions and answers alone are too
    long. The samples of `render` have one turn, so (3) has nothing to drop. Two common alternatives are included for
    comparison: dropping long samples loses the hard problems, and truncation loses their answers.
  - Packing puts whole samples into windows of one size by best-fit decreasing (arXiv 2404.10830): the longest first,
    each into the fullest window that has room for it. No sample is cut, and there is little padding.

The functions are in the order in which data passes through them.
"""

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from data.prepare import replacing, token_dtype, write_tokenizer_and_meta

SCORED, STARTS = 1, 2    # the bits of a .flags file: see write_packed


class Turn(NamedTuple):
    """A prompt and its reply, as lists of tokens. A sample is a list of turns: a single one, if `render` made it.

    Trimming treats the three parts differently. The loss covers all but the prompt; these tokens are called scored.
    """
    prompt: list         # earlier turns, <|user|> question <|end|> <|assistant|>; <think> </think> if without reasoning
    think: list          # <think> reasoning </think>, or [] without reasoning
    answer: list         # answer <|end|>


# --- samples -----------------------------------------------------------------------------------------------


def render(messages, language):
    """Return the samples of a conversation, one per reply, each a list of one Turn. messages: see messages_of."""
    samples, history = [], []
    for message in messages:
        role, content = message['role'], message['content']
        if role == 'assistant':
            think, answer = message['reasoning'], language.encode(content)      # whatever the text is, no special token
            prompt = language.prompt(history, think=think is not None)
            reasoning = [] if think is None else language.open_think + language.encode(think) + language.close_think
            samples.append([Turn(prompt, reasoning, answer + language.encode_with_special('<|end|>'))])
            content = [answer]
        history.append({'role': role, 'content': content})
    return samples


def length(sample):
    """Return the number of tokens of a sample."""
    return sum(len(part) for turn in sample for part in turn)


def flatten(sample):
    """Return (tokens, scored) of a sample, lists of equal length. scored[i]: the loss covers token i."""
    tokens, scored = [], []
    for prompt, think, answer in sample:
        tokens += prompt + think + answer
        scored += [False] * len(prompt) + [True] * (len(think) + len(answer))
    return tokens, scored


# --- trimming ----------------------------------------------------------------------------------------------
# A rule takes a sample and a budget in tokens, and returns (the trimmed sample or None, the outcome: one of OUTCOMES).


def ap_trim(sample, budget):
    """Trim a sample to `budget` tokens: keep all questions and answers, and as much reasoning as fits.

    The sample is None only if questions and answers alone exceed the budget. A larger budget never gives a shorter
    result or a later rule. It keeps less of the last turn's reasoning only where rule 2, which keeps the earlier turns'
    reasoning, replaces rule 3, which drops it.
    """
    if length(sample) <= budget:
        return sample, 'kept'
    if cut := cut_last(sample, budget):
        return cut, 'cut'
    without = [turn._replace(think=[]) for turn in sample[:-1]] + sample[-1:]
    if cut := cut_last(without, budget):
        return cut, 'earlier dropped'
    return None, 'dropped'


def cut_last(sample, budget):
    """Return the sample with the longest prefix of its last reasoning that fits; None if it does not fit without any.

    The prefix keeps its tags. If no token fits between them, the tags are dropped too: an empty block would teach the
    model to end its reasoning at once.
    """
    think = sample[-1].think
    room = budget - (length(sample) - len(think))  # for the reasoning and its tags
    if room < 0:
        return None
    if room < len(think):
        think = think[:room - 1] + think[-1:] if room > 2 else []
    return sample[:-1] + [sample[-1]._replace(think=think)]


def truncate(sample, budget):
    """Keep the first `budget` tokens: a long sample loses its answer and part of its reasoning."""
    if length(sample) <= budget:
        return sample, 'kept'
    start, room = [], budget
    for turn in sample:
        if room == 0:
            break
        parts = []
        for part in turn:
            parts.append(part[:room])
            room -= len(parts[-1])
        start.append(Turn(*parts))
    return (start, 'truncated') if start else (None, 'dropped')


def drop(sample, budget):
    """Keep the sample only if it has at most `budget` tokens."""
    return (sample, 'kept') if length(sample) <= budget else (None, 'dropped')


RULES = {'ap': ap_trim, 'truncate': truncate, 'drop': drop}
OUTCOMES = 'kept', 'cut', 'earlier dropped', 'truncated', 'dropped'


def trim(samples, budget, rule='ap'):
    """Trim an iterable of samples to `budget` tokens by one rule.

    Return ([(tokens, scored)], Counter of the outcomes). tokens (int32) and scored (bool) are those of `flatten` as
    arrays, which take a tenth of the memory of lists.
    """
    flat, outcomes = [], Counter()
    for sample in samples:
        trimmed, outcome = RULES[rule](sample, budget)
        outcomes[outcome] += 1
        if trimmed is not None:
            tokens, scored = flatten(trimmed)
            flat.append((np.array(tokens, np.int32), np.array(scored, bool)))
    return flat, outcomes


def trim_and_report(name, samples, budget, rule):
    """Trim as `trim` does, print the outcomes under this name, and return [(tokens, scored)]."""
    flat, outcomes = trim(samples, budget, rule)
    counts = ', '.join(f'{outcomes[outcome]:,} {outcome}' for outcome in OUTCOMES if outcomes[outcome])
    print(f'{name}, {rule} to {budget:,} tokens: {counts}')
    return flat


# --- packing -----------------------------------------------------------------------------------------------


def pack(lengths, capacity):
    """Pack by best-fit decreasing. Return bins, each a list of indices into lengths; each index is in exactly one bin.

    lengths: the number of tokens per sample. The longest sample comes first (of equal lengths the one listed first),
    and goes into the fullest bin that has room for it. Bins with the same space left are interchangeable, so a sorted
    list of the distinct spaces, at most `capacity`, is enough: a binary search finds the bin, and a million samples
    pack in seconds. Raise ValueError for a sample that is empty or longer than capacity.
    """
    bins = []
    spaces = []                                    # the distinct spaces left in bins, ascending
    with_space = defaultdict(list)                 # space -> the bins with exactly this space left
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n = lengths[i]
        if not 1 <= n <= capacity:
            raise ValueError(f'sample {i} has {n} tokens, must be 1 to {capacity}: trim it first')
        at = bisect_left(spaces, n)                # the smallest sufficient space
        if at < len(spaces):
            space = spaces[at]
            b = with_space[space].pop()
            if not with_space[space]:
                del spaces[at]
        else:
            space, b = capacity, len(bins)
            bins.append([])
        bins[b].append(i)
        if left := space - n:
            if not with_space[left]:
                insort(spaces, left)
            with_space[left].append(b)
    return bins


def padding(lengths, bins, capacity):
    """Return (the fraction of positions that are padding, the lower bound ceil(sum(lengths) / capacity) on bins).

    lengths: the number of tokens per sample; bins: the result of `pack`.
    """
    total = sum(lengths)
    return 1 - total / (len(bins) * capacity), -(-total // capacity)


def write_packed(splits, out, capacity, enc):
    """Write a packed dataset with its tokenizer enc to the folder out, as `replacing` does.

    splits: {"train": [(tokens, scored), ...], "val": [...], ...}, samples as `flatten` returns them. Per split:

        train.bin    windows * capacity tokens; each window is padded at its end with token 0
        train.flags  one byte per position. Bit 0, SCORED: the next token is the target of this position. Bit 1, STARTS:
                     a document starts here; the padding counts as one. Documents do not attend to each other, so the
                     first token of a document is not a target.
        meta.json    vocab_size, "tokenizer" (its digest), dtype, "packed": capacity, and per split "tokens" (without
                     padding), "documents", "windows" and "padding", its fraction of all positions

    Raise ValueError, before anything is written, if a sample does not fit or a split has no target.
    """
    packed = {}
    for split, samples in splits.items():
        if not any(any(scored[1:]) for _, scored in samples):
            raise ValueError(f'{split} has nothing to learn from: none of its {len(samples)} samples '
                             'has a scored token; give more conversations or a larger context')
        try:
            packed[split] = pack([len(tokens) for tokens, _ in samples], capacity)
        except ValueError as error:
            raise ValueError(f'{split}: {error}') from None

    meta, dtype = {'packed': capacity}, token_dtype(enc.n_vocab)
    with replacing(out) as folder:
        for split, bins in packed.items():
            meta[split] = write_windows(folder / f'{split}.bin', splits[split], bins, capacity, dtype)
        write_tokenizer_and_meta(folder, enc, meta)


def write_windows(path, samples, bins, capacity, dtype):
    """Write the windows of one split to path and their flags next to it. Return the split's entry in meta.json."""
    n_scored = 0
    with open(path, 'wb') as bin_file, open(path.with_suffix('.flags'), 'wb') as flags_file:
        for members in bins:
            window, flags = fill_window([samples[i] for i in members], capacity, dtype)
            n_scored += np.count_nonzero(flags & SCORED)
            bin_file.write(window.tobytes())
            flags_file.write(flags.tobytes())
    lengths = [len(tokens) for tokens, _ in samples]
    fraction, fewest = padding(lengths, bins, capacity)
    print(f'{path.name}: {len(samples):,} documents, {sum(lengths):,} tokens ({n_scored:,} scored), '
          f'{len(bins):,} windows of {capacity:,} (at least {fewest:,}), {fraction:.2%} padding')
    return {'tokens': sum(lengths), 'documents': len(samples), 'windows': len(bins), 'padding': round(fraction, 6)}


def fill_window(samples, capacity, dtype):
    """Return (tokens, flags), arrays of length capacity, of one window with these samples."""
    window, flags = np.zeros(capacity, dtype), np.zeros(capacity, np.uint8)
    start = 0
    for tokens, scored in samples:
        end = start + len(tokens)
        window[start:end] = tokens
        flags[start:end - 1] = np.asarray(scored[1:], bool) * SCORED
        flags[start] |= STARTS
        start = end
    if start < capacity:
        flags[start] = STARTS
    return window, flags
