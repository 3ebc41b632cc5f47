"""Byte-level byte pair encoding (BPE): text to integers and back.

A token is a number that stands for a few bytes. A vocabulary starts as the 256 single bytes, so any data at all can
be written in it. Training then repeats one step: find the pair of neighbouring tokens that occurs most often, and make
it one new token. Common words end up as one token, rare ones as a few (Sennrich et al. 2016; on bytes: GPT-2, 2019).

Training is here, in plain Python; encoding is left to `tiktoken`, which replays the merges much faster.
"""

import base64
import hashlib
import heapq
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise

import regex
import tiktoken

from validate import read_json, reading

# Text is first cut into pieces, and no token crosses a cut: otherwise ` the,`, ` the.` and so on would each become a
# token of their own. At each position the first alternative that matches is taken. None looks ahead or backtracks, so
# that the time tiktoken takes to cut grows only linearly with the text, whatever it holds.
PATTERN = (
    r'[^\r\n\p{L}\p{N}]?\p{L}+|'                   # a word and the one sign before it: ` if`, `.append`
    r'\p{N}{1,3}|'                                 # digits in threes: long numbers share their tokens
    r' ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|'       # punctuation; at the end of a line the newline and the
                                                   # next line's indentation too: `):\n    ` is one token
    r'\s*[\r\n][ \t]*|'                            # blank lines, then the indentation that follows
    r'\s+'                                         # spaces and tabs inside a line
)

# Tokens that no text contains: `encode_ordinary` spells these strings out in ordinary tokens, so a document cannot
# forge one. Their numbers follow those of the ordinary tokens; enc.encode_single_token("<|user|>") returns one.
SPECIAL_TOKENS = [
    '<|endoftext|>',                               # ends each document of the training files
    '<|user|>',                                    # a user's turn begins
    '<|assistant|>',                               # the model's turn begins
    '<|end|>',                                     # a turn ends
    '<think>',                                     # reasoning begins; the answer comes after
    '</think>',                                    # reasoning ends
]

PROBE = ''.join(f'{chr(c)}a {chr(c)}{chr(c)}b1\n' for c in [*range(128), 0xe9, 0x6f22, 0x300, 0x1f642])
MAX_PIECE = 64    # bytes; longer pieces (base64, DNA) are cut for training, because a merge rewrites whole pieces


