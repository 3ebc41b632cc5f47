"""The OpenAI API as data: valid requests, and replies, in which the reasoning is apart from the answer.

A parameter that is not implemented and could change the result is refused by name.

A stop string may span tokens. Text that could be its start is therefore held back until the next tokens decide:

    stop 'END'     tokens  a |  E | N | x   ->  'a', '', '', 'ENx'
                           a |  E | ND..    ->  'a', '', '' and the reply is finished

The reasoning of a chat starts at <think>, if that is the prompt's last tag or the reply's first token, and ends at
</think>. Elsewhere these tags are text.
"""
import asyncio
from dataclasses import dataclass, field

from runtime.chat import Printer
from validate import check

COUNT = range(1, 2**31)
COMMON = {'model': str, 'stream': bool, 'stream_options': {'include_usage?': bool}, 'temperature': float,
          'top_p': float, 'top_k': int, 'min_p': float, 'seed': range(-2**63, 2**63), 'stop': (str, [str]),
          'n': range(1, 129), 'max_tokens': COUNT,
          # Without effect: labels, and parameters at the value that changes nothing.
          'user': str, 'metadata': {str: object}, 'store': bool, 'service_tier': str, 'safety_identifier': str,
          'prompt_cache_key': str, 'frequency_penalty': (0, 0.0), 'presence_penalty': (0, 0.0)}
MESSAGE = {'role': ('system', 'developer', 'user', 'assistant'), 'content': (str, [{'type': 'text', 'text': str}])}
CHAT = COMMON | {'messages': [MESSAGE], 'max_completion_tokens': COUNT, 'logprobs': bool, 'top_logprobs': range(21),
                 'chat_template_kwargs': {'enable_thinking?': bool}, 'response_format': {'type': 'text'}}
TEXT = COMMON | {'prompt': (str, [str], [int], [[int]]), 'logprobs': range(21), 'echo': False, 'best_of': 1}
UNREAD = 'reasoning_content', 'reasoning', 'refusal'            # of earlier turns


class Refused(ValueError):
    """An error of the API. param: the parameter at fault."""

    def __init__(self, message, param=None, status=400, code=None):
        super().__init__(message)
        kind = {401: 'authentication_error', 429: 'rate_limit_error'}.get(
            status, 'server_error' if status >= 500 else 'invalid_request_error')
        self.status, self.body = status, {'error': dict(message=message, type=kind, param=param, code=code)}


def validated(body, schema):
    """Return the parameters that are not null, `stop` as a list. Raise Refused, naming the parameter at fault."""
    body = {key: value for key, value in body.items() if value is not None}
    for key in [*(schema.keys() & {'model', 'messages', 'prompt'}), *body]:
        if key not in schema:
            raise Refused(f'{key} is not supported: leave it out', key, code='unknown_parameter')
        try:
            check(body, {key: schema[key]}, 'the request')
        except ValueError as error:
            raise Refused(str(error), key) from None
        objects, known = [], {'role', 'content', *UNREAD}
        if key == 'messages':
            objects = body[key]
        elif key in ('chat_template_kwargs', 'rsa'):
            objects, known = [body[key]], {name.removesuffix('?') for name in schema[key]}
        for name in {name for values in objects for name in values if values[name] is not None} - known:
            raise Refused(f'{key}: {name} is not supported: leave it out', key, code='unknown_parameter')
    if body.get('messages') == []:
        raise Refused('messages is empty: send at least one', 'messages')
    stop = body.get('stop', [])
    body['stop'] = [stop] if isinstance(stop, str) else stop
    if not all(0 < len(text) <= 200 for text in body['stop']) or len(body['stop']) > 16:
        raise Refused('stop must be at most 16 texts of 1 to 200 characters', 'stop')
    if body.get('top_logprobs') and not body.get('logprobs'):
        raise Refused('top_logprobs needs logprobs: true', 'top_logprobs')
    return body


