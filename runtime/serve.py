"""An OpenAI-compatible server on one's own machine: `python -m runtime.serve --ckpt=RUN_OR_RELEASED_FOLDER`.

    the main thread: HTTP (uvicorn, starlette)              one more thread, the only one that runs the model
      validation, text                  -- sequences -->     engine.py: continuous batching
                                        <-- tokens ----

GET /v1/models, POST /v1/chat/completions and /v1/completions, whole or as server-sent events. With a seed, the tokens
are those of sample.generate([prompt] * n), up to rounding, whatever else is served. A parameter that is not implemented
and could change the result is refused by name.

The model NAME-rsa answers by Markovian RSA (rsa.py). Its settings are flags of this program; an object `rsa` in the
request overrides them, and max_tokens the final budget. The reply is the first candidate with the majority's answer;
each round adds a line to its reasoning_content, and usage counts the tokens of all candidates.

If the environment variable NANOZAYA_API_KEY is set, requests must send that key. Nothing of them is stored or logged.
"""
import asyncio
import contextlib
import functools
import hmac
import itertools
import json
import os
import queue
import random
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace

from configurator import check_ranges, one_line_errors, package, read            # before torch, see configurator.py
import decode
import rsa
from model import sizes
from runtime import pretrained
from runtime.chat import Printer
from runtime.device import pick_device
from runtime.engine import Engine, Sequence
from sample import SamplingOptions, sample_from_logits
from tasks import problems
from tasks.answers import final_answer
from tasks.loops import task
from validate import check, parse_json


@dataclass
class ServeConfig:                  # more flags, the defaults of NAME-rsa: RSASettings
    ckpt: str = 'runs/demo'         # a run folder of train.py, or a folder in the released layout
    host: str = '127.0.0.1'         # 0.0.0.0: reachable from other machines
    port: int = 8000                # 0: any free port
    cache_gib: float = 4.0          # of all KV caches; what does not fit waits. Copies may briefly need as much again
    max_new_tokens: int = 4096      # of a chat reply without max_tokens; at most what the context has left
    device: str = 'auto'

    def __post_init__(self):
        check_ranges(self, port=(0, 65535), cache_gib=(1e-6, None), max_new_tokens=(1, None))


MAX_BYTES, MAX_REQUESTS = 4 * 2**20, 256    # of a request; running and waiting, more are refused with status 429
KEEP_ALIVE = 10                             # seconds between events of a round of Markovian RSA
SAMPLING = {'temperature': float, 'top_p': float, 'top_k': int, 'min_p': float, 'seed': range(-2**63, 2**63)}
MESSAGE = {'role': ('system', 'developer', 'user', 'assistant'), 'content': (str, [{'type': 'text', 'text': str}])}
# The parameters of requests, as schemas (validate.py). `user` and `metadata` are labels without effect.
optional = lambda schema: {f'{key}?': kind for key, kind in schema.items()}
COMMON = {'model': str} | optional(SAMPLING | {
    'stream': bool, 'stream_options': {'include_usage?': bool}, 'stop': (str, [str]), 'n': range(1, 129),
    'max_tokens': range(1, 2**31), 'user': str, 'metadata': {str: object}})
TEXT = COMMON | {'prompt': (str, [int]), 'logprobs?': range(21)}
CHAT = COMMON | {'messages': [MESSAGE]} | optional({
    'max_completion_tokens': range(1, 2**31), 'logprobs': bool, 'top_logprobs': range(21),
    'response_format': {'type': 'text'}, 'chat_template_kwargs': {'enable_thinking?': bool}})
RSA = CHAT | {'n?': 1, 'logprobs?': False, 'top_logprobs?': 0, 'stop?': None,
              'rsa?': optional({setting.name: setting.type for setting in fields(rsa.RSASettings)})}
NAMES = {key.removesuffix('?') for key in TEXT | RSA | RSA['rsa?']}


class Refused(ValueError):
    """An error of the API. A message that starts with the name of a parameter refers to it."""

    def __init__(self, message, status=400, code=None):
        super().__init__(message)
        name = re.match(r'(?:the request: )?(\w*)', message)[1]
        kinds = {401: 'authentication_error', 429: 'rate_limit_error', 500: 'server_error'}
        self.status, self.body = status, {'error': {
            'message': message, 'type': kinds.get(status, 'invalid_request_error'), 'code': code,
            'param': name if name in NAMES else None}}


