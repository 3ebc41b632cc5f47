"""Reasoning data: conversations to tokens, long ones fitted into the context, short ones packed into windows.

A conversation is one line of a JSONL file, as public reasoning sets write it:

    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "<think>t</think>a"}, ...]}

and becomes, with the special tokens of tokenizer.py,

    <|user|> q <|end|> <|assistant|> <think> t </think> a <|end|>

where the loss is on what the model has to say itself: everything after <|assistant|>. No <|endoftext|> follows: <|end|>
says that the turn is over, and the flags of write_packed say where the next document starts.

Two things then decide how much of long reasoning a model with a short context can learn (ZAYA1-8B report, arXiv
2605.05365, III):

  - AP-trimming, "answer-preserving", makes a sample fit the context by the first of these rules that can. (1) Keep it
    as it is. (2) Cut the end of the last turn's reasoning, no more than needed. (3) Drop the reasoning of the earlier
    turns, and cut that of the last as in (2). (4) Drop the sample: its questions and answers alone are too long.
    The two usual ways are here to compare: dropping what is long loses the hard problems, and plain truncation loses
    their answers.
  - Packing lays whole samples side by side in windows of one size, by best-fit decreasing (arXiv 2404.10830): the
    longest first, each into the fullest window that still has room. Nothing is cut, and hardly any space stays empty.

Read from the top: the functions come in the order in which data goes through them.
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

    Three parts, because trimming treats each in its own way, and because the loss leaves out the prompt: all else is
    "scored".
    """
    prompt: list         # <|user|> question <|end|> <|assistant|>
    think: list          # <think> reasoning </think>, or [] without reasoning
    answer: list         # answer <|end|>


# --- conversations -----------------------------------------------------------------------------------------


def read_conversations(path):
    """Return the conversations of a JSONL file, each a list of {"role", "content"}; other keys are ignored.

    Raise ValueError, naming the file and the line, for what is not a conversation (see check_messages), and
    if there is none.
    """
    conversations = []
    with open(path, 'rb') as file:                 # bytes: a line ends at \n and nowhere else, as JSONL has it
        for number, line in enumerate(file, 1):
            if line.strip():
                conversations.append(parse_conversation(line, f'{path}, line {number}'))
    if not conversations:
        raise ValueError(f'{path} holds no conversation')
    return conversations


def parse_conversation(line, where='conversation'):
    """Return the messages of one line, as bytes. Raise ValueError if it is not one conversation."""
    messages = parse_json(line, where, {'messages': [{'role': str, 'content': str}]})['messages']
    try:
        check_messages(messages, last='assistant')
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
    return messages


def check_messages(messages, last):
    """Raise ValueError unless user and assistant take turns, user first and `last` last, and all say something."""
    if not messages:
        raise ValueError('a conversation needs at least one message')
    for i, message in enumerate(messages):
        role, content = message['role'], message['content']
        if role not in ('user', 'assistant'):
            raise ValueError(f"message {i + 1} has the role {role!r:.40}, must be 'user' or 'assistant'")
        if role != ('user', 'assistant')[i % 2]:
            raise ValueError(f'message {i + 1} is of the {role}: user and assistant must take turns, user first')
        if not content.strip():
            raise ValueError(f'message {i + 1} has no content')
        if role == 'assistant':
            _, answer = split_think(content)
            if answer is None:
                raise ValueError(f'message {i + 1} opens <think> but never closes it')
            if not answer.strip():
                raise ValueError(f'message {i + 1} has no answer after </think>')
    if role != last:
        raise ValueError(f'the last message is of the {role}, must be of the {last}')


def split_think(content):
    """Return (reasoning or None, answer) of an assistant's content; the answer is None if <think> is not closed.

    A think block stands at the very start (after white space at most) and ends at the first </think>. Anywhere
    else the two tags are plain text, as in an answer about them. White space inside and after the block stays.
    """
    block = content.lstrip()
    if not block.startswith('<think>'):
        return None, content
    think, closed, answer = block.removeprefix('<think>').partition('</think>')
    return think, answer if closed else None


