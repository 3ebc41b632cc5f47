"""The server: continuous batching compared with generation alone; the API with the real `openai` client over loopback.

`SOAK=300 python -m pytest -q tests/test_serve.py -k soak` sends 300 requests instead of 40."""
import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from hypothesis import given, strategies as st

import decode
import rsa
from common import ENV, ROOT, run_script, tiny_model
from data.language import language_of
from data.tokenizer import train_bpe
from runtime.engine import Engine, Sequence
from runtime.pretrained import load
from sample import SamplingOptions, generate, sample_from_logits
from tasks.loops import task
from tasks.policy import load_policy
from test_client import folder                                                  # noqa: F401, a fixture

openai, uvicorn = pytest.importorskip('openai'), pytest.importorskip('uvicorn')
pytest.importorskip('starlette')
from runtime import serve                                                       # noqa: E402

KEY = 'sk-a-secret'


# ---- the engine ----

@pytest.fixture(scope='module')
def model():
    return tiny_model(context=128)


def sequence(prompt, limit, options=SamplingOptions(), index=0, put=None, cancelled=lambda: False):
    return Sequence(prompt, limit, options, index, put, cancelled)


def engine_of(model, stop=(), capacity=10**6, batch=64, chunk=64):
    return Engine(model, decode.folded(model), sample_from_logits, stop, capacity, batch, chunk)


def advance(engine):
    assert not engine.inbox.empty() or engine.waiting or engine.reading or engine.active         # else it would wait
    with torch.no_grad():
        engine.receive()
        engine.advance()
    group = engine.active + engine.reading
    assert len(group) <= engine.batch and len(group) * max([s.size for s in group], default=0) <= engine.capacity
    assert bool(engine.active) == (engine.cache is not None)
    if engine.cache:
        assert len(engine.active) * engine.cache.capacity <= engine.capacity


options = st.builds(SamplingOptions, temperature=st.sampled_from([0, 1.0, 0.7]), top_k=st.sampled_from([0, 5]),
                    top_p=st.sampled_from([1.0, 0.9]), seed=st.integers(0, 9))
requests = st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 12), options,
                              st.integers(0, 12), st.sampled_from([None] * 3 + [0, 2, 5])), min_size=1, max_size=9)


@given(requests, st.sampled_from([64, 100, 1000]), st.integers(1, 5), st.sampled_from([1, 3, 64]))
def test_the_tokens_of_a_sequence_are_its_own_whoever_joins_and_leaves(model, requests, capacity, batch, chunk):
    """requests: (prompt, limit, options, the step at which it comes, how many tokens until it is cancelled)."""
    engine, stop, found, running = engine_of(model, {7, 8}, capacity, batch, chunk), {7, 8}, {}, []
    for i, (prompt, limit, chosen, _, patience) in enumerate(requests):
        def put(event, i=i, patience=patience):
            found.setdefault(i, []).append(event[1::2])         # token, finish
        running.append(sequence(prompt, limit, chosen, 0, put, lambda i=i, patience=patience: (
            patience is not None and len(found.get(i, ())) >= patience)))
    for t in range(1000):
        for s, (*_, at, _) in zip(running, requests):
            if at == t:
                engine.inbox.put(s)
        if t > 12 and all(s.finish for s in running) and not engine.active:
            break
        if not engine.inbox.empty() or engine.waiting or engine.reading or engine.active:
            advance(engine)
    for i, (prompt, limit, chosen, _, patience) in enumerate(requests):
        expected, = generate(model, [prompt], limit, chosen, stop=stop)
        tokens = [token for token, _ in found[i] if token is not None]
        if found[i][-1][1] == 'cancelled':
            assert tokens == expected[:len(tokens)] and len(tokens) == patience
        else:
            assert patience is None or len(expected) <= patience
            assert tokens == expected and found[i][-1][1] == ('stop' if expected[-1] in stop else 'length')
        assert all(finish is None for _, finish in found[i][:-1])
    assert not (engine.waiting or engine.reading or engine.active or engine.cache or engine.prompt_cache)


def test_others_get_a_token_per_step_while_a_long_prompt_is_read(model):
    engine, seen = engine_of(model, chunk=8), []
    engine.inbox.put(sequence([1], 40, SamplingOptions(), 0, seen.append))
    advance(engine)
    engine.inbox.put(sequence([2] * 80, 1, SamplingOptions(), 0, seen.append))
    for step in range(1, 10):
        advance(engine)
        assert len([event for event in seen if event[0].prompt == [1]]) == step + 2 - (step > 20)
        assert engine.reading and engine.prompt_cache.lengths == [8 * step]
    advance(engine)
    assert not engine.reading and seen[-2][0].prompt == [2] * 80 or seen[-1][0].prompt == [2] * 80


