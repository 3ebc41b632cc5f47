"""Conversations from files: JSONL, or one JSON array, in the formats of public datasets. A row is one of

    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}, ...]}        OpenAI
    {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}, ...]}            ShareGPT
    {"instruction": q, "input": more of q, "output": a}                                             Alpaca

with the system message first, or as "system" of the row; other keys are ignored. The reasoning of a reply is its
"reasoning_content", "reasoning" or "thinking", or it starts the content, in one of these forms:

    <think>t</think>a      <thinking>t</thinking>a      t</think>a, since many prompts end in <think>
    <|begin_of_thought|>t<|end_of_thought|><|begin_of_solution|>a<|end_of_solution|>
"""

import io
import re
import sys
from collections import Counter
from pathlib import Path

from validate import check, parse_json, reading, to_utf8

TAGS = {'<think>': '</think>', '<thinking>': '</thinking>', '<|begin_of_thought|>': '<|end_of_thought|>'}
# What may be reasoning in a form that is not read.
UNREAD = re.compile(r'[<\[◁]/?\|?[\w:]*(?:think|thought|reason|reflect|scratchpad|of_solution)\w*\|?[>\]▷]|'
                    r'<\|channel\|>', re.IGNORECASE)
ROLES = {'human': 'user', 'gpt': 'assistant', 'chatgpt': 'assistant', 'model': 'assistant', 'developer': 'system'}
TOOL_ROLE = re.compile('tool|function|observation|ipython')
TEXT = (str, None)
FIELDS = 'reasoning_content', 'reasoning', 'thinking'
REASONING = {f'{name}?': TEXT for name in FIELDS}
N_NAMED = 20    # skipped rows that are named one by one


def read_conversations(paths, skip_bad=False):
    """Return the conversations of the files in paths, each a list of messages as `messages_of` returns them.

    skip_bad: leave out rows that are not a conversation, and name them on standard error. Raise ValueError that names
    the first of them otherwise, and for a file without conversations.
    """
    conversations, bad, n_rows = [], [], 0
    for path in paths:
        before = n_rows
        for where, row in rows_of(path):
            n_rows += 1
            try:
                row = parse_json(row, where) if isinstance(row, bytes) else row
                conversations.append(messages_of(row, where))
            except ValueError as error:
                bad.append(f'{error}')
        if n_rows == before:
            raise ValueError(f'{path} holds no conversation')
    if bad and not skip_bad:
        raise ValueError(f'{bad[0]} ({len(bad):,} of {n_rows:,} conversations cannot be read; '
                         '--skip_bad=True leaves them out)')
    for error in bad[:N_NAMED]:
        print(f'skipped {error}', file=sys.stderr)
    if bad:
        print(f'skipped {len(bad):,} of {n_rows:,} conversations'
              f'{f", of which the first {N_NAMED} are named" if len(bad) > N_NAMED else ""}', file=sys.stderr)
    return conversations


def rows_of(path):
    """Yield (where, row) of each row of a file: the bytes of a line, or an element of the JSON array."""
    with reading(path):
        data = to_utf8(Path(path).read_bytes())
    if data.lstrip().startswith(b'['):
        for number, row in enumerate(parse_json(data, path, [object]), 1):
            yield f'{path}, entry {number}', row
    else:
        for number, line in enumerate(io.BytesIO(data), 1):     # bytes: in JSONL only \n ends a line
            if line.strip():
                yield f'{path}, line {number}', line


def messages_of(row, where):
    """Return the messages of a row: [{'role', 'content'}, ...], of the assistant also 'reasoning', a text or None.

    An optional system message comes first, then user and assistant alternate, from user to assistant, and no content
    is empty. Raise ValueError that names `where` otherwise.
    """
    check(row, {'system?': TEXT}, where)
    if key := next((key for key in ('messages', 'conversations') if key in row), None):
        check(row, {key: [{str: object}]}, where)
        messages = row[key]
    elif 'instruction' in row:
        check(row, {'instruction': str, 'input?': TEXT, 'output': str}, where)
        question = '\n\n'.join(filter(None, [row['instruction'], row.get('input')]))
        messages = [{'role': 'user', 'content': question}, row | {'role': 'assistant', 'content': row['output']}]
    else:
        raise ValueError(f"{where}: has none of 'messages', 'conversations' and 'instruction'")
    try:
        messages = [message_of(message, i) for i, message in enumerate(messages, 1)]
        if row.get('system'):
            messages.insert(0, {'role': 'system', 'content': row['system']})
        check_order(messages)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
    return messages