def render(messages, enc):
    """Return the sample that messages make: a list of Turns. If the last message is the user's, its turn has no reply.

    encode_ordinary turns the text into ordinary tokens, whatever it looks like: content cannot forge a special token.
    Raise ValueError if the tokenizer has no such special tokens.
    """
    names = ['<|user|>', '<|assistant|>', '<|end|>', '<think>', '</think>']
    try:
        user, assistant, end, open_think, close_think = map(enc.encode_single_token, names)
    except KeyError:
        raise ValueError(f'the tokenizer lacks one of the special tokens {" ".join(names)}') from None
    sample = []
    for i in range(0, len(messages), 2):
        prompt = [user, *enc.encode_ordinary(messages[i]['content']), end, assistant]
        reasoning, reply = [], []
        if i + 1 < len(messages):
            think, answer = split_think(messages[i + 1]['content'])
            if think is not None:
                reasoning = [open_think, *enc.encode_ordinary(think), close_think]
            reply = [*enc.encode_ordinary(answer), end]
        sample.append(Turn(prompt, reasoning, reply))
    return sample


def length(sample):
    """Return the number of tokens of a sample."""
    return sum(len(part) for turn in sample for part in turn)


def flatten(sample):
    """Return (tokens, scored) of a sample, two lists of one length. scored[i]: the assistant says token i, so the loss
    counts it."""
    tokens, scored = [], []
    for prompt, think, answer in sample:
        tokens += prompt + think + answer
        scored += [False] * len(prompt) + [True] * (len(think) + len(answer))
    return tokens, scored


def prompt_tokens(messages, enc):
    """Return the tokens to which a model adds the assistant's next turn, until it says <|end|>.

    messages: as in a conversation, but the user's is the last. Raise ValueError if they are not.
    """
    check_messages(messages, last='user')
    return flatten(render(messages, enc))[0]


# --- trimming ----------------------------------------------------------------------------------------------
# A rule takes a sample and a budget, a number of tokens, and returns (the trimmed sample or None, what was done).


