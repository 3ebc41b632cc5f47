"""The tokenizer of a run as the files of a released folder, which sample.py and `transformers` read."""
import json
import os

from configurator import package
from data.language import RUN_TEMPLATE, language_of
from data.tokenizer import load_tokenizer


def write_tokenizer(run, folder):
    """Write tokenizer.json, tokenizer_config.json and generation_config.json for the tokenizer of a run. Return the
    keys of config.json that name its special tokens."""
    enc = load_tokenizer(os.path.join(run, 'bpe.json'))
    tokenizer_of(enc).save(os.path.join(folder, 'tokenizer.json'))
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
                'eos_token': '<|endoftext|>', 'pad_token': '<|endoftext|>'}
    if '<|user|>' in enc.special_tokens_set:
        settings['chat_template'] = RUN_TEMPLATE
    tokens = {'bos_token_id': None, 'pad_token_id': None, 'eos_token_id': language_of(enc, run).stop}
    for name, content in {'tokenizer_config.json': settings,
                          'generation_config.json': tokens | {'pad_token_id': enc.eot_token}}.items():
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
            json.dump(content, file, indent=2)
    return tokens


def tokenizer_of(enc):
    """Return the tokenizers.Tokenizer that encodes like a tiktoken.Encoding.

    tiktoken merges the adjacent pair whose concatenation has the lowest rank; `tokenizers` needs the pairs. The pair of
    a token is what remains of its bytes after all merges of lower rank.
    """
    tokenizers = package('tokenizers')
    letters = byte_letters()
    text = lambda token: ''.join(letters[byte] for byte in token)
    ranks, merges = enc._mergeable_ranks, []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            if min(pairs) >= rank:
                break
            i = pairs.index(min(pairs))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(map(text, parts)))
    vocab = {text(token): rank for token, rank in ranks.items()} | enc._special_tokens
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    pieces, names = tokenizers.pre_tokenizers, sorted(enc._special_tokens, key=enc._special_tokens.get)
    tokenizer.pre_tokenizer = pieces.Sequence([pieces.Split(tokenizers.Regex(enc._pat_str), 'isolated'),
                                               pieces.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in names])
    return tokenizer


def byte_letters():
    """Return the 256 characters that stand for bytes in tokenizer.json: printable Latin-1 characters for themselves,
    the others from U+0100 on."""
    printable = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
