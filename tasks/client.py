"""A policy on a server with the OpenAI API (for ZAYA1-8B: Zyphra's vLLM fork; SGLang with ZAYA1-8B-legacy).

    rounds_of -- prompts --> generate -- one request per prompt, at most `parallel` at a time --> server
              <-- replies --          <-- text in chunks, then the token counts (usage)       --

Requests are chat completions with one user message, to which the server applies its chat template; for raw text some
servers would append an end token. The server's token counts are the lengths of prompts and replies (Text), so that the
bounds and costs in rsa.py are the server's.

Tails are cut in tokens of the tokenizer in the folder --ckpt, which needs no weights; without one, in pieces of four
characters, which count as a token each. A reply without usage is counted the same way. Tails enter the next prompt as
text, which the server tokenizes again. If that gives the same tokens, results at temperature 0 equal those of a local
model.

Reasoning ends with </think>, or is a separate field (`reasoning_content`, `reasoning`). If a server hides it, a
finished reply counts as the answer.

Temporary errors (no connection, timeout, status 429 or 500 and above, a reply that is incomplete or whose finish_reason
is neither `stop` nor `length`) are retried after 1, 2, 4, ... seconds, or when the server says. Every complete reply is
saved in FILE.replies until its round ends, so that a stopped run requests only the missing ones.
"""
import asyncio
import hashlib
import itertools
import json
import os
import random
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from configurator import check_ranges, package, refuse_unused
from validate import parse_json, read_bytes
from runtime.language import released_language
from tasks.problems import append_line, message

TRIES, WAIT, TIMEOUT = 8, 1.0, 600      # per request; seconds before the second try; seconds without new text
CHARACTERS = 4                          # per piece
REPLY = {'key': str, 'text': str, 'ended': bool, 'tokens': range(2 ** 50), 'prompt': range(2 ** 50)}


@dataclass
class ServerConfig:
    server: str = ''                # URL of an OpenAI API; --ckpt then provides the tokenizer only
    model: str = ''                 # its name on the server; '': the only one
    parallel: int = 16              # concurrent requests

    def __post_init__(self):
        check_ranges(self, parallel=(1, 1024))
        if not self.server:
            refuse_unused(self, 'model parallel', 'without --server')


@dataclass
class Text:
    """A prompt or a reply. Its length is the server's token count, which for a prompt comes with the reply."""
    text: str
    tokens: int = 0
    ended: bool = False             # the model ended the reply; it was not cut

    def __len__(self):
        return self.tokens


def pieces(text):
    """Cut a text from its end into pieces of CHARACTERS. Return each as an integer: byte 1, then the UTF-8 bytes."""
    cuts = [0, *range(len(text) % CHARACTERS or CHARACTERS, len(text), CHARACTERS), len(text)]
    return [int.from_bytes(b'\1' + text[i:j].encode()) for i, j in itertools.pairwise(cuts) if i < j]