def test_a_long_sequence_leaves_no_long_cache_to_short_ones(model):
    engine, ends = engine_of(model, capacity=210), []
    put = lambda event: ends.append(event[3]) if event[3] else None
    engine.inbox.put(sequence([1] * 100, 2, SamplingOptions(), 0, put))
    for i in range(8):
        engine.inbox.put(sequence([2, 3], 20, SamplingOptions(), i, put))
    most = 0
    while len(ends) < 9:
        advance(engine)                                         # it asserts that the caches stay within 210 tokens
        most = max(most, len(engine.active))
    assert ends == ['length'] * 9 and most == 8


def test_the_choices_of_a_request_read_their_prompt_once(model, monkeypatch):
    calls, forward = [], type(model).forward
    monkeypatch.setattr(type(model), 'forward', lambda self, *args, **kw: calls.append(0) or forward(self, *args, **kw))
    engine, found = engine_of(model), [[] for _ in range(5)]
    for i in range(5):
        engine.inbox.put(sequence([1, 2, 3], 6, SamplingOptions(seed=4), i, lambda event: found[event[0].index].append(
            event[1])))
    for _ in range(5):                                          # the first has two tokens, the prompt's and a step's
        advance(engine)
    assert len(calls) == 1 and found == generate(model, [[1, 2, 3]] * 5, 6, SamplingOptions(seed=4))


def test_a_failed_step_loses_its_sequences_only(model):
    engine, events = engine_of(model, capacity=40, batch=1), []
    step, failures = engine.step, [RuntimeError('out of memory')]

    def failing(*args):
        if failures:
            raise failures.pop()
        return step(*args)
    engine.step = failing
    for i in range(2):
        engine.inbox.put(sequence([1, 2], 4, index=i, put=events.append))
    thread = threading.Thread(target=engine.run)
    thread.start()
    deadline = time.time() + 20
    for n in 2, 3:
        while len([e for e in events if e[3]]) < n and time.time() < deadline:
            time.sleep(0.01)
        engine.stopping = True
        engine.inbox.put(sequence([1], 4, index=7, put=events.append) if n == 2 else None)
    thread.join(20)
    assert not thread.is_alive()
    ends = {e[0].index: e[3] for e in events if e[3]}
    assert ends == {0: 'the model failed: send fewer or shorter requests', 1: 'length', 7: 'the server is stopping'}


def test_broken_weights_are_an_error_of_the_request():
    broken, seen = tiny_model(), []
    with torch.no_grad():
        broken.norm.weight.fill_(float('nan'))
    engine = engine_of(broken)
    engine.inbox.put(sequence([1], 4, SamplingOptions(), 0, seen.append))
    advance(engine)
    assert 'not finite' in seen[0][3] and not engine.active


# ---- text ----

@pytest.fixture(scope='module')
def run_language():
    return language_of(train_bpe(['so much, so far, so good'] * 3, 300), 'a run')


said = st.text('ab漢🙂 \n', max_size=12)


@given(st.lists(said, max_size=6), st.lists(st.text('ab漢 ', min_size=1, max_size=4), max_size=3), st.data())
def test_nothing_after_a_stop_string_is_ever_sent_and_all_before_it_is(run_language, texts, stops, data):
    tokens = [token for text in texts for token in (
        run_language.encode(text) if data.draw(st.booleans()) else [t for b in text.encode() for t in [
            run_language.encode_with_special(bytes([b]).decode('latin-1'))[0]] if b < 128])]
    reply, sent, n = serve.Reply(run_language, stops, [], False), '', 0
    for n, token in enumerate(tokens, 1):
        sent += reply.add(token, 'length' if n == len(tokens) else None)[1]
        whole = run_language.decode(tokens[:n])
        assert whole.startswith(sent) or '\ufffd' in whole
        if reply.finish == 'stop':
            break
    whole = run_language.decode(tokens[:n])
    ends = [whole.index(stop) for stop in stops if stop in whole]
    assert sent == (whole[:min(ends)] if ends else whole) and bool(ends) == (reply.finish == 'stop')


def test_a_stop_string_may_span_tokens_and_characters_may_too(run_language):
    tokens = [token for text in ('漢字 and', ' E', 'N', 'D 漢') for token in run_language.encode(text)]
    reply, sent = serve.Reply(run_language, ['END'], [], False), []
    for token in tokens:
        sent.append(reply.add(token, None)[1])
        if reply.finish:
            break
    assert ''.join(sent) == '漢字 and ' and reply.finish == 'stop' and '' in sent