def validated(body, schema):
    """Return the parameters that are given, `stop` as a list, messages as Language.prompt reads them. Raise ValueError,
    naming the parameter at fault. null and [] mean that one is not given; for an unknown one, so do false, 0, {}."""
    body = {key: value for key, value in body.items() if value not in (None, [])}
    for where in '', 'chat_template_kwargs', 'rsa':
        given, known = (body.get(where), schema.get(f'{where}?', {})) if where else (body, schema)
        for name in given if isinstance(given, dict) else ():
            if given[name] and not {name, f'{name}?'} & known.keys():
                raise Refused(f'{f"{where}: " * bool(where)}{name} is not supported by {body["model"]}: leave it out')
    check(body, schema, 'the request')
    stop = body.get('stop', [])
    body['stop'] = [stop] if isinstance(stop, str) else stop
    if not all(0 < len(text) <= 200 for text in body['stop']) or len(body['stop']) > 16:
        raise Refused('stop must be at most 16 texts of 1 to 200 characters')
    text = lambda content: content if isinstance(content, str) else ''.join(part['text'] for part in content)
    body['messages'] = [{'role': message['role'].replace('developer', 'system'), 'content': text(message['content'])}
                        for message in body.get('messages', [])]
    return body


class Reply:
    """The text of one choice, in which the reasoning is apart from the answer.

    The reasoning of a chat starts at <think>, if that is the prompt's last tag or the reply's first token, and ends at
    </think>. Elsewhere these tags are text. stop: texts that end the answer. As one may span tokens, text that could be
    its start is held back until the next tokens decide: with the stop text 'END', 'E', 'N', 'x' gives '', '', 'ENx'.
    chat: False for a completion, all of whose text is `content`.
    """

    def __init__(self, language, stop, prompt, chat):
        tags = [token for token in prompt if [token] in (language.open_think, language.close_think)]
        self.language, self.stop, self.pieces, self.held, self.finish = language, stop, [], '', None
        self.thinking = chat and tags[-1:] == language.open_think
        self.may_open = chat and not self.thinking              # only with the first token
        self.printer = Printer(language, self.pieces.append)    # a character may span tokens, too

    def add(self, token, finish):
        """Add a token. Return (field, new text). If the reply ends with it, self.finish is set."""
        opens = self.may_open and [token] == self.language.open_think
        thinking, self.may_open, self.finish = self.thinking or opens, False, finish
        self.thinking = thinking and [token] != self.language.close_think
        if opens or self.thinking != thinking:
            self.printer.finish()
        else:
            self.printer(token)
        if finish:
            self.printer.finish()
        text = self.held + ''.join(self.pieces)
        self.pieces.clear()
        if thinking:
            return 'reasoning_content', text
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        starts = [n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        self.finish = 'stop' if ends else finish
        end = min(ends) if ends else len(text) - (0 if finish else max(starts, default=0))
        self.held = text[end:]
        return 'content', text[:end]


@dataclass
class Job:
    """A request in progress, with its parameters `body`. queue: of its Sequences' events, with a Reply for each, or of
    its parts."""
    body: dict
    chat: bool
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)
    loop: object = field(default_factory=asyncio.get_running_loop)
    replies: list = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0                 # generated
    left: bool = False              # the client has left, or the reply has ended

    def __post_init__(self):
        options = {key: self.body[key] for key in SAMPLING if key in self.body}
        self.options = SamplingOptions(**{'seed': random.getrandbits(31)} | options)
        self.limit = self.body.get('max_completion_tokens', self.body.get('max_tokens'))        # or None

    def put(self, part):
        """Put an event, a part or a Refused into the queue, from any thread."""
        with contextlib.suppress(RuntimeError):                 # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, part)

    async def parts(self):
        """Yield (index of the choice, field, text, logprobs, finish) until all choices are finished."""
        finished = 0
        while finished < max(1, len(self.replies)):
            part = await self.queue.get()
            if isinstance(part, Refused):
                raise part
            if self.replies:
                s, token, logprobs, finish = part
                reply = self.replies[s.index]
                if reply.finish:                                # by a stop text, which the engine does not know
                    continue
                if token is None:
                    raise Refused(finish, 500)
                name, text = reply.add(token, finish)
                shown = logprobs and name == 'content' and finish != 'stop'     # not of the stop token
                part = s.index, name, text, [logprobs] if shown else [], reply.finish
                self.tokens += 1
            finished += part[-1] is not None
            yield part

    def usage(self):
        return {'prompt_tokens': self.prompt_tokens, 'completion_tokens': self.tokens,
                'total_tokens': self.prompt_tokens + self.tokens}