def train_bpe(texts, vocab_size):
    """Learn a vocabulary of vocab_size tokens: 256 bytes, then merges, then SPECIAL_TOKENS.

    texts: iterable of str. Return a tiktoken.Encoding; it has fewer tokens than vocab_size, and a line printed says so,
    if no pair in the texts repeats any more. The same texts always give the same vocabulary.
    Raise ValueError if vocab_size has no room for the bytes and the special tokens.

    Counting all pairs anew for each merge would take time in proportion to corpus x merges. Three things make it fast:
      - equal pieces are stored once, with their count: 10 MB of source has only some 70,000 different pieces;
      - a merge touches only the pieces that contain its pair (`where`), and only their pairs are recounted;
      - the commonest pair is taken from a heap. When a count changes, its old entry stays in the heap, and is
        recognised as old when it comes out on top ("lazy deletion").
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f'vocab_size is {vocab_size}, but the bytes and special tokens need {smallest}')

    pieces = Counter()
    for text in texts:
        pieces.update(regex.findall(PATTERN, text))
    words, counts = [], []                         # a piece as a list of tokens; how often it occurs
    for piece, count in pieces.items():
        piece = piece.encode('utf-8')
        for i in range(0, len(piece), MAX_PIECE):
            words.append(list(piece[i:i + MAX_PIECE]))
            counts.append(count)

    pair_counts = Counter()                        # (left, right) -> occurrences in the corpus
    where = defaultdict(set)                       # (left, right) -> the words it occurs in, or once did
    for w, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[w]
            where[pair].add(w)
    # Smallest entry first: the highest count, and among equal counts the pair with the smallest tokens.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    tokens = [bytes([b]) for b in range(256)]      # tokens[i]: the bytes that token i stands for
    while len(tokens) < vocab_size - len(SPECIAL_TOKENS) and heap:
        negative_count, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count < 2:                              # a pair seen once is no pattern
            continue
        if count != -negative_count:               # an old entry: the count has fallen since then
            heapq.heappush(heap, (-count, pair))
            continue
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        fresh = set()                              # pairs that contain the new token
        for w in where.pop(pair):
            merged = merge(words[w], pair, new)
            for old in pairwise(words[w]):
                pair_counts[old] -= counts[w]
            for now in pairwise(merged):
                pair_counts[now] += counts[w]
                if new in now:
                    where[now].add(w)
                    fresh.add(now)
            words[w] = merged
        for now in fresh:
            heapq.heappush(heap, (-pair_counts[now], now))

    enc = make_encoding(PATTERN, tokens, SPECIAL_TOKENS)
    if enc.n_vocab < vocab_size:
        print(f'no pair repeats any more: the vocabulary has {enc.n_vocab} tokens, not {vocab_size}')
    return enc


def merge(word, pair, new):
    """Return the list of tokens `word` with each pair, from left to right, replaced by the token new."""
    merged, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def make_encoding(pattern, tokens, special_tokens):
    """Return a tiktoken.Encoding.

    pattern: the regular expression that cuts text; tokens: their bytes, in the order in which they were learned;
    special_tokens: names, numbered after the tokens. tiktoken keeps no list of merges: it joins the neighbours whose
    joint bytes come first in `tokens`. That is the same thing, because in BPE no two pairs ever make the same bytes.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
    return tiktoken.Encoding('bpe', pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def gpt2_encoding():
    """Return GPT-2's vocabulary (downloaded by tiktoken, then cached) with our special tokens after its 50257 tokens.

    `<|endoftext|>` stays GPT-2's own, 50256. Raise ValueError if the download fails.
    """
    try:
        gpt2 = tiktoken.get_encoding('gpt2')
    except (OSError, ValueError) as error:
        raise ValueError(f'cannot download the gpt2 vocabulary ({type(error).__name__}): '
                         'connect once, or use the default --tokenizer=bpe') from None
    special = {'<|endoftext|>': gpt2.eot_token}
    special |= {name: gpt2.n_vocab + i for i, name in enumerate(SPECIAL_TOKENS[1:])}
    return tiktoken.Encoding('gpt2', pat_str=gpt2._pat_str, mergeable_ranks=gpt2._mergeable_ranks,
                             special_tokens=special)


def encode_bytes(enc, data):
    """Return the tokens, a list of int, of any bytes: enc.decode_bytes(encode_bytes(enc, data)) == data.

    tiktoken encodes str only, and not all bytes are valid UTF-8. "surrogateescape" decodes an invalid byte to a code
    point that no valid text contains; the text is cut there, and that byte becomes a token by itself.
    """
    parts = re.split('([\udc80-\udcff])', data.decode('utf-8', 'surrogateescape'))
    tokens = enc.encode_ordinary(parts[0])
    for invalid, text in zip(parts[1::2], parts[2::2]):
        tokens.append(enc.encode_single_token(invalid.encode('utf-8', 'surrogateescape')))
        tokens.extend(enc.encode_ordinary(text))
    return tokens


def content_of(enc):
    """Return what the file of an encoding of train_bpe, make_encoding or gpt2_encoding holds, as a dict."""
    if enc.name == 'gpt2':
        return {'encoding': 'gpt2'}
    n_ordinary = enc.n_vocab - len(enc.special_tokens_set)
    return {'pattern': enc._pat_str,
            'tokens': [base64.b64encode(enc.decode_single_token_bytes(i)).decode('ascii') for i in range(n_ordinary)],
            'special_tokens': sorted(enc.special_tokens_set, key=enc.encode_single_token)}


def digest(enc):
    """Return 16 characters that are the same for equal encodings only: what is made with one, and later read with
    another, would be wrong without a sign of it."""
    return hashlib.sha256(json.dumps(content_of(enc)).encode('ascii')).hexdigest()[:16]


def save_tokenizer(path, enc):
    """Write an encoding as JSON; load_tokenizer reads it."""
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(content_of(enc), file, indent=0)


def load_tokenizer(path):
    """Return the encoding in a file of save_tokenizer. Raise ValueError if the file is missing or damaged."""
    content = read_json(path, ({'pattern': str, 'tokens': [str], 'special_tokens': [str]}, {'encoding': 'gpt2'}))
    if 'encoding' in content:
        return gpt2_encoding()
    try:
        tokens = [base64.b64decode(token, validate=True) for token in content['tokens']]
        special = content['special_tokens']
        if len(set(tokens)) < len(tokens) or not {bytes([b]) for b in range(256)} <= set(tokens) or b'' in tokens:
            raise ValueError('the tokens are not 256 bytes and different merges')
        if len(set(special)) < len(special) or '' in special or SPECIAL_TOKENS[0] not in special:
            raise ValueError(f'the special tokens are not different names, {SPECIAL_TOKENS[0]} among them')
        # tiktoken panics at a pattern that matches nothing, and leaves out of a text what no piece covers.
        pieces = regex.findall(content['pattern'], PROBE, timeout=1)
        if '' in pieces or ''.join(pieces) != PROBE:
            raise ValueError('the pattern does not cut a text into pieces that make it up')
        with reading(path):
            return make_encoding(content['pattern'], tokens, special)
    except (ValueError, TypeError, TimeoutError, regex.error) as error:
        raise ValueError(f'{path} is damaged ({error}): write it with the prepare.py of its folder (data/README.md has '
                         "them); a run folder has its data's") from None
