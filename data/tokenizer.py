"""Byte-level byte pair encoding (BPE): text to integers and back.

A token is an integer that stands for a few bytes. The vocabulary starts as the 256 single bytes, so it can encode any
data. Training repeats one step: find the most frequent pair of adjacent tokens, and add it to the vocabulary as a new
token. Common words end up as one token, rare words as a few (Sennrich et al. 2016; on bytes: GPT-2, 2019).

Training is implemented here, in plain Python; `tiktoken` applies the merges when encoding, which is much faster.
"""

import base64
import hashlib
import heapq
import json
import re
import zlib
from collections import Counter, defaultdict
from itertools import pairwise

import regex
import tiktoken

from validate import read_json, reading

# Pre-tokenization: text is first split into pieces, and no token crosses a boundary; otherwise ` the,`, ` the.` and so
# on would each become a token. At each position the first alternative that matches is taken. None looks ahead or
# backtracks, so splitting takes linear time for any text.
PATTERN = (
    r'[^\r\n\p{L}\p{N}]?\p{L}+|'                   # a word and one character before it: ` if`, `.append`
    r'\p{N}{1,3}|'                                 # digits in groups of three
    r' ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|'       # punctuation; at the end of a line with the newline and
                                                   # the next line's indentation: `):\n    ` is one token
    r'\s*[\r\n][ \t]*|'                            # blank lines, then the indentation that follows
    r'\s+'                                         # spaces and tabs inside a line
)

# `encode_ordinary` encodes these strings as ordinary tokens, so a document cannot contain a special token. Their IDs
# follow those of the ordinary tokens; enc.encode_single_token("<|user|>") returns one.
SPECIAL_TOKENS = [
    '<|endoftext|>',                               # ends each document of the training files
    '<|user|>',                                    # starts a user turn
    '<|assistant|>',                               # starts the model's turn
    '<|end|>',                                     # ends a turn
    '<think>',                                     # starts the reasoning, which precedes the answer
    '</think>',                                    # ends the reasoning
]

# Text that a pattern must cut into pieces without loss: ASCII, an accent, Chinese, a combining mark, an emoji.
PROBE = ''.join(f'{chr(c)}a {chr(c)}{chr(c)}b1\n' for c in [*range(128), 0xe9, 0x6f22, 0x300, 0x1f642])
MAX_PIECE = 64           # bytes; longer pieces (base64, DNA) are split for training: a merge rewrites whole pieces
# Bytes of different pieces that training uses, and the length that pieces are split at if there are more. 10 MB of
# source code has 0.6 MB of different pieces, but 10 MB of a language without spaces has up to 10 MB.
MAX_DISTINCT, SHORT_PIECE = 600_000, 24


