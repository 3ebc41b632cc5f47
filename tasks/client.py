"""Markovian RSA (rsa.py) on a server that speaks the OpenAI API: vLLM, SGLang and `transformers serve` have ZAYA1-8B.

    rounds_of -- prompts --> generate -- a request each, at most `parallel` at once --> server
              <-- replies --          <-- text, piece by piece, at its end the usage --

Requests are chat completions of one user's message, which the server puts into its own chat template: a server that is
given raw text may put an end token behind it. What comes back is the text that the model said, and the counts at its
end (usage) are what it cost: a Text has them as its length, so all that rsa.py bounds and counts is theirs.

A tail is cut in tokens of the tokenizer in the folder --ckpt, which needs no weights; without one in pieces of four
characters, each of which counts as a token. Either way it goes into the next prompt as text, which the server encodes
anew: where that gives the tokens that the model wrote, temperature 0 gives the results of rsa.py without --server.

Reasoning ends with </think>, or comes apart from the rest (`reasoning_content`, `reasoning`). Some servers show
neither, so the answer in a reply that came to an end without them is all of it, which locally would be no answer.

What fails for the moment (no connection, silence, 429, 500 and above, a reply that breaks off) is asked for again after
1, 2, 4, ... seconds, or when the server says. Each whole reply is kept in FILE.replies at once, for the time of its
round: a run that was stopped in a round asks for the others only.
"""
import asyncio
import hashlib
import itertools
import json
import os
import random
import sys
import zlib
from types import SimpleNamespace

from tqdm import tqdm

from configurator import package
from validate import parse_json, read_bytes
from runtime.language import released_language
from tasks.problems import append_line, message

TRIES, WAIT, SILENCE = 8, 1.0, 600      # of a request; seconds before the second; seconds without a word
CHARACTERS = 4                          # of a piece
REPLY = {'key': str, 'text': str, 'ended': bool, 'tokens': range(2 ** 50), 'prompt': range(2 ** 50)}


class Text:
    """A prompt, or a reply. Its length is in tokens, as the server counts: that of a prompt is known with the reply.
    ended: the model came to an end by itself."""

    def __init__(self, text, tokens=0, ended=False):
        self.text, self.tokens, self.ended = text, tokens, ended

    def __len__(self):
        return self.tokens


def pieces(text):
    """Cut a text from its end into pieces, each a whole number: a 1, and the bytes of its characters."""
    cuts = [0, *range(len(text) % CHARACTERS or CHARACTERS, len(text), CHARACTERS), len(text)]
    return [int.from_bytes(b'\1' + text[i:j].encode()) for i, j in itertools.pairwise(cuts) if i < j]