@pytest.mark.parametrize('prompt, reply, thought, answer', [
    ('<think>', 'a</think>b', 'a', 'b'), ('', '<think>a</think>b', 'a', 'b'), ('', 'a</think>b', '', 'a</think>b'),
    ('<think></think>', 'ab', '', 'ab'), ('<think>', 'a</think>b</think>c', 'a', 'b</think>c'),
    ('<think>', 'a', 'a', ''), ('', 'a<think>b', '', 'a<think>b'), ('<think>', 'aX</think>bX', 'aX', 'b')])
def test_reasoning_is_apart_from_the_answer(run_language, prompt, reply, thought, answer):
    encode = run_language.encode_with_special
    tokens, texts = encode(reply), {'reasoning_content': '', 'content': ''}
    one = serve.Reply(run_language, ['X'], encode(prompt), True)
    for i, token in enumerate(tokens):
        name, text = one.add(token, 'length' if i == len(tokens) - 1 else None)
        texts[name] += text
    assert texts == {'reasoning_content': thought, 'content': answer}


# ---- the server ----

@contextlib.contextmanager
def serving(model, language, name='tiny', settings=rsa.RSASettings(), **flags):
    """Serve a model in this process. Yield its Service, which has the `url` and an `openai` client."""
    service = serve.Service(model, language, serve.ServeConfig(ckpt=name, **flags), settings)
    listener = socket.socket()
    listener.bind(('127.0.0.1', 0))
    server = uvicorn.Server(uvicorn.Config(service.app(), log_level='warning', ws='none', timeout_graceful_shutdown=5))
    threads = [threading.Thread(target=server.run, args=[[listener]]), threading.Thread(target=service.engine.run)]
    for thread in threads:
        thread.start()
    service.port = listener.getsockname()[1]
    service.url = f'http://127.0.0.1:{service.port}/v1'
    deadline = time.time() + 30
    while not server.started:
        assert time.time() < deadline
        time.sleep(0.01)
    try:
        with openai.OpenAI(base_url=service.url, api_key=KEY, max_retries=0, timeout=60) as service.client:
            yield service
    finally:
        service.engine.stopping = server.should_exit = True
        threads[0].join(30)
        service.engine.inbox.put(None)
        threads[1].join(30)
        assert not any(thread.is_alive() for thread in threads)


@pytest.fixture(scope='module')
def tiny(folder):                                                               # noqa: F811
    with serving(*load(folder)) as service:
        yield service


def assert_idle(service, seconds=20):
    """All sequences have left, and all requests have ended."""
    engine, deadline = service.engine, time.time() + seconds
    while engine.waiting or engine.reading or engine.active or engine.cache or service.open:
        assert time.time() < deadline, (engine.waiting, engine.reading, engine.active, service.open)
        time.sleep(0.01)


def post(url, data, **headers):
    """POST bytes -> (status, JSON, headers)."""
    request = urllib.request.Request(url, data, {'Content-Type': 'application/json'} | headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
            return reply.status, json.load(reply), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def lone(service, prompt, limit, n=1, **given):
    """The texts and the lengths of the choices, generated without the server."""
    language = service.language
    outputs = generate(service.model, [prompt] * n, limit, SamplingOptions(**given), stop=language.stop)
    return [language.decode([token for token in output if token not in language.stop]) for output in outputs], [
        len(output) for output in outputs]


def test_32_requests_at_once_equal_their_lone_runs(tiny):
    rng = random.Random(0)
    asked = [dict(prompt=[rng.randrange(5, 300) for _ in range(rng.choice([1, 3, 40, 600]))], n=rng.choice([1, 1, 3]),
                  max_tokens=rng.choice([1, 8, 60]), temperature=rng.choice([0, 1, 0.7]), seed=rng.randrange(2**40),
                  top_p=rng.choice([1, 0.9]), stream=rng.random() < 0.5, extra_body={'top_k': rng.choice([0, 7])})
             for _ in range(32)]

    async def ask(client, body):
        reply = await client.completions.create(model='tiny', **body, **(
            {'stream_options': {'include_usage': True}} if body['stream'] else {}))
        if not body['stream']:
            return [choice.text for choice in reply.choices], [c.finish_reason for c in reply.choices], reply.usage
        texts, reasons = [''] * body['n'], [None] * body['n']
        async for chunk in reply:
            for c in chunk.choices:
                assert reasons[c.index] is None
                texts[c.index], reasons[c.index] = texts[c.index] + c.text, c.finish_reason
        return texts, reasons, chunk.usage

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=tiny.url, api_key=KEY, max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, body) for body in asked))
    for body, (texts, reasons, usage) in zip(asked, asyncio.run(ask_all())):
        expected, lengths = lone(tiny, body['prompt'], body['max_tokens'], body['n'], temperature=body['temperature'],
                                 top_p=body['top_p'], seed=body['seed'], top_k=body['extra_body']['top_k'])
        assert texts == expected
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(body['prompt']), sum(lengths))
        assert all(reason == 'stop' or n == body['max_tokens'] for reason, n in zip(reasons, lengths))
    assert_idle(tiny)