def train_bpe(texts, vocab_size):
    """Train a vocabulary of vocab_size tokens: 256 bytes, then merges, then SPECIAL_TOKENS. Return a tiktoken.Encoding.

    texts: iterable of str. If no pair of tokens occurs twice any more, the vocabulary is smaller, and a line printed
    says so. Training is deterministic. Raise ValueError if vocab_size is too small for the bytes and special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f'vocab_size is {vocab_size}, but the bytes and special tokens need {smallest}')
    pieces = Counter()
    for text in texts:
        pieces.update(regex.findall(PATTERN, text))
    enc = make_encoding(PATTERN, learn_merges(pieces, vocab_size - len(SPECIAL_TOKENS)), SPECIAL_TOKENS)
    if enc.n_vocab < vocab_size:
        print(f'no pair repeats any more: the vocabulary has {enc.n_vocab} tokens, not {vocab_size}')
    return enc


def learn_merges(pieces, n_tokens):
    """Return at most n_tokens tokens as bytes: the 256 single bytes, then the merged pairs, most frequent first.

    pieces: Counter of str. Recounting all pairs after each merge would take time proportional to corpus x merges.
    Instead
      - equal pieces are stored once, with their count: 10 MB of source code has only about 70,000 different pieces;
      - if the different pieces exceed MAX_DISTINCT bytes, training uses the most frequent ones;
      - a merge updates only the pieces that contain its pair (`where`), and recounts only their pairs;
      - a heap gives the most frequent pair, with lazy deletion: when a count changes, the outdated entry stays in the
        heap and is discarded when it is popped.
    """
    words, counts = [], []                         # a piece as a list of tokens; its number of occurrences
    for piece, count in most_frequent(pieces):
        words.append(list(piece))
        counts.append(count)
    pair_counts = Counter()                        # (left, right) -> occurrences in the corpus
    where = defaultdict(set)                       # (left, right) -> indices of the words that contain it or once did
    for w, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[w]
            where[pair].add(w)
    # Smallest entry first: the highest count, and among equal counts the pair with the smallest tokens.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < n_tokens and heap:
        negative_count, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count >= 2 and count != -negative_count:             # an outdated entry
            heapq.heappush(heap, (-count, pair))
        elif count >= 2:                                        # merge only pairs that occur more than once
            for new_pair in merge_everywhere(words, counts, pair, len(tokens), pair_counts, where):
                heapq.heappush(heap, (-pair_counts[new_pair], new_pair))
            tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return tokens


def most_frequent(pieces):
    """Return [(bytes, count), ...] of a Counter of str: all pieces, or MAX_DISTINCT bytes of the most frequent ones.

    A hash orders equally frequent pieces, so that those kept are a sample of them, independent of the order of texts.
    """
    parts = split_pieces(pieces, MAX_PIECE)
    if sum(map(len, parts)) <= MAX_DISTINCT:
        return list(parts.items())
    parts, kept, n_bytes = split_pieces(pieces, SHORT_PIECE), [], 0
    for part in sorted(parts, key=lambda part: (-parts[part], zlib.crc32(part), part)):
        n_bytes += len(part)
        if n_bytes > MAX_DISTINCT:
            break
        kept.append((part, parts[part]))
    return kept


def split_pieces(pieces, size):
    """Return a Counter of the pieces as bytes, longer ones cut into parts of `size` bytes."""
    parts = Counter()
    for piece, count in pieces.items():
        piece = piece.encode('utf-8')
        for i in range(0, len(piece), size):
            parts[piece[i:i + size]] += count
    return parts


def merge_everywhere(words, counts, pair, new, pair_counts, where):
    """Replace the pair by the token `new` in all words; update pair_counts and where. Return the pairs with `new`."""
    new_pairs = set()
    for w in where.pop(pair):
        merged = merge(words[w], pair, new)
        for old_pair in pairwise(words[w]):
            pair_counts[old_pair] -= counts[w]
        for new_pair in pairwise(merged):
            pair_counts[new_pair] += counts[w]
            if new in new_pair:
                where[new_pair].add(w)
                new_pairs.add(new_pair)
        words[w] = merged
    return new_pairs


def merge(word, pair, new):
    """Return the list of tokens `word` with each occurrence of the pair, from left to right, replaced by `new`."""
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

    pattern: the regular expression that splits text; tokens: their bytes, in the order learned; special_tokens: names,
    whose IDs follow. tiktoken has no list of merges: it merges the adjacent pair whose concatenated bytes come first in
    `tokens`. This is equivalent, since no two pairs that BPE merges have the same bytes.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
    return tiktoken.Encoding('bpe', pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def gpt2_encoding():
    """Return GPT-2's vocabulary (downloaded by tiktoken, then cached) with SPECIAL_TOKENS after its 50257 tokens.

    `<|endoftext|>` keeps GPT-2's ID, 50256. Raise ValueError if the download fails.
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
    """Return the tokens of any bytes, so that enc.decode_bytes(encode_bytes(enc, data)) == data.

    tiktoken encodes str only, and not all bytes are valid UTF-8. "surrogateescape" decodes an invalid byte to a code
    point that no valid text contains; the text is split there, and the byte becomes a single token.
    """
    parts = re.split('([\udc80-\udcff])', data.decode('utf-8', 'surrogateescape'))
    tokens = enc.encode_ordinary(parts[0])
    for invalid, text in zip(parts[1::2], parts[2::2]):
        tokens.append(enc.encode_single_token(invalid.encode('utf-8', 'surrogateescape')))
        tokens.extend(enc.encode_ordinary(text))
    return tokens


def content_of(enc):
    """Return the content of the encoding's file, a dict, for an encoding made by a function of this module."""
    if enc.name == 'gpt2':
        return {'encoding': 'gpt2'}
    n_ordinary = enc.n_vocab - len(enc.special_tokens_set)
    return {'pattern': enc._pat_str,
            'tokens': [base64.b64encode(enc.decode_single_token_bytes(i)).decode('ascii') for i in range(n_ordinary)],
            'special_tokens': sorted(enc.special_tokens_set, key=enc.encode_single_token)}


def digest(enc):
    """Return a hash of 16 characters. It is stored with tokens and models, to check that they use this encoding."""
    return hashlib.sha256(json.dumps(content_of(enc)).encode('ascii')).hexdigest()[:16]


def save_tokenizer(path, enc):
    """Write an encoding as JSON, for load_tokenizer."""
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(content_of(enc), file, indent=0)


def load_tokenizer(path):
    """Return the encoding in a file that save_tokenizer wrote. Raise ValueError if it is missing or damaged."""
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
        # tiktoken panics if the pattern matches the empty string, and drops text that it does not match.
        pieces = regex.findall(content['pattern'], PROBE, timeout=1)
        if '' in pieces or ''.join(pieces) != PROBE:
            raise ValueError('the pattern does not cut a text into pieces that make it up')
        with reading(path):
            return make_encoding(content['pattern'], tokens, special)
    except (ValueError, TypeError, TimeoutError, regex.error) as error:
        raise ValueError(f'{path} is damaged ({error}): write it with the prepare.py of its folder (data/README.md has '
                         "them); a run folder has its data's") from None
