"""Write a packed dataset from your own conversations, with or without reasoning: files in the formats of
data/conversations.py, written as data/reasoning.py says. From the project's root:

    python -m data.chat.prepare FILE.jsonl... [--out=DIR] [--context=N] [--rule=ap|truncate|drop]
                                [--vocab_size=N] [--tokenizer_from=FOLDER] [--skip_bad=True]

Samples, one per reply, are trimmed to the context by the rule and packed into windows of that size. To train with a
longer context later, prepare again with a larger --context and the first folder as --tokenizer_from. The same flag
gives two datasets one vocabulary, so that a model can train on both. About 5% of the conversations are val, chosen by
a hash of the first question: conversations with the same first question are in the same split.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import configurator
from data.conversations import read_conversations, warn_of_unread_tags
from data.language import language_of
from data.prepare import split_documents
from data.reasoning import RULES, render, trim_and_report, write_packed
from data.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_bpe


@dataclass
class ChatConfig:
    out: str = str(Path(__file__).parent)          # folder to write: data/chat
    context: int = 256                             # tokens per window
    rule: str = 'ap'                               # how longer samples are shortened: 'ap', 'truncate' or 'drop'
    vocab_size: int = 4096                         # tokens of the vocabulary that is trained
    tokenizer_from: str = ''                       # a prepared folder whose tokenizer is used; '': train one
    skip_bad: bool = False                         # leave out rows that are not a conversation, and name them

    def __post_init__(self):
        configurator.check_ranges(self, context=(1, 10**7), rule=tuple(RULES))


def prepare_chat(paths, config):
    """Read the files in paths; tokenize, trim, pack and write their conversations as the ChatConfig says.

    Raise ValueError for no paths, bad rows and too few conversations.
    """
    if not paths:
        raise ValueError('name the files of conversations to read: python -m data.chat.prepare FILE.jsonl...')
    conversations = read_conversations(paths, config.skip_bad)
    if len(conversations) < 2:
        raise ValueError(f'there are {len(conversations)} conversations: too few to split into train and val')
    warn_of_unread_tags(conversations)

    # For split_documents: the name, which is hashed, is the first question; the data is the index.
    question = lambda messages: next(message['content'] for message in messages if message['role'] == 'user')
    documents = [(question(messages), str(i)) for i, messages in enumerate(conversations)]
    splits = {split: [conversations[int(i)] for _, i in docs] for split, docs in split_documents(documents).items()}
    if config.tokenizer_from:
        enc = load_tokenizer(Path(config.tokenizer_from) / 'bpe.json')
        if missing := [name for name in SPECIAL_TOKENS if name not in enc.special_tokens_set]:
            raise ValueError(f'{config.tokenizer_from}: the tokenizer lacks the special tokens {" ".join(missing)}')
    else:
        enc = train_bpe(texts(splits['train']), config.vocab_size)
    print(f'bpe.json: {enc.n_vocab:,} tokens')

    packed, language = {}, language_of(enc, config.out)
    for split, conversations in splits.items():
        replies = [message for messages in conversations for message in messages if message['role'] == 'assistant']
        n_think = sum(message['reasoning'] is not None for message in replies)
        print(f'{split}: {len(conversations):,} conversations, {len(replies):,} replies, {n_think:,} with reasoning')
        samples = (sample for messages in conversations for sample in render(messages, language))
        packed[split] = trim_and_report(split, samples, config.context, config.rule)
    write_packed(packed, config.out, config.context, enc)


def texts(conversations):
    """Yield every text that becomes ordinary tokens: contents and reasoning."""
    for messages in conversations:
        for message in messages:
            yield from filter(None, (message.get('reasoning'), message['content']))


if __name__ == '__main__':
    with configurator.one_line_errors('data.chat.prepare'):
        prepare_chat(*configurator.read_with_files(sys.argv[1:], ChatConfig))

# Measured with `python -m data.chat.prepare sums.jsonl --context=128 --vocab_size=400 --rule=RULE` (1 s)
# on 2000 conversations about sums, of one or two turns, with digit-by-digit addition as reasoning. The train split:
#
# rule       samples                        tokens, scored     windows of 128, padding
# ap         1,423 kept, 1,443 cut          314,280, 252,696   2,657, 7.59%
# truncate   1,423 kept, 1,443 truncated    314,280, 252,696   2,657, 7.59%
# drop       1,423 kept, 1,443 dropped      129,576, 104,821   1,214, 16.61%
#
# This script prints sums.jsonl:
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