@pytest.mark.parametrize('think', [True, False])
def test_a_chat_reply_has_its_reasoning_apart(tiny, think):
    messages = [{'role': 'developer', 'content': 'Be brief.'},
                {'role': 'user', 'content': [{'type': 'text', 'text': '7 * 6'}, {'type': 'text', 'text': '?'}]}]
    body = dict(model='tiny', messages=messages, max_completion_tokens=60, seed=3, temperature=0.3,
                extra_body={'chat_template_kwargs': {'enable_thinking': think}})
    prompt = tiny.language.prompt([{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '7 * 6?'}],
                                  think)
    (expected,), (n,) = lone(tiny, prompt, 60, temperature=0.3, seed=3)
    thought, closed, answer = expected.partition('</think>')
    reply = tiny.client.chat.completions.create(**body)
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == ('length' if n == 60 else 'stop')
    if think:
        assert closed and thought and answer and n < 60
        assert (message.reasoning_content, message.content) == (thought, answer)
    else:
        assert message.content == expected and not hasattr(message, 'reasoning_content')
    assert reply.usage.completion_tokens == n and reply.usage.prompt_tokens == len(prompt)
    fields, last = {'reasoning_content': '', 'content': ''}, None
    for chunk in tiny.client.chat.completions.create(**body, stream=True):
        delta, last = chunk.choices[0].delta, chunk.choices[0].finish_reason
        for name in fields:
            fields[name] += getattr(delta, name, None) or ''
    assert last == reply.choices[0].finish_reason and fields == {'content': message.content,
                                         'reasoning_content': getattr(message, 'reasoning_content', '')}


def test_logprobs_are_the_model_s(tiny):
    prompt = tiny.language.prompt([{'role': 'user', 'content': 'Hi'}], False)
    body = dict(model='tiny', messages=[{'role': 'user', 'content': 'Hi'}], max_tokens=6, temperature=0, logprobs=True,
                top_logprobs=3, extra_body={'chat_template_kwargs': {'enable_thinking': False}})
    found = tiny.client.chat.completions.create(**body).choices[0].logprobs.content
    streamed = [entry for chunk in tiny.client.chat.completions.create(**body, stream=True)
                for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])]
    output, = generate(tiny.model, [prompt], 6, SamplingOptions(temperature=0), stop=tiny.language.stop)
    logits, _ = tiny.model(torch.tensor([prompt + output]))
    expected = logits[0, len(prompt) - 1:-1].log_softmax(-1)
    output = [token for token in output if token not in tiny.language.stop]
    assert [entry.token for entry in found] == [tiny.language.decode([token]) for token in output] and found == streamed
    for entry, row, token in zip(found, expected, output):
        values = row.topk(3).values
        assert abs(entry.logprob - row[token]) < 1e-4 and bytes(entry.bytes).decode() == entry.token
        assert torch.allclose(torch.tensor([top.logprob for top in entry.top_logprobs]), values, atol=1e-4)
    old = tiny.client.completions.create(model='tiny', prompt=prompt, max_tokens=6, temperature=0, logprobs=3)
    old = old.choices[0].logprobs
    assert not tiny.client.completions.create(model='tiny', prompt=prompt, max_tokens=6).choices[0].logprobs
    assert old.tokens == [entry.token for entry in found]
    assert old.token_logprobs == pytest.approx([entry.logprob for entry in found], abs=1e-4)


def test_a_stop_string_ends_a_reply_and_its_sequence(tiny):
    prompt, whole = [9, 9, 9], lone(tiny, [9, 9, 9], 400, temperature=0)[0][0]
    stop = whole[3:6]
    for stream in False, True:
        reply = tiny.client.completions.create(model='tiny', prompt=prompt, max_tokens=400, temperature=0, stop=stop,
                                               stream=stream)
        chunks = list(reply) if stream else [reply]
        assert ''.join(chunk.choices[0].text for chunk in chunks) == whole[:whole.index(stop)]
        assert chunks[-1].choices[0].finish_reason == 'stop'
        assert_idle(tiny)