def joined(numbers):
    """The text of such pieces."""
    return ''.join(n.to_bytes((n.bit_length() + 7) // 8)[1:].decode() for n in numbers)


def load_policy(config, words, path):
    """Return what rsa.py takes for a Policy. config: of rsa.py; its `model` is filled in. path: of the run's file, or
    '': replies are kept beside it. Raise ValueError without a server, a model on it, or a tokenizer in --ckpt."""
    if not config.server.startswith(('http://', 'https://')):
        raise ValueError(f'--server={config.server}: write a URL, such as http://127.0.0.1:8000/v1')
    config.model = config.model or only_model(config.server)
    language = released_language(config.ckpt) if config.ckpt else None
    encode, parse, decode = pieces, pieces, joined
    if language:
        encode, parse, decode = language.encode, language.encode_with_special, language.decode
    print(f'{config.server}, {config.model}: tails are counted in ' + (
        f'tokens of {config.ckpt}' if language else
        f'characters, {CHARACTERS} to a token; --ckpt=FOLDER with the tokenizer counts tokens'))

    def build_prompt(question, tails):
        parts = message(question, tails, words, config.compact)
        return Text(''.join(part if isinstance(part, str) else decode(part) for part in parts))

    def thought_of(reply):
        before, closed, after = reply.text.rpartition('</think>')
        return parse((before if closed else after).replace('<think>', ''))
    return SimpleNamespace(
        model=None, encode=encode, decode=lambda said: said.text if isinstance(said, Text) else decode(said),
        build_prompt=build_prompt, thought_of=thought_of,
        answer_of=lambda reply: parse(reply.text.rpartition('</think>')[2]) or None if reply.ended else None,
        replies=path and path + '.replies', begun=not path or os.path.exists(path))


def only_model(url):
    """Return the name of the model that a server has. Raise ValueError if there are several, or it cannot be asked."""
    openai = package('openai')
    try:
        with openai.OpenAI(base_url=url, api_key=key(), max_retries=0, timeout=10) as client:
            names = [str(model.id) for model in client.models.list()]
    except Exception as error:                                  # whatever a network can do
        raise ValueError(f'{url} does not say which models it has ({describe(error)}); is it running? Else name one '
                         'with --model') from None
    if len(names) != 1:
        raise ValueError(f'{url} has {len(names)} models: name one with --model ({", ".join(names[:9])})')
    return names[0]


def key():
    return os.environ.get('OPENAI_API_KEY') or 'no key'


def describe(error):
    """What went wrong, in one short line without the key."""
    if hasattr(error, 'status_code'):
        text = f'{error.status_code}, {error.response.text}'
    else:
        text = (str(error) or type(error).__name__) + f' ({error.__cause__})' * bool(str(error.__cause__ or ''))
    text = ' '.join(text.replace(key(), '***').split())
    return text if len(text) < 300 else text[:300] + '...'


def sampler(policy, config, stream=None, first=0):
    """Return a `generate` for rounds_of. Each request has a seed of its own, made from --seed, the number of the call
    and the row. stream(row, text) is called for every piece of text that comes."""
    calls = itertools.count(first)

    def generate(prompts, max_new_tokens):
        call = next(calls)
        requests = [{
            'model': config.model, 'messages': [{'role': 'user', 'content': prompt.text}], 'max_tokens': max_new_tokens,
            'temperature': config.temperature, 'top_p': config.top_p,
            'seed': zlib.crc32(f'{config.seed} {call} {row}'.encode()) >> 1,
            'extra_body': {'chat_template_kwargs': {'enable_thinking': True}} | (
                {'min_p': config.min_p} if config.min_p else {})} for row, prompt in enumerate(prompts)]
        keys = [hashlib.sha256(json.dumps(request).encode()).hexdigest() for request in requests]
        kept = read_replies(policy, keys)

        def keep(row, reply):
            kept[keys[row]] = reply
            if policy.replies:
                with open(policy.replies, 'a', encoding='utf-8') as file:
                    append_line(file, reply | {'key': keys[row]})
        missing = {row: request for row, request in enumerate(requests) if keys[row] not in kept}
        asyncio.run(ask_all(config, missing, keep, stream or (lambda row, text: None)))
        replies = [kept[k] for k in keys]
        for prompt, reply in zip(prompts, replies):
            prompt.tokens = reply['prompt']
        if (most := max(reply['tokens'] for reply in replies)) > max_new_tokens:
            raise ValueError(f'{config.server} wrote {most:,} tokens, it was asked for at most {max_new_tokens:,}')
        return [Text(reply['text'], reply['tokens'], reply['ended']) for reply in replies]
    return generate


def read_replies(policy, keys):
    """Return {key: reply} of those in the file of replies that a killed run left. If it has none of these, it was of
    another round, and is begun anew."""
    path, found = policy.replies, {}
    if path and policy.begun and os.path.exists(path):
        content = read_bytes(path)
        for line in content[:content.rfind(b'\n') + 1].split(b'\n')[:-1]:
            reply = parse_json(line, path, REPLY)
            found[reply['key']] = reply
        os.truncate(path, content.rfind(b'\n') + 1)
    if path and not found.keys() & set(keys):
        found = {}
        open(path, 'w').close()
    policy.begun = True                                        # the file of the run is there from now on
    return found


async def ask_all(config, requests, keep, stream):
    """Ask for all requests, {row: request}, at most config.parallel at once; keep(row, reply) each as it comes. Raise
    ValueError if one fails for good: those under way are waited for, no other is begun."""
    openai, room, failed = package('openai'), asyncio.Semaphore(config.parallel), []
    timeout = openai.Timeout(SILENCE, connect=10)
    async with openai.AsyncOpenAI(base_url=config.server, api_key=key(), max_retries=0, timeout=timeout) as client:
        async def one(row, request):
            async with room:
                if not failed:
                    try:
                        keep(row, await ask(client, config.server, request, lambda text: stream(row, text)))
                    except ValueError as error:
                        failed.append(error)
        await asyncio.gather(*(one(row, request) for row, request in requests.items()))
    if failed:
        raise failed[0]


async def ask(client, url, request, stream):
    """Ask until a whole reply has come -> a dict. Raise ValueError for what will not get better, or TRIES are over."""
    for attempt in range(TRIES):
        try:
            return await read(client, request, stream)
        except Exception as error:                              # whatever a network can do
            status, wait = getattr(error, 'status_code', 500), WAIT * 2 ** attempt
            if status < 500 and status not in (408, 409, 425, 429):
                raise ValueError(f'{url} refused: {describe(error)}') from None
            if attempt == TRIES - 1:
                raise ValueError(f'{url} failed {TRIES} times, at last with: {describe(error)}') from None
            try:
                wait = max(wait, min(SILENCE, float(error.response.headers['retry-after'])))
            except (AttributeError, KeyError, ValueError):      # nothing is said, or a date
                wait *= random.uniform(1, 1.5)                  # not all at the same moment
            tqdm.write(f'{url}: {describe(error)}; try {attempt + 2} of {TRIES} in {wait:.0f} s', file=sys.stderr)
            await asyncio.sleep(wait)


async def read(client, request, stream):
    """One request -> {'text', 'ended', 'tokens', 'prompt'}. Raise ValueError if the reply breaks off."""
    thought, said, reason, usage = '', '', None, None
    async with await client.chat.completions.create(
            **request, stream=True, stream_options={'include_usage': True}) as chunks:
        async for chunk in chunks:
            usage = chunk.usage or usage
            for choice in chunk.choices or ():
                reason, delta = choice.finish_reason or reason, choice.delta
                new = getattr(delta, 'reasoning_content', None) or getattr(delta, 'reasoning', None) or ''
                thought, said = thought + new, said + (delta.content or '')
                if new or delta.content:
                    stream(new or delta.content)
    if reason is None or usage is None:
        raise ValueError('the reply broke off' + ' before its usage was told' * (reason is not None))
    text = thought + '</think>' * bool(thought and (said or reason == 'stop')) + said
    return {'text': text.encode('utf-8', 'replace').decode(), 'ended': reason == 'stop',
            'tokens': int(usage.completion_tokens), 'prompt': int(usage.prompt_tokens)}