def messages_of(body):
    """Return the messages of a request as Language.prompt reads them."""
    return [{'role': message['role'].replace('developer', 'system'), 'content': text if isinstance(
        text := message['content'], str) else ''.join(part['text'] for part in text)} for message in body['messages']]



@dataclass
class Job:
    """A request in progress, with its parameters `body`. queue: of its sequences' events, or of its parts."""
    body: dict
    chat: bool
    sequences: list = field(default_factory=list)
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    prompt_tokens: int = 0
    tokens: int = 0                 # generated
    reasoning: int = 0              # of these

    @property
    def limit(self):
        """Maximum number of new tokens, or None."""
        return self.body.get('max_completion_tokens', self.body.get('max_tokens'))

    def cancel(self):
        self.cancelled = True
        for s in self.sequences:
            s.cancelled = True

    async def watch(self, receive):
        """Cancel when the client has left. receive: of ASGI, after the whole request was received."""
        while (await receive())['type'] != 'http.disconnect':
            pass
        self.cancel()

    def usage(self):
        return {'prompt_tokens': self.prompt_tokens, 'completion_tokens': self.tokens,
                'total_tokens': self.prompt_tokens + self.tokens,
                'completion_tokens_details': {'reasoning_tokens': self.reasoning}}


class Reply:
    """One choice. stop: texts that end the answer, not the reasoning. prompt: its tokens. chat: False for a completion:
    all of its text is `content`."""

    def __init__(self, language, stop, prompt, chat):
        tags = [token for token in prompt if [token] in (language.open_think, language.close_think)]
        self.language, self.stop, self.chat, self.pieces = language, stop, chat, []
        self.thinking = chat and tags[-1:] == language.open_think
        self.printer = Printer(language, self.pieces.append)    # a character may span tokens, too
        self.tokens, self.reasoning, self.finish = 0, 0, None   # tokens in all, and of the reasoning
        self.held, self.logprobs, self.offset = '', [], 0       # not returned yet; characters before the next token

    def add(self, token, logprobs, finish):
        """Add a token with its logprobs (engine.Sequence). Return (field, new text, logprobs of the new text). If the
        reply ends with it, self.finish is set."""
        thinking, self.finish, self.tokens = self.thinking, finish, self.tokens + 1
        opens = self.chat and self.tokens == 1 and not thinking and [token] == self.language.open_think
        if opens or thinking and [token] == self.language.close_think:
            self.printer.finish()
            self.thinking = opens
        else:
            self.printer(token)
        if finish:
            self.printer.finish()
        text = ''.join(self.pieces)
        self.pieces.clear()
        if thinking or opens:
            self.reasoning += 1
            return 'reasoning_content', text, []
        if logprobs and token not in self.language.stop:
            self.logprobs.append((self.offset, logprobs))
        self.offset += len(text)
        return 'content', *self.release(self.held + text)

    def release(self, text):
        """Return (the part of a text that may be sent, its logprobs). Hold the rest back, or drop it after a stop."""
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.finish = 'stop'
            return text[:min(ends)], []
        starts = [n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        n = 0 if self.finish else max(starts, default=0)
        logprobs, self.held = self.logprobs, text[len(text) - n:]
        if n:                                                   # those of a token that is partly held back wait, too
            return text[:-n], []
        self.logprobs = []
        return text, logprobs


def format_logprobs(language, logprobs, chat):
    """Return logprobs, as Reply.add returns them, in the form of the API."""
    def entry(token, value):
        text = language.decode([token])                         # not text: a part of a character
        return {'token': text, 'logprob': value, 'bytes': None if '\ufffd' in text else list(text.encode())}
    if chat:
        return {'content': [entry(*chosen) | {'top_logprobs': [entry(*pair) for pair in top]}
                            for _, (chosen, *top) in logprobs]}
    return {'tokens': [language.decode([token]) for _, ((token, _), *_) in logprobs],
            'token_logprobs': [value for _, ((_, value), *_) in logprobs],
            'top_logprobs': [{language.decode([token]): value for token, value in top} for _, (_, *top) in logprobs],
            'text_offset': [offset for offset, _ in logprobs]}