def test_a_choice_that_a_stop_string_ends_leaves_before_the_others(endless):
    body = dict(model='tiny', prompt=[9], max_tokens=300, temperature=1, seed=0, n=2)
    (first, second), _ = lone(endless, [9], 300, 2, temperature=1, seed=0)
    stop = next(first[i:i + 4] for i in range(5, 50) if first[i:i + 4] not in second)
    alone = 0
    for chunk in endless.client.completions.create(**body, stop=stop, stream=True):
        alone += len(endless.engine.active) == 1
        assert chunk.choices[0].index or first[:first.index(stop)].find(chunk.choices[0].text) >= 0
    assert alone > 100


@pytest.mark.parametrize('path, body, status, param, words', [
    ('chat', b'{"model": "tiny", ', 400, None, 'not valid JSON'), ('chat', b'[1]', 400, None, 'must be an object'),
    ('chat', b'\xff', 400, None, 'not valid Unicode'), ('chat', b'[' * 200_000, 400, None, 'nested'),
    ('chat', b'{}', 400, 'model', 'is missing'), ('chat', b'{"model": "tiny"}', 400, 'messages', 'is missing'),
    ('chat', {'messages': []}, 400, 'messages', 'missing'),
    ('chat', {'tools': [1]}, 400, 'tools', 'tools is not supported by tiny: leave it out'),
    ('chat', {'messages': [{'role': 'tool', 'content': 'a'}]}, 400, 'messages', 'role'),
    ('chat', {'temperature': -1}, 400, 'temperature', 'between'), ('chat', {'top_p': 'x'}, 400, 'top_p', 'number'),
    ('chat', {'temperature': 1e999}, 400, None, ''), ('chat', {'n': 0}, 400, 'n', '1 to 128'),
    ('chat', {'n': True}, 400, 'n', '1 to 128'), ('chat', {'seed': 2**63}, 400, 'seed', 'whole number'),
    ('chat', {'max_tokens': 5000}, 400, 'max_tokens', 'context of 1,024'),
    ('chat', {'stop': ['']}, 400, 'stop', 'characters'),
    ('chat', {'chat_template_kwargs': {'x': 1}}, 400, 'chat_template_kwargs', 'x is not supported'),
    ('chat', {'rsa': {'population': 2}}, 400, 'rsa', 'not supported by tiny:'),
    ('chat', {'model': 'gpt-9'}, 404, 'model', 'tiny or tiny-rsa'), ('text', {'prompt': []}, 400, 'prompt', 'missing'),
    ('text', {'prompt': [[1]]}, 400, 'prompt', 'a list'), ('text', {'prompt': [300]}, 400, 'prompt', 'of 300'),
    ('text', {'prompt': [-1]}, 400, 'prompt', 'vocabulary of 300'), ('text', {'prompt': {}}, 400, 'prompt', 'a list'),
    ('text', {'echo': True}, 400, None, 'echo is not'), ('text', {'prompt': [1] * 2000}, 400, 'max_tokens', 'of 1,024'),
    ('rsa', {'rsa': {'candidates': 'x'}}, 400, 'rsa', 'whole number'), ('rsa', {'n': 2}, 400, 'n', '1'),
    ('rsa', {'rsa': {'population': 2, 'candidates': 3}}, 400, 'candidates', 'between 1 and 2'),
    ('rsa', {'rsa': {'x': 3}}, 400, 'rsa', 'x is not supported'), ('rsa', {}, 400, 'max_tokens', 'context of 1,024'),
    ('rsa', {'stop': 'a'}, 400, 'stop', 'None'), ('rsa', {'stop': ['a']}, 400, 'stop', 'None'),
    ('rsa', {'stream': True}, 400, 'max_tokens', 'context of 1,024'),
    ('rsa', {'messages': [{'role': 'assistant', 'content': 'a'}]}, 400, 'messages', 'question'),
    ('text', {'model': 'tiny-rsa'}, 400, 'model', 'use /v1/chat/completions')])
def test_what_is_wrong_is_told_in_the_form_of_the_api(tiny, path, body, status, param, words):
    if isinstance(body, dict):
        chat = {'messages': [{'role': 'user', 'content': 'Hi'}], 'model': 'tiny' if path == 'chat' else 'tiny-rsa'}
        body = json.dumps(({'model': 'tiny', 'prompt': 'a'} if path == 'text' else chat) | body).encode()
    found, content, _ = post(f'{tiny.url}/{"completions" if path == "text" else "chat/completions"}', body)
    error = content['error']
    assert (found, error['param']) == (status, param) or param == 'tools' and error['param'] is None
    assert words in error['message'] and '\n' not in error['message'] and error['type'] == 'invalid_request_error'


