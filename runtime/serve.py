"""An OpenAI-compatible server on one's own machine: `python -m runtime.serve --ckpt=RUN_OR_RELEASED_FOLDER`.

    the main thread: HTTP (uvicorn, starlette)              one more thread, the only one that runs the model
      api.py: validation, text          -- sequences -->     engine.py: continuous batching
                                        <-- tokens ----

GET /v1/models, POST /v1/chat/completions and /v1/completions, whole or as server-sent events. With a seed, the tokens
are those of sample.generate([prompt] * n), up to rounding, whatever else is served.

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
import socket
import sys
import threading
import time
from dataclasses import dataclass, fields, replace

import decode
import rsa
from configurator import check_ranges, one_line_errors, package, read
from model import sizes
from runtime import pretrained
from runtime.api import CHAT, TEXT, Job, Refused, Reply, format_logprobs, messages_of, validated
from runtime.device import pick_device
from runtime.engine import Engine, Sequence
from sample import SamplingOptions, check_prompts, sample_from_logits
from tasks import problems
from tasks.answers import final_answer
from tasks.loops import task
from tasks.policy import Policy
from validate import parse_json


@dataclass
class ServeConfig:                  # more flags, the defaults of NAME-rsa: RSASettings
    ckpt: str = 'runs/demo'         # a run folder of train.py, or a folder in the released layout
    host: str = '127.0.0.1'         # 0.0.0.0: reachable from other machines
    port: int = 8000                # 0: any free port
    cache_gib: float = 4.0          # of all KV caches; what does not fit waits. Copies may briefly need as much again
    batch: int = 64                 # most sequences in the batch
    queue: int = 256                # most requests, running and waiting; others are refused with status 429
    chunk: int = 512                # prompt tokens that are read between two steps of the batch
    max_new_tokens: int = 4096      # of a chat reply without max_tokens; at most what the context has left
    device: str = 'auto'

    def __post_init__(self):
        check_ranges(self, port=(0, 65535), cache_gib=(1e-6, None), batch=(1, None), queue=(1, None), chunk=(1, None),
                     max_new_tokens=(1, None))


MAX_BYTES = 4 * 2**20               # of a request
SAMPLING = 'temperature', 'top_p', 'top_k', 'min_p'
RSA = {'rsa': {f'{setting.name}?': setting.type for setting in fields(rsa.RSASettings)}}       # a parameter's schema
SETTINGS = *SAMPLING, *(setting.name for setting in fields(rsa.RSASettings))


class Service:
    """The API of one model. parts(job): an async generator of (index of the choice, field, text, logprobs, finish)."""

    def __init__(self, model, language, config, settings):
        self.model, self.language, self.config, self.settings = model, language, config, settings
        bytes_per_token = sizes(model.config)['kv_bytes'] * model.dtype.itemsize // 2       # sizes: of bf16
        self.engine = Engine(model, decode.folded(model), sample_from_logits, language.stop,
                             int(config.cache_gib * 2**30 / bytes_per_token), config.batch, config.chunk)
        self.name, self.started, self.open = os.path.basename(os.path.abspath(config.ckpt)), int(time.time()), 0
        self.names, self.is_loops = [self.name, f'{self.name}-rsa'], language.digest == task.DIGEST

    def chat_prompt(self, job, messages):
        return self.language.prompt(messages, job.body.get('chat_template_kwargs', {}).get('enable_thinking', True))

    def plain(self, job, options):
        """Make the sequences of a request. Return its parts."""
        body, n = job.body, job.body.get('n', 1)
        if 'rsa' in body:
            raise Refused(f'rsa has no effect on {self.name}: leave it out, or name the model {self.names[1]}', 'rsa')
        prompt = self.chat_prompt(job, messages_of(body)) if job.chat else body['prompt']
        prompts = [prompt] if isinstance(prompt, str) or prompt and isinstance(prompt[0], int) else prompt
        if not 0 < len(prompts) * n <= 128:
            raise Refused(f'{len(prompts)} prompts times n = {n}: ask for 1 to 128 choices', 'n')
        top = body.get('logprobs') if not job.chat else body.get('top_logprobs', 0) if body.get('logprobs') else None
        for prompt in prompts:
            if isinstance(prompt, str):
                prompt = self.language.bos + self.language.encode(prompt)
            room = max(1, self.model.config.context - len(prompt))
            limit = job.limit or min(room, self.config.max_new_tokens if job.chat else 16)      # 16: as in the API
            self.check_room(job, prompt, limit)
            job.prompt_tokens += len(prompt)
            job.sequences += [Sequence(prompt, limit, options, len(job.sequences) + i, job.queue.put_nowait, top)
                              for i in range(n)]
        return self.plain_parts(job)

    def check_room(self, job, prompt, limit):
        try:
            check_prompts(self.model.config, [prompt], limit, [0])
        except ValueError as error:
            raise Refused(str(error), 'messages' if job.chat else 'prompt', code='context_length_exceeded') from None
        if len(prompt) + limit > self.engine.capacity:
            raise Refused(f'{len(prompt) + limit:,} tokens do not fit into the cache of {self.engine.capacity:,}: '
                          'lower max_tokens, or start the server with a larger --cache_gib', 'max_tokens')

    async def plain_parts(self, job):
        replies = [Reply(self.language, job.body['stop'], s.prompt, job.chat) for s in job.sequences]
        running = len(replies)
        for s in job.sequences:
            self.engine.inbox.put(s)
        while running:
            s, token, logprobs, finish = await job.queue.get()
            reply = replies[s.index]
            if reply.finish:                                    # by a stop string, which the engine does not know
                continue
            if token is None:
                raise Refused(finish, status=500)
            name, text, logprobs = reply.add(token, logprobs, finish)
            if reply.finish:
                s.cancelled, running = True, running - 1
                job.tokens, job.reasoning = job.tokens + reply.tokens, job.reasoning + reply.reasoning
            if text or logprobs or reply.finish or name != 'content':         # an empty reasoning is sent, too
                yield s.index, name, text, logprobs, reply.finish

    def markovian(self, job, options):
        """Start Markovian RSA in a thread of its own. Return its parts."""
        for key in 'n', 'stop', 'logprobs':
            if job.body.get(key) and (key, job.body[key]) != ('n', 1):
                raise Refused(f'{key} has no effect on {self.names[1]}: leave it out', key)
        given = {'seed': options.seed, 'final_budget': job.limit or self.settings.final_budget}
        settings = replace(self.settings, **given | job.body.get('rsa', {}))
        language = self.language
        policy = functools.partial(Policy, self.model, None, language.stop, language.encode, language.decode)
        if job.chat:
            *before, last = messages_of(job.body)
            if last['role'] != 'user':
                raise Refused('the last message has another role than user: end with a question', 'messages')
            question, settings = last['content'], settings.resolved()
            message = lambda *parts: last | {'content': problems.message(*parts, None, settings.compact)}
            policy = policy(lambda *parts: self.chat_prompt(job, [*before, message(*parts)]), language.answer,
                            language.thought)
        elif self.is_loops:
            question = str(job.body['prompt'])
            steps = task.parse(question).steps
            settings = settings.resolved(task.rounds_needed(steps, settings.budget or 41), 41, 10, 41)      # as rsa.py
            policy = policy(task.build_prompt, task.answer_of, list)
        else:
            raise Refused('Markovian RSA answers conversations: use /v1/chat/completions', 'model')
        problems.check_room(policy, [question], settings)
        prompt = policy.build_prompt(language.encode(question), [[0] * settings.tail] * settings.candidates)
        self.check_room(job, prompt, max(settings.budget, settings.final_budget))
        threading.Thread(target=self.run_rsa, args=(job, question, policy, settings, options), daemon=True).start()
        return self.rsa_parts(job)

    async def rsa_parts(self, job):
        finish = None
        while not finish:
            part = await job.queue.get()
            if isinstance(part, Exception):                     # such as a Sequence that failed
                raise Refused(str(part), status=500)
            finish = part[-1]
            yield part

    def run_rsa(self, job, question, policy, settings, options):
        """Run Markovian RSA, as Policy.sampler would, and put its parts into the job's queue."""
        put = lambda part: self.call(job.queue.put_nowait, part)
        seeds = itertools.count(options.seed * 1_000_003)

        def generate(prompts, limit):
            events, outputs, running = queue.SimpleQueue(), [[] for _ in prompts], len(prompts)
            given = replace(options, seed=next(seeds))
            job.sequences = [Sequence(prompt, limit, given, i, events.put) for i, prompt in enumerate(prompts)]
            for s in job.sequences:
                s.cancelled = job.cancelled
                self.engine.inbox.put(s)
            while running:
                s, token, _, finish = events.get()
                if token is None:
                    raise ValueError(finish)
                outputs[s.index].append(token)
                running -= finish is not None
            job.prompt_tokens += sum(map(len, prompts))
            job.tokens += sum(map(len, outputs))
            return outputs
        try:
            for t, (now,) in enumerate(rsa.rounds_of([policy.encode(question)], generate, policy, settings)):
                answers = [c.answer and final_answer(policy.decode(c.answer)) for c in now.candidates]
                put((0, 'reasoning_content', f'round {t} of {settings.rounds}: {len([*filter(None, answers)])} of '
                     f'{len(answers)} candidates have an answer; {now.tokens:,} tokens\n', [], None))
            best = now.candidates[answers.index(problems.majority_vote(answers))]
            job.reasoning = job.tokens - len(best.answer or [])
            put((0, 'reasoning_content', policy.decode(policy.thought_of(best.output)), [], None))
            put((0, 'content', policy.decode(best.answer or []), [], 'stop' if best.answer else 'length'))
        except Exception as error:                              # also if the client has left
            put(error)

    async def respond(self, job, scope, receive, send):
        """Answer a request: an ASGI application."""
        if self.open >= self.config.queue:
            raise Refused(f'{self.open} requests are running or waiting: try again', status=429, code='queue_full')
        self.open += 1
        watcher = asyncio.create_task(job.watch(receive))
        try:
            options = SamplingOptions(**{key: job.body[key] for key in SAMPLING if key in job.body},
                                      seed=job.body.get('seed', random.getrandbits(31)))
            start = self.plain if job.body['model'] == self.name else self.markovian
            parts = await asyncio.to_thread(start, job, options)        # in a thread: tokenizing may take long
            kind = 'chat.completion' + '.chunk' * bool(job.body.get('stream')) if job.chat else 'text_completion'
            head = {'id': f'{random.getrandbits(64):x}', 'object': kind, 'created': int(time.time()),
                    'model': job.body['model']}
            if job.body.get('stream'):
                await self.stream(job, parts, head, send)
            else:
                await self.JSONResponse(await self.whole(job, parts, head))(scope, receive, send)
        finally:
            watcher.cancel()
            job.cancel()
            self.open -= 1

    async def whole(self, job, parts, head):
        choices = {}
        async for index, name, text, new, finish in parts:
            texts, logprobs, _ = choices.get(index, ({'content': ''}, [], None))
            choices[index] = texts | {name: texts.get(name, '') + text}, logprobs + new, finish
        return head | {'usage': job.usage(), 'choices': [
            self.choice(job, 'message', index, {'role': 'assistant'} | texts, logprobs, finish)
            for index, (texts, logprobs, finish) in sorted(choices.items())]}

    def choice(self, job, kind, index, texts, logprobs, finish):
        """Return a choice of a reply, or what is new in it. texts: {field: text}."""
        texts = {kind: texts} if job.chat else {'text': texts.get('content', '')}
        return {'index': index, **texts, 'finish_reason': finish,
                'logprobs': format_logprobs(self.language, logprobs, job.chat) if logprobs else None}

    async def stream(self, job, parts, head, send):
        """Send a reply as server-sent events."""
        event = lambda content: send({'type': 'http.response.body', 'more_body': True,
                                      'body': b'data: %s\n\n' % json.dumps(content).encode()})
        await send({'type': 'http.response.start', 'status': 200, 'headers': [
            (b'content-type', b'text/event-stream'), (b'cache-control', b'no-cache')]})
        started = set()
        try:
            async for index, name, text, logprobs, finish in parts:
                texts = {'role': 'assistant'} if index not in started else {}
                texts |= {name: text} if text or name != 'content' else {}
                started.add(index)
                await event(head | {'choices': [self.choice(job, 'delta', index, texts, logprobs, finish)]})
            if job.body.get('stream_options', {}).get('include_usage'):
                await event(head | {'choices': [], 'usage': job.usage()})
        except Refused as error:                                # the status was sent long ago
            await event(error.body)
        await send({'type': 'http.response.body', 'body': b'data: [DONE]\n\n'})

    def authorize(self, request):
        key, given = os.environ.get('NANOZAYA_API_KEY'), request.headers.get('authorization', '')
        if key and not hmac.compare_digest(given.encode('latin-1'), f'Bearer {key}'.encode()):
            raise Refused('the API key is missing or wrong: send the NANOZAYA_API_KEY of the server', status=401)

    async def models(self, request):
        self.authorize(request)
        cards = [{'id': name, 'object': 'model', 'created': self.started, 'owned_by': 'nanozaya',
                  'max_model_len': self.model.config.context} for name in self.names]
        return self.JSONResponse({'object': 'list', 'data': cards})

    async def complete(self, request):
        """Read and validate a request. Return the ASGI application that answers it."""
        self.authorize(request)
        if request.headers.get('content-type', '').partition(';')[0].strip().lower() != 'application/json':
            raise Refused('the Content-Type must be application/json', status=415)
        data, chat = bytearray(), 'chat' in request.url.path
        async for part in request.stream():
            data += part
            if len(data) > MAX_BYTES:
                raise Refused(f'the request has more than {MAX_BYTES:,} bytes: shorten it', status=413)
        body = validated(parse_json(bytes(data), 'the request', {str: object}), RSA | (CHAT if chat else TEXT))
        if body['model'] not in self.names:
            raise Refused(f'there is no model {body["model"][:60]!r}: name {" or ".join(self.names)}', 'model', 404,
                          'model_not_found')
        if chat and (self.is_loops or not self.language.conversations):
            raise Refused('this model was trained without conversations: use /v1/completions', 'model')
        return functools.partial(self.respond, Job(body, chat))

    @contextlib.asynccontextmanager
    async def lifespan(self, _):
        """Run the engine's thread."""
        self.call = asyncio.get_running_loop().call_soon_threadsafe
        deliver = lambda events: [event[0].put(event) for event in events]
        thread = threading.Thread(target=self.engine.run, args=[lambda events: self.call(deliver, events)], daemon=True)
        thread.start()
        yield
        for _ in range(2):                                      # see Engine.run
            self.engine.inbox.put(None)
        await asyncio.to_thread(thread.join)

    def app(self):
        """Return the ASGI application."""
        Route, HTTPException = package('starlette.routing').Route, package('starlette.exceptions').HTTPException
        self.JSONResponse = package('starlette.responses').JSONResponse

        async def refuse(_, error):
            if isinstance(error, HTTPException):                # of starlette: an unknown path or method
                error = Refused(f'{error.detail}: see the first lines of runtime/serve.py', status=error.status_code)
            elif not isinstance(error, Refused):                # of a setting, whose name is the first word
                error = Refused(str(error), str(error).partition(' ')[0] if str(error).startswith(SETTINGS) else None)
            return self.JSONResponse(error.body, error.status, {'Retry-After': '2'} if error.status == 429 else None)
        routes = [Route(f'/v1/{path}', self.complete, methods=['POST']) for path in ('chat/completions', 'completions')]
        left = package('starlette.requests').ClientDisconnect
        return package('starlette.applications').Starlette(
            routes=[Route('/v1/models', self.models), *routes], lifespan=self.lifespan, exception_handlers={
                ValueError: refuse, HTTPException: refuse, left: refuse})


