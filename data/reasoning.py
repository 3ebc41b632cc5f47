"""Reasoning data: conversations to tokens, long ones trimmed to the context, short ones packed into windows.

A conversation is one line of a JSONL file, in the format of public reasoning datasets:

    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "<think>t</think>a"}, ...]}

and is encoded, with the special tokens of tokenizer.py, as

    <|user|> q <|end|> <|assistant|> <think> t </think> a <|end|>

The loss covers the assistant's tokens: everything after <|assistant|>. No <|endoftext|> follows: <|end|> ends the turn,
and the flags of write_packed mark where the next document starts.

Two methods let a model with a short context learn from long reasoning (ZAYA1-8B report, arXiv 2605.05365, III):

  - Answer-preserving (AP) trimming makes a sample fit the context by the first of these rules that suffices. (1) Keep
    the sample unchanged. (2) Cut the end of the last turn's reasoning, no more than needed. (3) Drop the reasoning of
    the earlier turns, and cut that of the last as in (2). (4) Drop the sample: its questions and answers alone are too
    long. Two common alternatives are included for comparison: dropping long samples loses the hard problems, and
    truncation loses their answers.
  - Packing puts whole samples into windows of one size by best-fit decreasing (arXiv 2404.10830): the longest first,
    each into the fullest window that has room for it. No sample is cut, and there is little padding.

The functions are in the order in which data passes through them.
"""

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from validate import parse_json
from data.prepare import token_dtype, write_meta
from data.tokenizer import digest, save_tokenizer

SCORED, STARTS = 1, 2    # the bits of a .flags file: see write_packed


class Turn(NamedTuple):
    """A question and its reply, as lists of tokens. A sample is a list of turns.

    Trimming treats the three parts differently. The loss covers all but the prompt; these tokens are called scored.
    """
    prompt: list         # <|user|> question <|end|> <|assistant|>
    think: list          # <think> reasoning </think>, or [] without reasoning
    answer: list         # answer <|end|>


# --- conversations -----------------------------------------------------------------------------------------


def read_conversations(path):
    """Return the conversations of a JSONL file, each a list of {"role", "content"}; other keys are ignored.

    Raise ValueError, naming the file and the line, if a line is not a conversation or there is none.
    """
    conversations = []
    with open(path, 'rb') as file:                 # bytes: in JSONL only \n ends a line
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f'{path}, line {number}'
                messages = parse_json(line, where, {'messages': [{'role': str, 'content': str}]})['messages']
                if problem := problem_of(messages):
                    raise ValueError(f'{where}: {problem}')
                conversations.append(messages)
    if not conversations:
        raise ValueError(f'{path} holds no conversation')
    return conversations


def problem_of(messages):
    """Return None if user and assistant alternate, from user to assistant, with nothing empty; else what is wrong."""
    if not messages:
        return 'a conversation needs at least one message'
    for i, message in enumerate(messages, 1):
        role, content = message['role'], message['content']
        if role not in ('user', 'assistant'):
            return f"message {i} has the role {role!r:.40}, must be 'user' or 'assistant'"
        if role != ('assistant', 'user')[i % 2]:
            return f'message {i} is of the {role}: user and assistant must take turns, user first'
        if not content.strip():
            return f'message {i} has no content'
        answer = split_think(content)[1] if role == 'assistant' else content
        if answer is None:
            return f'message {i} opens <think> but never closes it'
        if not answer.strip():
            return f'message {i} has no answer after </think>'
    if role == 'user':
        return 'the last message is of the user, must be of the assistant'


def split_think(content):
    """Return (reasoning or None, answer) of an assistant's content; the answer is None if <think> is not closed.

    A think block is at the start, after optional white space, and ends at the first </think>. Elsewhere the two tags
    are plain text. White space inside and after the block is kept.
    """
    block = content.lstrip()
    if not block.startswith('<think>'):
        return None, content
    think, closed, answer = block.removeprefix('<think>').partition('</think>')
    return think, answer if closed else None


def render(messages, enc):
    """Return the sample of a conversation, a list of Turns.

    encode_ordinary makes ordinary tokens of any text, so content cannot contain a special token. Raise ValueError if
    the tokenizer lacks the special tokens.
    """
    names = ['<|user|>', '<|assistant|>', '<|end|>', '<think>', '</think>']
    try:
        user, assistant, end, open_think, close_think = map(enc.encode_single_token, names)
    except KeyError:
        raise ValueError(f'the tokenizer lacks one of the special tokens {" ".join(names)}') from None
    sample = []
    for question, reply in zip(messages[::2], messages[1::2]):
        think, answer = split_think(reply['content'])
        prompt = [user, *enc.encode_ordinary(question['content']), end, assistant]
        reasoning = [] if think is None else [open_think, *enc.encode_ordinary(think), close_think]
        sample.append(Turn(prompt, reasoning, [*enc.encode_ordinary(answer), end]))
    return sample


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
    """Write a packed dataset with its tokenizer enc to the folder out; meta.json comes last, as in prepare.py.

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

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / 'meta.json').unlink(missing_ok=True)    # from here on, the folder is incomplete
    save_tokenizer(out / 'bpe.json', enc)
    dtype = token_dtype(enc.n_vocab)
    meta = {'vocab_size': enc.n_vocab, 'tokenizer': digest(enc), 'dtype': dtype.name, 'packed': capacity}
    for split, bins in packed.items():
        meta[split] = write_windows(out / f'{split}.bin', splits[split], bins, capacity, dtype)
    write_meta(out, meta)


def write_windows(path, samples, bins, capacity, dtype):
    """Write the windows of one split to path and their flags next to it. Return the split's entry in meta.json."""
    flags_path, n_scored = path.with_suffix('.flags'), 0
    for file in path, flags_path:                  # not overwritten: a running training may have them memory-mapped
        file.unlink(missing_ok=True)
    with open(path, 'wb') as bin_file, open(flags_path, 'wb') as flags_file:
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