def test_parameters_without_effect_and_null_values_are_accepted(tiny):
    body = dict(model='tiny', prompt=[9], max_tokens=3, seed=1)
    plain = post(f'{tiny.url}/completions', json.dumps(body).encode())[1]['choices']
    more = dict(user='me', frequency_penalty=0, presence_penalty=0.0, stop=None, logit_bias=None, echo=False)
    assert post(f'{tiny.url}/completions', json.dumps(body | more).encode())[1]['choices'] == plain


def test_huge_bodies_other_paths_and_other_content_types_are_refused(tiny):
    body = json.dumps({'model': 'tiny', 'prompt': 'a' * 5_000_000}).encode()
    assert post(f'{tiny.url}/completions', body)[:2] == (413, {'error': {
        'message': 'the request has more than 4,194,304 bytes: shorten it', 'type': 'invalid_request_error',
        'param': None, 'code': None}})
    for path, status in ('nothing', 404), ('models', 405):
        found, content, _ = post(f'{tiny.url}/{path}', b'{}')
        assert found == status and content['error']['message']
    assert post(f'{tiny.url}/completions', b'{}', **{'Content-Type': 'text/plain'})[0] == 415
    with socket.create_connection(('127.0.0.1', tiny.port)) as half:            # hangs up within its request
        half.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n'
                     b'Content-Length: 100\r\n\r\n{"mod')
    assert {card.id for card in tiny.client.models.list()} == {'tiny', 'tiny-rsa'}
    assert_idle(tiny)


def test_a_wrong_key_is_refused(tiny, monkeypatch):
    monkeypatch.setenv('NANOZAYA_API_KEY', 'ключ')
    for call in tiny.client.models.list, lambda: tiny.client.completions.create(model='tiny', prompt='a', max_tokens=1):
        with pytest.raises(openai.AuthenticationError, match='NANOZAYA_API_KEY'):
            call()
    monkeypatch.setenv('NANOZAYA_API_KEY', KEY)
    assert tiny.client.completions.create(model='tiny', prompt='a', max_tokens=1).choices


def start_stream(service, reset=False, **body):
    """Send a streamed request on a socket of its own, whose small buffer is not read, and return the socket."""
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    if reset:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
    s.connect(('127.0.0.1', service.port))
    send(s, 'completions', dict(model='tiny', prompt=[9], max_tokens=900, stream=True, temperature=0) | body)
    return s


def send(s, path, body):
    data = json.dumps(body).encode()
    s.sendall(f'POST /v1/{path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n'
              f'Content-Length: {len(data)}\r\n\r\n'.encode() + data)


@pytest.fixture(scope='module')
def endless(folder):                                                            # noqa: F811
    """A server whose replies end only with max_tokens. A step takes 2 ms at least."""
    model, language = load(folder)
    language.stop = []
    with serving(model, language) as service:
        step = service.engine.step
        service.engine.step = lambda *args: time.sleep(0.002) or step(*args)
        yield service


@pytest.mark.parametrize('reset', [False, True])
def test_who_disconnects_leaves_at_the_next_step_and_others_go_on(endless, reset):
    leaving = [start_stream(endless, reset, n=2), start_stream(endless, reset, stream=False)]
    with endless.client.completions.create(model='tiny', prompt=[9, 9], max_tokens=100, temperature=0,
                                           stream=True) as kept:
        text = ''
        for i, chunk in enumerate(kept):
            text += chunk.choices[0].text
            if i == 20:
                assert len(endless.engine.active) == 4
                for s in leaving:
                    s.close()
            if i == 60:
                assert len(endless.engine.active) == 1
    assert [text] == lone(endless, [9, 9], 100, temperature=0)[0]
    assert_idle(endless)


def test_a_slow_reader_delays_nobody(endless):
    with start_stream(endless, n=8, logprobs=20, max_tokens=800) as slow:       # 16 MB
        slow.recv(1)
        start = time.time()
        reply = endless.client.completions.create(model='tiny', prompt=[9, 9], max_tokens=50, temperature=0)
        assert [reply.choices[0].text] == lone(endless, [9, 9], 50, temperature=0)[0] and time.time() - start < 20
        while endless.engine.active:                            # generated to the end, though nobody reads
            time.sleep(0.05)
        assert endless.open == 1
    assert_idle(endless)