def joined(integers):
    """Return the text of such pieces."""
    return ''.join(n.to_bytes((n.bit_length() + 7) // 8)[1:].decode() for n in integers)


@dataclass
class ServerPolicy:
    """A model on a server, with the interface of Policy (tasks/policy.py). Prompts and outputs are Texts."""
    config: ServerConfig
    encode: Callable                # text -> tokens
    parse: Callable                 # the same, but special tokens in the text are encoded as such
    decode_tokens: Callable
    words: str                      # see problems.message, also the next
    compact: str
    replies: str                    # file for the replies of the current round, or ''
    resumes: bool                   # that file may hold replies of this run
    model = None                    # no local model
    counts = False                  # some reply had no usage

    def decode(self, tokens):
        return tokens.text if isinstance(tokens, Text) else self.decode_tokens(tokens)

    def build_prompt(self, question, tails):
        parts = message(question, tails, self.words, self.compact)
        return Text(''.join(part if isinstance(part, str) else self.decode_tokens(part) for part in parts))

    def thought_of(self, reply):
        before, closed, after = reply.text.rpartition('</think>')
        return self.parse((before if closed else after).replace('<think>', ''))

    def answer_of(self, reply):
        return self.parse(reply.text.rpartition('</think>')[2]) or None if reply.ended else None

    def sampler(self, options, stream=lambda *_: None, first=0):
        """Return a `generate` for rsa.rounds_of. Each request has its own seed, made from options.seed, the number of
        the call (from `first` on) and the prompt's index. stream(i, text) is called with every chunk of reply i."""
        calls = itertools.count(first)

        def generate(prompts, max_new_tokens):
            call = next(calls)
            requests = [self.request(prompt.text, max_new_tokens, options, zlib.crc32(
                f'{options.seed} {call} {i}'.encode()) >> 1) for i, prompt in enumerate(prompts)]
            replies = self.complete(requests, stream)
            for prompt, reply in zip(prompts, replies):
                prompt.tokens = reply['prompt']
            if (most := max(reply['tokens'] for reply in replies)) > max_new_tokens:
                raise ValueError(f'{self.config.server} wrote {most:,} tokens, it was asked for at most '
                                 f'{max_new_tokens:,}')
            return [Text(reply['text'], reply['tokens'], reply['ended']) for reply in replies]
        return generate

    def request(self, text, max_new_tokens, options, seed):
        """Return the body of a request."""
        filters = {key: value for key in ('min_p', 'top_k') if (value := getattr(options, key))}
        return {'model': self.config.model, 'messages': [{'role': 'user', 'content': text}],
                'max_tokens': max_new_tokens, 'temperature': options.temperature, 'top_p': options.top_p, 'seed': seed,
                'extra_body': {'chat_template_kwargs': {'enable_thinking': True}} | filters}

    def complete(self, requests, stream):
        """Return the replies to all requests: those that were saved, and the server's, which are saved."""
        keys = [hashlib.sha256(json.dumps(request).encode()).hexdigest() for request in requests]
        saved = read_replies(self, keys)

        def save(i, reply):
            if not (reply['tokens'] and reply['prompt']):
                reply = self.count(requests[i], reply)
            saved[keys[i]] = reply
            if self.replies:
                with open(self.replies, 'a', encoding='utf-8') as file:
                    append_line(file, reply | {'key': keys[i]})
        missing = {i: request for i, request in enumerate(requests) if keys[i] not in saved}
        asyncio.run(ask_all(self.config, missing, save, stream))
        return [saved[key] for key in keys]

    def count(self, request, reply):
        """Return a reply without usage with the number of its tokens, and of its prompt's without those of the chat
        template, counted in the unit of tails."""
        if not self.counts:
            tqdm.write(f'{self.config.server} reports no usage: tokens are counted here, as those of tails are',
                       file=sys.stderr)
            self.counts = True
        most = request['max_tokens']                            # the length of a reply that was cut
        tokens = min(most, len(self.parse(reply['text'])) + 1) if reply['ended'] else most      # 1: the stop token
        return reply | {'tokens': tokens, 'prompt': len(self.parse(request['messages'][0]['content']))}


def load_policy(config, ckpt, words, compact, path):
    """Return the ServerPolicy of a ServerConfig, whose `model` is filled in. ckpt: a folder with the tokenizer, or ''.
    words, compact: see problems.message. path: the results file, or ''. Raise ValueError if there is no server, no
    such model, or no tokenizer in ckpt."""
    if not config.server.startswith(('http://', 'https://')):
        raise ValueError(f'--server={config.server}: write a URL, such as http://127.0.0.1:8000/v1')
    config.model = config.model or only_model(config.server)
    language = released_language(ckpt) if ckpt else None
    print(f'{config.server}, {config.model}: tails are counted in ' + (
        f'tokens of {ckpt}' if language else
        f'characters, {CHARACTERS} to a token; --ckpt=FOLDER with the tokenizer counts tokens'))
    coding = (language.encode, language.encode_with_special, language.decode) if language else (pieces, pieces, joined)
    return ServerPolicy(config, *coding, words, compact, path and path + '.replies', not path or os.path.exists(path))


def only_model(url):
    """Return the name of a server's model, of runtime.serve's the plain one. Raise ValueError if it has several, or
    cannot be reached."""
    openai = package('openai')
    try:
        with openai.OpenAI(base_url=url, api_key=api_key(), max_retries=0, timeout=10) as client:
            names = [str(model.id) for model in client.models.list() if not str(model.id).endswith('-rsa')]
    except Exception as error:                                  # any network error
        raise ValueError(f'{url} does not list its models ({describe(error)}); is it running? Or name one '
                         'with --model') from None
    if len(names) != 1:
        raise ValueError(f'{url} has {len(names)} models: name one with --model ({", ".join(names[:9])})')
    return names[0]


def api_key():
    return os.environ.get('OPENAI_API_KEY') or 'no key'


def describe(error):
    """Return an error as one short line without the API key."""
    if hasattr(error, 'status_code'):
        text = f'{error.status_code}, {error.response.text}'
    else:
        text = (str(error) or type(error).__name__) + f' ({error.__cause__})' * bool(str(error.__cause__ or ''))
    text = ' '.join(text.replace(api_key(), '***').split())
    return text if len(text) < 300 else text[:300] + '...'


def read_replies(policy, keys):
    """Return {key: reply} of the replies that a stopped run saved. If none belongs to this round, empty the file."""
    path, found = policy.replies, {}
    if path and policy.resumes and os.path.exists(path):
        content = read_bytes(path)
        complete = content.rfind(b'\n') + 1                     # length without an incomplete last line
        for line in content[:complete].split(b'\n')[:-1]:
            reply = parse_json(line, path, REPLY)
            found[reply['key']] = reply
        os.truncate(path, complete)
    if path and not found.keys() & set(keys):
        found = {}
        open(path, 'w').close()
    policy.resumes = True                                       # from now on the file is that of this run
    return found


async def ask_all(config, requests, save, stream):
    """Send all requests, {i: request}, at most config.parallel at a time, and call save(i, reply) for every reply. If
    one fails permanently, send no more, wait for those in progress, and raise ValueError."""
    openai, slots, failed = package('openai'), asyncio.Semaphore(config.parallel), []
    timeout = openai.Timeout(TIMEOUT, connect=10)
    async with openai.AsyncOpenAI(base_url=config.server, api_key=api_key(), max_retries=0, timeout=timeout) as client:
        async def one(i, request):
            async with slots:
                if not failed:
                    try:
                        save(i, await ask(client, config.server, request, lambda text: stream(i, text)))
                    except ValueError as error:
                        failed.append(error)
        await asyncio.gather(*(one(i, request) for i, request in requests.items()))
    if failed:
        raise failed[0]


async def ask(client, url, request, stream):
    """Return the reply to a request as a dict. Retry temporary errors; raise ValueError for others, and after TRIES."""
    for attempt in range(TRIES):
        try:
            return await read(client, request, stream)
        except Exception as error:                              # any network error
            status, wait = getattr(error, 'status_code', 500), WAIT * 2 ** attempt
            if status < 500 and status not in (408, 409, 425, 429):
                raise ValueError(f'{url} refused: {describe(error)}') from None
            if attempt == TRIES - 1:
                raise ValueError(f'{url} failed {TRIES} times, at last with: {describe(error)}') from None
            try:
                wait = max(wait, min(TIMEOUT, float(error.response.headers['retry-after'])))
            except (AttributeError, KeyError, ValueError):      # no such header, or a date
                wait *= random.uniform(1, 1.5)                  # jitter
            tqdm.write(f'{url}: {describe(error)}; try {attempt + 2} of {TRIES} in {wait:.0f} s', file=sys.stderr)
            await asyncio.sleep(wait)


async def read(client, request, stream):
    """Return the reply to one attempt, {'text', 'ended', 'tokens', 'prompt'}; without usage there
    are 0 tokens. Raise ValueError if it is incomplete."""
    thought, answer, apart, reason, usage = '', '', False, None, None           # apart: reasoning has a field
    async with await client.chat.completions.create(
            **request, stream=True, stream_options={'include_usage': True}) as chunks:
        async for chunk in chunks:
            usage = chunk.usage or usage
            for choice in chunk.choices or ():
                reason, delta = choice.finish_reason or reason, choice.delta
                new = getattr(delta, 'reasoning_content', None) or getattr(delta, 'reasoning', None) or ''
                apart |= getattr(delta, 'reasoning_content', None) is not None                  # also if it is empty
                thought, answer = thought + new, answer + (delta.content or '')
                if new or delta.content:
                    stream(new or delta.content)
    if reason not in ('stop', 'length'):
        raise ValueError(f'the reply ended with finish_reason {reason!r}' if reason else 'the reply is incomplete')
    tokens, prompt = (int(getattr(usage, key, None) or 0) for key in ('completion_tokens', 'prompt_tokens'))
    text = thought + '</think>' * bool((thought or apart) and (answer or reason == 'stop')) + answer
    return {'text': text.encode('utf-8', 'replace').decode(), 'ended': reason == 'stop', 'tokens': tokens,
            'prompt': prompt}