class Service:
    """The API of one model."""

    def __init__(self, model, language, config, settings):
        self.model, self.language, self.config, self.settings = model, language, config, settings
        bytes_per_token = sizes(model.config)['kv_bytes'] * model.dtype.itemsize // 2       # sizes: of bf16
        self.engine = Engine(model, decode.folded(model), sample_from_logits, language.stop,
                             int(config.cache_gib * 2**30 / bytes_per_token))
        self.context = min(model.config.context, self.engine.capacity)
        name = os.path.basename(os.path.abspath(config.ckpt))
        self.names, self.started, self.open = [name, f'{name}-rsa'], int(time.time()), 0        # open: requests

    # In a thread per request: from its parameters to Sequences.

    def run_job(self, job):
        try:
            (self.plain if job.body['model'] == self.names[0] else self.markovian)(job)
        except Exception as error:
            job.put(error if isinstance(error, Refused) else Refused(str(error), 400 if isinstance(
                error, ValueError) else 500))

    def prompt(self, job, *content):
        """Return the tokens of a chat prompt. content: of its last message, if it is to be replaced."""
        *before, last = job.body['messages']
        last = last | {'content': content[0]} if content else last
        return self.language.prompt([*before, last], job.body.get('chat_template_kwargs', {}).get(
            'enable_thinking', True))

    def check_room(self, prompt, limit):
        if not prompt or not all(0 <= token < self.model.config.vocab_size for token in prompt):
            raise Refused(f'prompt is empty or has a token outside the vocabulary of {self.model.config.vocab_size:,}')
        if len(prompt) + limit > self.context:
            raise Refused(f'max_tokens: a prompt of {len(prompt):,} tokens and {limit:,} new ones are more than the '
                          f'context of {self.context:,}' + ', which --cache_gib bounds' * (
                              self.context < self.model.config.context), code='context_length_exceeded')

    def plain(self, job):
        body, top = job.body, job.body.get('logprobs')
        if job.chat:
            top = body.get('top_logprobs', 0 if top else None)
        prompt = self.prompt(job) if job.chat else body['prompt']
        if isinstance(prompt, str):
            prompt = self.language.bos + self.language.encode(prompt)
        default = self.config.max_new_tokens if job.chat else 16                # 16: as in OpenAI's
        limit = job.limit or min(default, max(1, self.context - len(prompt)))
        self.check_room(prompt, limit)
        job.prompt_tokens = len(prompt)
        job.replies = [Reply(self.language, body['stop'], prompt, job.chat) for _ in range(body.get('n', 1))]
        for i, reply in enumerate(job.replies):
            self.engine.inbox.put(Sequence(prompt, limit, job.options, i, job.put,
                                           lambda reply=reply: job.left or reply.finish, top))

    def markovian(self, job):
        language, seeds = self.language, itertools.count(job.options.seed * 1_000_003)          # as in Policy.sampler
        given = {'seed': job.options.seed, 'final_budget': job.limit or self.settings.final_budget}
        settings = replace(self.settings, **given | job.body.get('rsa', {})).resolved()
        policy = SimpleNamespace(answer_of=language.answer, thought_of=language.thought, build_prompt=lambda *parts: (
            self.prompt(job, problems.message(*parts, None, settings.compact))))
        if job.body['messages'][-1]['role'] != 'user':
            raise Refused('messages: the last one has another role than user: end with a question')
        question = language.encode(job.body['messages'][-1]['content'])
        self.check_room(policy.build_prompt(question, [[0] * settings.tail] * settings.candidates),
                        max(settings.budget, settings.final_budget))
        generate = lambda prompts, limit: self.generate(job, prompts, limit, replace(job.options, seed=next(seeds)))
        say = lambda name, text, finish=None: job.put((0, name, text, [], finish))
        for t, (now,) in enumerate(rsa.rounds_of([question], generate, policy, settings)):
            answers = [c.answer and final_answer(language.decode(c.answer)) for c in now.candidates]
            say('reasoning_content', f'round {t} of {settings.rounds}: {len([*filter(None, answers)])} of '
                f'{len(answers)} candidates have an answer; {now.tokens:,} tokens\n')
        best = now.candidates[answers.index(problems.majority_vote(answers))]
        say('reasoning_content', language.decode(language.thought(best.output)))
        say('content', language.decode(best.answer or []), 'stop' if best.answer else 'length')

    def generate(self, job, prompts, limit, options):
        """Return the new tokens of each prompt, those of sample.generate, by the engine."""
        events, outputs, running, sent = queue.SimpleQueue(), [[] for _ in prompts], len(prompts), time.monotonic()
        for i, prompt in enumerate(prompts):
            self.engine.inbox.put(Sequence(prompt, limit, options, i, events.put, lambda: job.left))
        while running:
            s, token, _, finish = events.get()
            if token is None:
                raise Refused(finish, 500)
            outputs[s.index].append(token)
            running -= finish is not None
            if time.monotonic() > sent + KEEP_ALIVE:            # a round may take longer than a client waits
                sent = time.monotonic()
                job.put((0, 'reasoning_content', '', [], None))
        job.prompt_tokens += sum(map(len, prompts))
        job.tokens += sum(map(len, outputs))
        return outputs

    # In the main thread: HTTP.

    async def respond(self, body, chat, scope, receive, send):
        """Answer a valid request: an ASGI application."""
        async def watch():
            while (await receive())['type'] != 'http.disconnect':
                pass
            job.left = True
        if self.open >= MAX_REQUESTS:
            raise Refused(f'{self.open} requests are running or waiting: try again', 429)
        job, self.open = Job(body, chat), self.open + 1
        watcher = asyncio.create_task(watch())
        threading.Thread(target=self.run_job, args=[job], daemon=True).start()
        try:
            if body.get('stream'):
                await self.stream(job, send)
            else:
                await self.JSONResponse(await self.whole(job))(scope, receive, send)
        finally:
            watcher.cancel()
            job.left, self.open = True, self.open - 1

    def envelope(self, job, kind, choices, **more):
        """Return a reply, kind 'message', or an event, 'delta'. choices: {index: ({field: text}, logprobs, finish)}."""
        name = 'text_completion' if not job.chat else 'chat.completion' + '.chunk' * (kind == 'delta')
        return {'id': f'{id(job):x}', 'object': name, 'created': int(time.time()), 'model': job.body['model'], **more,
                'choices': [{'index': index, 'finish_reason': finish, 'logprobs': self.format_logprobs(job, logprobs),
                             **({kind: texts} if job.chat else {'text': texts.get('content', '')})}
                            for index, (texts, logprobs, finish) in sorted(choices.items())]}

    def format_logprobs(self, job, logprobs):
        """Return the logprobs of several tokens in the form of the API, or None."""
        def entry(token, value):
            text = self.language.decode([token])                # not text: a part of a character
            return {'token': text, 'logprob': value, 'bytes': None if '\ufffd' in text else list(text.encode())}
        entries = [[entry(*pair) for pair in pairs] for pairs in logprobs]
        if job.chat or not entries:
            return {'content': [chosen | {'top_logprobs': top} for chosen, *top in entries]} if entries else None
        return {'tokens': [chosen['token'] for chosen, *_ in entries],
                'token_logprobs': [chosen['logprob'] for chosen, *_ in entries],
                'top_logprobs': [{each['token']: each['logprob'] for each in top} for _, *top in entries]}

    async def whole(self, job):
        choices = {}
        async for index, name, text, new, finish in job.parts():
            texts, logprobs, _ = choices.get(index, ({'role': 'assistant', 'content': ''}, [], None))
            choices[index] = texts | {name: texts.get(name, '') + text}, logprobs + new, finish
        return self.envelope(job, 'message', choices, usage=job.usage())

    async def stream(self, job, send):
        """Send a reply as server-sent events. An error after the first is an event, too."""
        event = lambda content: send({'type': 'http.response.body', 'more_body': True,
                                      'body': b'data: %s\n\n' % json.dumps(content).encode()})
        started = None                                          # choices with an event; None: no status was sent
        try:
            async for index, name, text, logprobs, finish in job.parts():
                if started is None:
                    started = set()
                    await send({'type': 'http.response.start', 'status': 200, 'headers': [
                        (b'content-type', b'text/event-stream'), (b'cache-control', b'no-cache')]})
                if text or logprobs or finish or name != 'content':             # an empty reasoning is sent, too
                    texts = ({} if index in started else {'role': 'assistant'}) | {name: text}
                    started.add(index)
                    await event(self.envelope(job, 'delta', {index: (texts, logprobs, finish)}))
            if job.body.get('stream_options', {}).get('include_usage'):
                await event(self.envelope(job, 'delta', {}, usage=job.usage()))
        except Refused as error:
            if started is None:
                raise
            await event(error.body)
        await send({'type': 'http.response.body', 'body': b'data: [DONE]\n\n'})

    def authorize(self, request):
        key, given = os.environ.get('NANOZAYA_API_KEY'), request.headers.get('authorization', '')
        if key and not hmac.compare_digest(given.encode('latin-1'), f'Bearer {key}'.encode()):
            raise Refused('the API key is missing or wrong: send the NANOZAYA_API_KEY of the server', 401)

    async def models(self, request):
        self.authorize(request)
        return self.JSONResponse({'object': 'list', 'data': [
            {'id': name, 'object': 'model', 'created': self.started, 'owned_by': 'nanozaya',
             'max_model_len': self.context} for name in self.names]})

    async def complete(self, request):
        """Read and validate a request. Return the ASGI application that answers it."""
        self.authorize(request)
        if request.headers.get('content-type', '').partition(';')[0].strip().lower() != 'application/json':
            raise Refused('the Content-Type must be application/json', 415)         # browsers send others from anywhere
        data, chat = bytearray(), 'chat' in request.url.path
        async for part in request.stream():
            data += part
            if len(data) > MAX_BYTES:
                raise Refused(f'the request has more than {MAX_BYTES:,} bytes: shorten it', 413)
        body = parse_json(bytes(data), 'the request', {'model': str})
        if body['model'] not in self.names:
            raise Refused(f'model: there is no {body["model"][:60]!r}: name {" or ".join(self.names)}', 404,
                          'model_not_found')
        plain = body['model'] == self.names[0]
        if chat and (self.language.digest == task.DIGEST or not self.language.conversations):
            raise Refused('model: it was trained without conversations: use /v1/completions')
        if not chat and not plain:
            raise Refused('model: Markovian RSA answers conversations: use /v1/chat/completions')
        return functools.partial(self.respond, validated(body, TEXT if not chat else CHAT if plain else RSA), chat)

    def app(self):
        """Return the ASGI application."""
        starlette, requests = package('starlette.applications'), package('starlette.requests')
        Route, HTTPException = package('starlette.routing').Route, package('starlette.exceptions').HTTPException
        self.JSONResponse = package('starlette.responses').JSONResponse

        async def refuse(_, error):
            if isinstance(error, HTTPException):                # of starlette: an unknown path or method
                error = Refused(f'{error.detail}: see the first lines of runtime/serve.py', error.status_code)
            error = error if isinstance(error, Refused) else Refused(str(error))
            return self.JSONResponse(error.body, error.status, {'Retry-After': '2'} if error.status == 429 else None)
        routes = [Route(f'/v1/{path}', self.complete, methods=['POST']) for path in ('chat/completions', 'completions')]
        return starlette.Starlette(
            routes=[Route('/v1/models', self.models), *routes],
            exception_handlers=dict.fromkeys([ValueError, HTTPException, requests.ClientDisconnect], refuse))