def main(config, settings):
    uvicorn, listener = package('uvicorn'), socket.socket(socket.AF_INET6 if ':' in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:                                                        # before the model, which takes longer
        listener.bind((config.host, config.port))
    except OSError as error:
        raise ValueError(f'{config.host}:{config.port}: {error.strerror}: choose another --port or --host') from None
    model, language = pretrained.load(config.ckpt, pick_device(config.device))
    service = Service(model, language, config, settings)
    server = uvicorn.Server(uvicorn.Config(service.app(), log_level='warning', access_log=False, ws='none',
                                           timeout_graceful_shutdown=5))
    stop = server.handle_exit

    def handle_exit(*signal):                                   # the engine ends all replies, then uvicorn can stop
        service.engine.inbox.put(None)                          # a SimpleQueue may be used in a signal handler
        stop(*signal)
    server.handle_exit = handle_exit
    print(f'{" and ".join(service.names)} at http://{config.host}:{listener.getsockname()[1]}/v1, a cache of '
          f'{service.engine.capacity:,} tokens; Ctrl-C stops', flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run([listener])


if __name__ == '__main__':
    with one_line_errors('runtime.serve', 'try a smaller --cache_gib'):
        main(*read(sys.argv[1:], ServeConfig, rsa.RSASettings))
