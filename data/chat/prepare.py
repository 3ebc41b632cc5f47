"""A packed set from your own conversations: JSONL, with or without reasoning, in the format of data/reasoning.py.

    python data/chat/prepare.py FILE.jsonl... [--out=DIR] [--context=N] [--rule=ap|truncate|drop]
                                [--vocab_size=N] [--tokenizer_from=FOLDER]

Samples are trimmed to the context by the rule and packed into windows of that size. For a longer context later,
prepare again with a larger --context and the first folder as --tokenizer_from; the same option lets this set share its
vocabulary with another, so that one model learns from both. About 5% of the conversations are val, by a hash of the
first question: all conversations about one problem are on the same side.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
import configurator
from data.prepare import split_documents
from data.reasoning import OUTCOMES, RULES, read_conversations, render, split_think, trim, write_packed
from data.tokenizer import load_tokenizer, train_bpe


def prepare_chat(paths, out, context, rule, vocab_size, tokenizer_from=None):
    """Reads, renders, trims, packs, writes. Raises ValueError for bad lines and too few conversations."""
    conversations = [messages for path in paths for messages in read_conversations(path)]
    if len(conversations) < 2:
        raise ValueError('there is a single conversation: too few to split into train and val')
    if context < 1:
        raise ValueError(f'--context is {context}, must be at least 1')

    # Named by the question, which is what is hashed; as data the index, for a document's data must not be empty.
    documents = [(messages[0]['content'], str(i)) for i, messages in enumerate(conversations)]
    splits = {split: [conversations[int(i)] for _, i in docs] for split, docs in split_documents(documents).items()}
    if tokenizer_from is not None:
        enc = load_tokenizer(Path(tokenizer_from) / 'bpe.json')
    else:
        enc = train_bpe(texts(splits['train']), vocab_size)
    print(f'bpe.json: {enc.n_vocab:,} tokens')

    packed = {}
    for split, conversations in splits.items():
        replies = [message['content'] for messages in conversations for message in messages[1::2]]
        n_think = sum(split_think(content)[0] is not None for content in replies)
        print(f'{split}: {len(conversations):,} conversations, {len(replies):,} replies, {n_think:,} with reasoning')
        packed[split], done = trim((render(messages, enc) for messages in conversations), context, rule)
        print(f'{split}, {rule} to {context:,} tokens:',
              ', '.join(f'{done[what]:,} {what}' for what in OUTCOMES if done[what]))
    write_packed(packed, out, context, enc)


def texts(conversations):
    """All that is said in them, which becomes ordinary tokens; the tags of think blocks do not."""
    for messages in conversations:
        for message in messages:
            parts = split_think(message['content']) if message['role'] == 'assistant' else [message['content']]
            yield from filter(None, parts)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Writes a packed set of your own conversations.')
    parser.add_argument('files', nargs='+', metavar='FILE.jsonl')
    parser.add_argument('--out', default=Path(__file__).parent, help='folder to write (default: data/chat)')
    parser.add_argument('--context', type=int, default=256, help='tokens in a window (default: 256)')
    parser.add_argument('--rule', choices=RULES, default='ap', help='what is done to longer samples (default: ap)')
    parser.add_argument('--vocab_size', type=int, default=4096, help='size of the vocabulary (default: 4096)')
    parser.add_argument('--tokenizer_from', metavar='FOLDER',
                        help='take the tokenizer of this prepared folder; --vocab_size is ignored then')
    args = parser.parse_args()
    with configurator.one_line_errors('prepare.py: error'):
        prepare_chat(args.files, args.out, args.context, args.rule, args.vocab_size, args.tokenizer_from)

# Recorded output (CPython 3.11.7, one busy core of a server; 1 s in all) for 2000 conversations about sums, of one
# or two turns, that add digit by digit in a think block. The file is what this program prints:
#
# import json, random
# random.seed(0)
# for _ in range(2000):
#     messages = []
#     for _ in range(random.randint(1, 2)):
#         a, b = (random.randrange(10 ** random.randint(1, 12)) for _ in 'ab')
#         steps, carry = [], 0
#         for i in range(max(len(str(a)), len(str(b)))):
#             x, y = a // 10 ** i % 10, b // 10 ** i % 10
#             steps.append(f'{x} + {y} + {carry} = {x + y + carry}')
#             carry = (x + y + carry) // 10
#         messages += [{'role': 'user', 'content': f'{a} + {b}?'},
#                      {'role': 'assistant', 'content': '<think>' + '\n'.join(steps) + f'</think>{a + b}'}]
#     print(json.dumps({'messages': messages}))
#
# $ python data/chat/prepare.py sums.jsonl --context=128 --vocab_size=400 --rule=ap
# bpe.json: 400 tokens
# train: 1,897 conversations, 2,866 replies, 2,866 with reasoning
# train, ap to 128 tokens: 562 kept, 734 cut, 601 earlier dropped
# val: 103 conversations, 151 replies, 151 with reasoning
# val, ap to 128 tokens: 28 kept, 40 cut, 35 earlier dropped
# train.bin: 1,897 documents, 216,431 tokens (175,231 scored), 1,801 windows of 128 (at least 1,691), 6.12% padding
# val.bin: 103 documents, 11,946 tokens (9,732 scored), 99 windows of 128 (at least 94), 5.73% padding
# $ python data/chat/prepare.py sums.jsonl --context=128 --vocab_size=400 --rule=truncate   (train only)
# train, truncate to 128 tokens: 562 kept, 1,335 truncated
# train.bin: 1,897 documents, 222,144 tokens (188,145 scored), 1,817 windows of 128 (at least 1,736), 4.49% padding
# $ python data/chat/prepare.py sums.jsonl --context=128 --vocab_size=400 --rule=drop   (train only)
# train, drop to 128 tokens: 562 kept, 1,335 dropped
# train.bin: 562 documents, 51,264 tokens (44,083 scored), 482 windows of 128 (at least 401), 16.91% padding