def main(config, settings):
    uvicorn, listener = package('uvicorn'), socket.socket(socket.AF_INET6 if ':' in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:                                                        # before the model, which takes longer
        listener.bind((config.host, config.port))
    except OSError as error:
        raise ValueError(f'{config.host}:{config.port}: {error.strerror}: choose another --port or --host') from None
    service = Service(*pretrained.load(config.ckpt, pick_device(config.device)), config, settings)
    server = uvicorn.Server(uvicorn.Config(service.app(), log_level='warning', access_log=False, ws='none',
                                           timeout_graceful_shutdown=5))
    stop, engine = server.handle_exit, service.engine           # the engine ends all replies, then uvicorn can stop
    server.handle_exit = lambda *signal: setattr(engine, 'stopping', True) or stop(*signal)
    threading.Thread(target=engine.run).start()
    print(f'{" and ".join(service.names)} at http://{config.host}:{listener.getsockname()[1]}/v1, a cache of '
          f'{engine.capacity:,} tokens; Ctrl-C stops', flush=True)
    try:
        server.run([listener])
    except KeyboardInterrupt:
        pass
    finally:
        engine.inbox.put(None)


if __name__ == '__main__':
    with one_line_errors('runtime.serve', 'try a smaller --cache_gib'):
        main(*read(sys.argv[1:], ServeConfig, rsa.RSASettings))