def test_a_full_queue_says_when_to_come_back(endless, monkeypatch):
    monkeypatch.setattr(serve, 'MAX_REQUESTS', 6)
    busy = [start_stream(endless) for _ in range(6)]
    while endless.open < 6:
        time.sleep(0.01)
    status, content, headers = post(f'{endless.url}/completions', b'{"model": "tiny", "prompt": [9]}')
    assert (status, content['error']['type'], headers['Retry-After']) == (429, 'rate_limit_error', '2')
    for s in busy:
        s.close()
    assert_idle(endless)


def test_what_does_not_fit_into_the_cache_waits_or_is_refused(folder):          # noqa: F811
    model, language = load(folder)
    language.stop = []
    with serving(model, language, cache_gib=200 / 2**20) as service:
        capacity, most = service.engine.capacity, []
        assert 200 < capacity < 1000
        step = service.engine.step
        service.engine.step = lambda cache, tokens: most.append(cache.capacity * len(tokens)) or step(cache, tokens)
        with pytest.raises(openai.BadRequestError, match='--cache_gib'):
            service.client.completions.create(model='tiny', prompt=[9], max_tokens=capacity)
        reply = service.client.completions.create(model='tiny', prompt=[9], max_tokens=capacity // 3, n=9, seed=3)
        assert [c.text for c in reply.choices] == lone(service, [9], capacity // 3, 9, seed=3)[0]
        assert max(most) <= capacity
        assert_idle(service)


# ---- Markovian RSA ----

@pytest.mark.parametrize('seed', [0, 2])
def test_the_rsa_model_answers_as_rsa_does_here(tiny, folder, seed):                  # noqa: F811
    settings = dict(population=4, candidates=2, rounds=2, budget=40, tail=5)
    policy = load_policy(folder, 'cpu')
    rounds, = rsa.markovian_rsa([policy.encode('7 * 6?')], policy.sampler(SamplingOptions(temperature=0.5, seed=seed)),
                                policy, rsa.RSASettings(**settings, seed=seed))
    answers = [c.answer and policy.decode(c.answer).strip() for c in rounds[-1].candidates]
    votes = [answer for answer in answers if answer]
    best = rounds[-1].candidates[answers.index(max(votes, key=votes.count)) if votes else 0]
    assert votes or seed
    body = dict(model='tiny-rsa', messages=[{'role': 'user', 'content': '7 * 6?'}], seed=seed, temperature=0.5,
                extra_body={'rsa': settings})
    reply = tiny.client.chat.completions.create(**body)
    message, cost = reply.choices[0].message, reply.usage
    assert message.content == policy.decode(best.answer or [])
    assert reply.choices[0].finish_reason == ('stop' if votes else 'length')
    lines = message.reasoning_content.split('\n', 3)
    assert lines[3] == policy.decode(policy.thought_of(best.output))
    assert all(f'round {t} of 2: ' in line and f'; {now.tokens} tokens' in line
               for t, (line, now) in enumerate(zip(lines, rounds)))
    assert cost.completion_tokens == sum(now.tokens for now in rounds)
    assert cost.prompt_tokens == sum(len(c.prompt) for now in rounds for c in now.candidates)
    short = tiny.client.chat.completions.create(**body, max_tokens=3, n=1)                 # of the last round
    assert short.usage.completion_tokens <= sum(now.tokens for now in rounds[:2]) + 4 * 3
    *chunks, last = tiny.client.chat.completions.create(**body, stream=True, stream_options={'include_usage': True})
    assert ''.join(chunk.choices[0].delta.content or '' for chunk in chunks) == message.content and last.usage == cost
    said = [text for chunk in chunks if (text := getattr(chunk.choices[0].delta, 'reasoning_content', None))]
    assert said[:3] == [f'{line}\n' for line in lines[:3]]
    assert_idle(tiny)


def test_a_long_round_of_rsa_keeps_its_stream_alive(endless, monkeypatch):
    monkeypatch.setattr(serve, 'KEEP_ALIVE', 0.05)
    chunks = list(endless.client.chat.completions.create(
        model='tiny-rsa', messages=[{'role': 'user', 'content': 'a'}], stream=True,
        extra_body={'rsa': dict(population=2, candidates=1, rounds=0, budget=200, tail=9)}))          # 0.4 s at least
    said = [chunk.choices[0].delta.reasoning_content for chunk in chunks[:-1]]
    assert said[:3] == ['', '', ''] and said[-2].startswith('round 0 of 0: ')


def test_rsa_whose_client_leaves_ends(endless):
    body = dict(model='tiny-rsa', messages=[{'role': 'user', 'content': 'a'}],
                rsa=dict(population=3, candidates=1, rounds=50, budget=600, tail=9))
    with socket.create_connection(('127.0.0.1', endless.port)) as s:
        send(s, 'chat/completions', body)
        while len(endless.engine.active) < 3:
            time.sleep(0.01)
    assert_idle(endless)
    deadline = time.time() + 20
    while any('run_job' in thread.name for thread in threading.enumerate()):
        assert time.time() < deadline
        time.sleep(0.01)


def test_a_model_of_the_loops_task_has_completions_only():
    model = tiny_model(vocab_size=task.ENC.n_vocab, context=256)
    with serving(model, language_of(task.ENC, 'a run'), 'loops') as service:
        for name in 'loops', 'loops-rsa':
            with pytest.raises(openai.BadRequestError, match='without conversations'):
                service.client.chat.completions.create(model=name, messages=[{'role': 'user', 'content': 'a'}])
        reply = service.client.completions.create(model='loops', prompt=[1, 2], max_tokens=5, seed=2)
        assert [reply.choices[0].text] == lone(service, [1, 2], 5, seed=2)[0]


# ---- the program ----

@pytest.fixture
def program(folder):                                                            # noqa: F811
    """A function that starts the program and returns (process, port)."""
    started = []

    def start(*flags):
        started.append(subprocess.Popen([sys.executable, '-m', 'runtime.serve', f'--ckpt={folder}', '--port=0', *flags],
                                        env=ENV, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        line = started[-1].stdout.readline()
        return started[-1], int(line.split('127.0.0.1:')[1].split('/')[0])
    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_server_ends_its_streams(program, folder, signum):            # noqa: F811
    process, port = program()
    with openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key=KEY, timeout=60) as client:
        stream = client.chat.completions.create(model=folder.name, messages=[{'role': 'user', 'content': 'a'}], n=60,
                                                max_tokens=900, stream=True)
        with pytest.raises(openai.APIError if signum == signal.SIGINT else Exception) as error:
            for i, _ in enumerate(stream):
                if i == 9:
                    process.send_signal(signum)
    assert (str(error.value) == 'the server is stopping') == (signum == signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == (0 if signum == signal.SIGINT else -signum) and not out + err


def test_errors_of_the_command_line_are_one_line(monkeypatch, capsys, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.delitem(sys.modules, 'runtime.serve')
        for flags, words in ([f'--port={port}'], 'choose another --port'), (['--cache_gib=0'], 'cache_gib'), (
                ['--port=0', f'--ckpt={tmp_path}'], 'holds neither'), (['--population=0'], 'population'):
            _, message = run_script(monkeypatch, capsys, 'runtime.serve', *flags)
            assert words in message


# ---- a soak ----

def resident():
    """MB of this process."""
    gc.collect()
    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6


def test_a_soak_leaves_no_sequence_and_no_memory_behind(folder):                # noqa: F811
    requests = int(os.environ.get('SOAK', 40))
    model, language = load(folder)

    async def one(client, i, rng, counts):
        body = dict(model='tiny', prompt=[rng.randrange(5, 300) for _ in range(rng.choice([1, 9, 300]))], seed=i,
                    max_tokens=rng.choice([1, 20, 200]), n=rng.choice([1, 4]))
        kind = rng.choice(['whole', 'stream', 'leaves', 'wrong', 'rsa'])
        counts[kind] = counts.get(kind, 0) + 1
        if kind == 'whole':
            await client.completions.create(**body)
        elif kind == 'rsa':
            await client.chat.completions.create(
                model='tiny-rsa', messages=[{'role': 'user', 'content': 'a'}], seed=i, extra_body={
                    'rsa': dict(population=3, candidates=2, rounds=1, budget=20, tail=5)})
        elif kind == 'wrong':
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(**body | {'max_tokens': 5000})
        else:
            async with await client.completions.create(**body, stream=True) as chunks:
                async for _ in chunks:
                    if kind == 'leaves' and rng.random() < 0.2:
                        return

    async def soak(service, start, n, counts):
        rng, slots = random.Random(start), asyncio.Semaphore(12)
        async with openai.AsyncOpenAI(base_url=service.url, api_key=KEY, max_retries=0, timeout=120) as client:
            async def limited(i):
                async with slots:
                    await one(client, i, random.Random(i), counts)
            await asyncio.gather(*(limited(rng.randrange(2**30)) for _ in range(n)))
    with serving(model, language, cache_gib=4000 * 768 / 2**30) as service:
        counts, sizes = {}, []
        for part in range(4):
            asyncio.run(soak(service, part, requests // 4, counts))
            assert_idle(service)
            sizes.append(resident())
    print(f'{counts}, resident MB after each quarter: {sizes}')
    assert sizes[-1] - sizes[0] < 60