def message_of(message, number):
    """Return message `number` of a conversation in the form of `messages_of`. Raise ValueError if it has another."""
    role_key, content_key = ('from', 'value') if 'from' in message and 'role' not in message else ('role', 'content')
    where = f'message {number}'
    check(message, {role_key: str}, where)
    role, content = ROLES.get(message[role_key], message[role_key]), message.get(content_key)
    if TOOL_ROLE.match(role) or message.get('tool_calls') or message.get('function_call'):
        raise ValueError(f'{where} is a tool turn of the {role}: conversations with tools are not supported')
    if role not in ('system', 'user', 'assistant'):
        raise ValueError(f"{where} has the role {role!r:.40}, must be 'system', 'user' or 'assistant'")
    check(message, {content_key: str} | REASONING, where)
    if not content.strip():
        raise ValueError(f'{where} has no content')
    if role != 'assistant':
        return {'role': role, 'content': content}
    think, answer = split_think(content)
    if answer is None:
        raise ValueError(f'{where} opens its reasoning, but never closes it')
    if not answer.strip():
        raise ValueError(f'{where} has no answer after its reasoning')
    found = [text for text in (*map(message.get, FIELDS), think) if text and text.strip()]
    if len({text.strip() for text in found}) > 1:
        raise ValueError(f'{where} has two different texts as reasoning')
    return {'role': role, 'content': answer, 'reasoning': found[0] if found else None}


def check_order(messages):
    """Raise ValueError unless user and assistant alternate after an optional system message, from user to assistant."""
    first = messages[:1] and messages[0]['role'] == 'system'
    roles = [message['role'] for message in messages[bool(first):]]
    if not roles:
        raise ValueError('a conversation needs at least one message of the user and one of the assistant')
    for i, role in enumerate(roles):
        if role != ('user', 'assistant')[i % 2]:
            raise ValueError(f'message {i + 1 + bool(first)} is of the {role}: user and assistant must take turns, '
                             'user first')
    if role == 'user':
        raise ValueError('the last message is of the user, must be of the assistant')


def split_think(content):
    """Return (reasoning or None, answer) of a reply; the answer is None if the reasoning is not closed.

    A block of TAGS is at the start, after optional white space, and ends at its first closing tag. Without an opening
    tag, the reasoning is the text before the closing tag. Elsewhere tags are plain text. White space is kept.
    """
    block = content.lstrip()
    for opening, closing in TAGS.items():
        if block.startswith(opening):
            think, closed, answer = block.removeprefix(opening).partition(closing)
            return think, split_solution(answer) if closed else None
    for opening, closing in TAGS.items():
        think, closed, answer = content.partition(closing)
        if closed and opening not in think:
            return think, split_solution(answer)
    return None, content


def split_solution(answer):
    """Return an answer without <|begin_of_solution|> and <|end_of_solution|> around it."""
    text = answer.strip()
    if not text.startswith('<|begin_of_solution|>'):
        return answer
    return text.removeprefix('<|begin_of_solution|>').removesuffix('<|end_of_solution|>').strip()


def warn_of_unread_tags(conversations):
    """Print how many replies have a tag that looks like one of reasoning, but was not read as such."""
    replies = [message for messages in conversations for message in messages if message['role'] == 'assistant']
    found = [{tag.replace('/', '') for tag in UNREAD.findall(reply['content'])} for reply in replies]
    counts = Counter(tag for tags in found for tag in tags)
    if counts:
        print(f'warning: {sum(map(bool, found)):,} of {len(replies):,} replies have tags that were not understood as '
              f'reasoning and stay plain text: '
              f'{", ".join(f"{tag} in {n:,}" for tag, n in counts.most_common(5))}', file=sys.stderr)