def ap_trim(sample, budget):
    """Trim to `budget` tokens, preserving answers: keep every question and answer whole, and what reasoning fits.

    Return None as the sample only if questions and answers alone have more than `budget` tokens. A larger budget never
    gives a shorter result, nor one by a later rule. It may leave less of the last turn's reasoning in one case only:
    where it lets rule 2 do, which keeps the earlier turns' reasoning, instead of rule 3, which drops it.
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
    """Return the sample with the longest start of its last reasoning that fits; None if it does not even fit without.

    The tags stay around what is kept. If not one token of the reasoning fits between them, the tags are left out too:
    an empty block would teach the model to stop thinking at once, and might not fit.
    """
    think = sample[-1].think
    room = budget - (length(sample) - len(think))  # what all else leaves for reasoning and tags
    if room < 0:
        return None
    if room < len(think):
        think = think[:room - 1] + think[-1:] if room > 2 else []
    return sample[:-1] + [sample[-1]._replace(think=think)]


def truncate(sample, budget):
    """Keep the first `budget` tokens, whatever they are: a long sample loses its answer, and some of its reasoning."""
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
    """Keep the sample if it fits `budget` tokens, else nothing of it."""
    return (sample, 'kept') if length(sample) <= budget else (None, 'dropped')


RULES = {'ap': ap_trim, 'truncate': truncate, 'drop': drop}
OUTCOMES = 'kept', 'cut', 'earlier dropped', 'truncated', 'dropped'      # what the rules say that they did


def trim(samples, budget, rule='ap'):
    """Trim many samples (any iterable) to `budget` tokens by one rule.

    Return ([(tokens, scored)], Counter of what was done). tokens (int32) and scored (bool) are those of `flatten`, but
    as arrays, which take a tenth of the memory of lists.
    """
    flat, done = [], Counter()
    for sample in samples:
        trimmed, what = RULES[rule](sample, budget)
        done[what] += 1
        if trimmed is not None:
            tokens, scored = flatten(trimmed)
            flat.append((np.array(tokens, np.int32), np.array(scored, bool)))
    return flat, done


# --- packing -----------------------------------------------------------------------------------------------


def pack(lengths, capacity):
    """Pack by best-fit decreasing: return bins, each a list of indices into lengths, every index in exactly one bin.

    lengths: the number of tokens of each sample. The longest first (of equally long ones the first), each goes into the
    fullest bin that has room for it. Which of several bins with equally much space left makes no difference, so it is
    enough to keep a sorted list of the different spaces, at most `capacity` of them: to find one is a binary search,
    and a million samples pack in seconds.
    Raise ValueError for a sample that is empty or longer than capacity.
    """
    bins = []
    spaces = []                                    # ascending, each once: the spaces that the bins have left
    with_space = defaultdict(list)                 # space -> the bins that have exactly that left
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n = lengths[i]
        if not 1 <= n <= capacity:
            raise ValueError(f'sample {i} has {n} tokens, must be 1 to {capacity}: trim it first')
        at = bisect_left(spaces, n)                # the smallest space that is enough
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
    """Return (the share of all positions that no sample fills, the fewest bins that could do: ceil(sum / capacity)).

    lengths: the number of tokens of each sample; bins: what `pack` returned.
    """
    total = sum(lengths)
    return 1 - total / (len(bins) * capacity), -(-total // capacity)


def write_packed(splits, out, capacity, enc):
    """Write a packed set into the folder out, with its tokenizer enc; meta.json comes last, as in prepare.py.

    splits: {"train": [(tokens, scored), ...], "val": [...], ...}, samples as `flatten` gives them. For each split:

        train.bin    windows * capacity tokens; the rest of a window, behind its samples, is filled with token 0
        train.flags  a byte for each of these positions. Bit 0, SCORED: the next token is this position's target.
                     Bit 1, STARTS: a document starts here (the filling counts as one). A document is predicted from
                     nothing but itself, so its first token is no position's target.
        meta.json    vocab_size, "tokenizer" (its digest), dtype, "packed": capacity, and for each split "tokens" (those
                     of its samples, filling not counted), "documents", "windows" and "padding", the share of positions
                     filled

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
    (out / 'meta.json').unlink(missing_ok=True)    # from here on, the folder is unfinished
    save_tokenizer(out / 'bpe.json', enc)
    dtype = token_dtype(enc.n_vocab)
    meta = {'vocab_size': enc.n_vocab, 'tokenizer': digest(enc), 'dtype': dtype.name, 'packed': capacity}
    for split, bins in packed.items():
        samples, n_scored = splits[split], 0
        for suffix in ('bin', 'flags'):            # not overwritten: a run may have them mapped into memory
            (out / f'{split}.{suffix}').unlink(missing_ok=True)
        with open(out / f'{split}.bin', 'wb') as bin_file, open(out / f'{split}.flags', 'wb') as flags_file:
            for members in bins:
                window, flags = np.zeros(capacity, dtype), np.zeros(capacity, np.uint8)
                at = 0
                for tokens, scored in (samples[i] for i in members):
                    end = at + len(tokens)
                    window[at:end] = tokens
                    flags[at:end - 1] = np.asarray(scored[1:], bool) * SCORED
                    flags[at] |= STARTS
                    at = end
                if at < capacity:
                    flags[at] = STARTS
                n_scored += np.count_nonzero(flags & SCORED)
                bin_file.write(window.tobytes())
                flags_file.write(flags.tobytes())
        lengths = [len(tokens) for tokens, _ in samples]
        fraction, fewest = padding(lengths, bins, capacity)
        meta[split] = {'tokens': sum(lengths), 'documents': len(samples), 'windows': len(bins),
                       'padding': round(fraction, 6)}
        print(f'{split}.bin: {len(samples):,} documents, {sum(lengths):,} tokens ({n_scored:,} scored), '
              f'{len(bins):,} windows of {capacity:,} (at least {fewest:,}), {fraction:.2%} padding')
    write_meta(out, meta)
