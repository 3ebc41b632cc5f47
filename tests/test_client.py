"""Markovian RSA on a server: `transformers serve` and runtime.serve with a tiny random model compared with a local run;
then a fake server that produces every kind of error."""
import asyncio
import contextlib
import json
import os
import shutil
import socket
import string
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import given, strategies as st

from runtime.language import released_language
from runtime.pretrained import save_pretrained
from common import ENV, ROOT, run_script, tiny_model
from tasks import client
from test_language import write_language

pytest.importorskip('openai')
SECRET = 'sk-a-secret-that-nobody-may-see'
FLAGS = ['--population=3', '--candidates=2', '--rounds=1', '--budget=12', '--tail=5']


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    """The seconds that were waited for between tries, in no time. And a key for the server."""
    seconds, sleep = [], asyncio.sleep
    monkeypatch.setattr(client.asyncio, 'sleep', lambda t: seconds.append(t) or sleep(0))
    monkeypatch.setenv('OPENAI_API_KEY', SECRET)
    return seconds


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """A random model in the released layout that says what comes back from text as the same tokens: letters and digits
    that no token joins, </think>, and the end. The other rows of the embedding are 0: none of them is the likeliest."""
    folder = write_language(tmp_path_factory.mktemp('served'))
    tokenizer = json.loads((folder / 'tokenizer.json').read_text())
    for token in tokenizer['added_tokens']:                     # a server shows no special tokens
        token['special'] &= 'think' not in token['content']
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer))
    vocab = tokenizer['model']['vocab']
    said = [vocab[c] for c in string.digits + 'bdfgjklmpqxz'] + [vocab['</think>'], vocab['<|im_end|>']]
    model = tiny_model(36, vocab_size=300, context=1024, skip_expert=True)      # some of its replies hold an answer
    with torch.no_grad():
        for name, p in model.named_parameters():                # what it says shall depend on what it reads
            if name.endswith(('residual_bias', 'branch_bias', 'embedding_bias')):
                p.zero_()
            elif name.endswith(('o_proj.weight', 'experts.down')):
                p *= 16
        silent = torch.ones(300, dtype=torch.bool)
        silent[said] = False
        model.embedding.weight[silent] = 0
        model.embedding.weight[[vocab['</think>'], vocab['<|im_end|>']]] *= 1.5
        for router in model.routers:                            # as the reference loads it, whatever it was
            router.balancing_bias[-1] = -1
    model.released_config = {'eos_token_id': 2}
    save_pretrained(model, folder)
    return folder


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / 'p.jsonl'
    path.write_text('{"problem": "7 * 6?", "answer": "35"}\n')
    return path


def rows_of(path):
    """The rounds that were written, without what time and machine decide."""
    _, *rows = map(json.loads, path.read_text().splitlines())
    return [{key: value for key, value in row.items() if key != 'seconds'} for row in rows]


# ---- a real server ----

@pytest.fixture(scope='session', params=['runtime.serve', 'transformers serve'])
def real(request, folder):
    """The URL of a server with this folder, and the name of its model."""
    command = ['runtime.serve', f'--ckpt={folder}']
    if request.param == 'transformers serve':
        command = ['transformers.cli.transformers', 'serve', str(folder), '--dtype=float32', '--host=127.0.0.1']
        pytest.importorskip('transformers')
        pytest.importorskip('accelerate')
    for name in 'starlette', 'uvicorn':
        pytest.importorskip(name)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    log = open(folder / 'log', 'w+')
    process = subprocess.Popen([sys.executable, '-m', *command, '--device=cpu', f'--port={port}'], cwd=ROOT,
                               env=ENV | {'HF_HUB_OFFLINE': '1'}, stdout=log, stderr=log)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port)):
                break
            assert process.poll() is None, (folder / 'log').read_text()[-2000:]
            time.sleep(0.1)
        yield f'http://127.0.0.1:{port}/v1', str(folder) if request.param == 'transformers serve' else folder.name
    finally:
        process.kill()
        process.wait()
        log.close()


def test_at_temperature_0_a_server_gives_the_results_of_the_local_run(real, folder, problems, monkeypatch, capsys):
    """The reasoning of '4 * 6?' is empty. The tail of '7 * 6?' holds </think>, which runtime.serve reads as text."""
    (url, name), here, there = real, problems.with_name('here'), problems.with_name('there')
    answers = {'3 * 6?': 'j5jq', '4 * 6?': 'qjjj', 'And 3?': None} | ({'7 * 6?': '35'} if name != folder.name else {})
    problems.write_text(''.join(json.dumps({'problem': key, 'answer': 3}) + '\n' for key in answers))
    flags = [f'--problems={problems}', f'--ckpt={folder}', '--temperature=0', *FLAGS]
    out, message = run_script(monkeypatch, capsys, 'rsa.py', f'--out={here}', '--device=cpu', *flags)
    assert message is None
    flags += [f'--model={name}'] * (name != folder.name)        # runtime.serve has one model besides its RSA
    table, message = run_script(monkeypatch, capsys, 'rsa.py', f'--out={there}', f'--server={url}', *flags)
    assert message is None and f'tails are counted in tokens of {folder}' in table
    assert rows_of(there) == rows_of(here)                      # answers, tails, draws, tokens, the longest prompt
    assert [row['answers'] for row in rows_of(here)[::2]] == [[answer] * 3 for answer in answers.values()]
    assert table.splitlines()[-1].split('|')[1:7] == out.splitlines()[-1].split('|')[1:7]


def test_a_real_server_s_refusal_is_one_line(real, problems, monkeypatch, capsys):
    _, message = run_script(monkeypatch, capsys, 'rsa.py', f'--server={real[0]}', '--model=another',
                            f'--problems={problems}', *FLAGS)
    assert f'{real[0]} refused: ' in message and "'another'" in message and '\n' not in message


# ---- a stand-in ----

class StandIn(ThreadingHTTPServer):
    """Says of every request the same text, made from its seed, unless `fault(number of the request, body)` says what
    goes wrong. requests: the bodies that came; most: how many were under way together."""
    daemon_threads = True

    def __init__(self, fault):
        self.fault, self.requests, self.now, self.most, self.lock = fault, [], 0, 0, threading.Lock()
        self.models, self.released = ['tiny'], threading.Event()
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}/v1'

    def handle_error(self, *_):
        pass                                                    # who was killed hangs up


def thought(body):
    return f'first {body["seed"]}, or is it {body["seed"] // 2}?'


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def whole(self, status, content, headers={}):
        content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({'Content-Type': 'application/json', 'Content-Length': len(content)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.whole(200, {'object': 'list', 'data': [{'id': name, 'object': 'model'} for name in self.server.models]})

    def do_POST(self):
        body, s = json.loads(self.rfile.read(int(self.headers['Content-Length']))), self.server
        with s.lock:
            s.requests.append(body)
            number, s.now = len(s.requests), s.now + 1
            s.most = max(s.most, s.now)
        try:
            self.reply(body, s.fault(number, body))
        finally:
            with s.lock:
                s.now -= 1

    def reply(self, body, fault):
        if fault in (401, 429, 500, 503):
            headers = {'Retry-After': '77'} if fault == 429 else {}
            return self.whole(fault, {'error': {'message': f'not now, {self.headers["Authorization"]}'}}, headers)
        if fault == 'no answer':
            self.close_connection = True
            return
        if fault == 'silent':
            self.server.released.wait(20)
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()
        said = f'\\boxed{{{body["seed"] % 5}}}'
        if fault in ('reasoning', 'reasoning_content'):
            self.event({'choices': [{'index': 0, 'delta': {fault: thought(body)}}]})
        elif fault != 'answer only':
            said = f'{thought(body)}</think>{said}'
        usage = {'prompt_tokens': 100 + body['seed'] % 7, 'completion_tokens': 1 + body['seed'] % 11, 'total_tokens': 0}
        for i in range(0, len(said), 12):
            if i and fault == 'breaks off':
                self.close_connection = True
                return
            if i and fault == 'ends':
                break
            if isinstance(fault, float):
                time.sleep(fault)
            self.event({'choices': [{'index': 0, 'delta': {'content': said[i:i + 12]}}]})
        if fault == 'error':
            self.event({'error': {'message': 'the engine is dead'}})
        elif fault != 'ends':
            reason = fault if fault in ('abort', 'engine error', 'content_filter', 'length') else 'stop'
            self.event({'choices': [{'index': 0, 'delta': {}, 'finish_reason': reason.removeprefix('engine ')}]})
            if fault == 'zero usage':
                self.event({'choices': [], 'usage': dict.fromkeys(usage, 0)})
            elif fault not in ('no usage', 'length'):
                self.event({'choices': [], 'usage': usage})
            self.chunk(b'data: [DONE]\n\n')
        self.chunk(b'')

    def event(self, content):
        content = {'id': 'a', 'object': 'chat.completion.chunk', 'created': 1, 'model': 'tiny'} | content
        self.chunk(b'data: ' + json.dumps(content).encode() + b'\n\n')

    def chunk(self, data):
        self.wfile.write(b'%x\r\n%s\r\n' % (len(data), data))
        self.wfile.flush()


@contextlib.contextmanager
def stand_in(fault=lambda number, body: None):
    standing = StandIn(fault)
    threading.Thread(target=standing.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
    try:
        yield standing
    finally:
        standing.released.set()
        standing.shutdown()
        standing.server_close()


def run(monkeypatch, capsys, url, problems, name, *flags):
    """rsa.py on these problems -> (what it printed, its last words, or None, the file it wrote)."""
    path = problems.with_name(name)
    out, message = run_script(monkeypatch, capsys, 'rsa.py', f'--server={url}', f'--problems={problems}',
                              f'--out={path}', *FLAGS, *flags)
    assert SECRET not in out + str(message) + (path.read_text() if path.exists() else '')
    return out, message, path


@pytest.fixture(scope='module')
def once():
    return {}


@pytest.fixture
def whole(once, problems, monkeypatch, capsys):
    """The rows of a run in which nothing fails."""
    if not once:
        with stand_in() as s:
            _, message, path = run(monkeypatch, capsys, s.url, problems, 'whole')
        assert message is None and len(s.requests) == 6
        once['rows'] = rows_of(path)
    return once['rows']


@pytest.mark.parametrize('fault, words', [
    (500, '500'), (503, '503'), (429, '429'), ('no answer', 'Connection error'), ('breaks off', 'closed'),
    ('ends', 'the reply is incomplete'), ('error', 'the engine is dead'), ('abort', "finish_reason 'abort'"),
    ('engine error', "finish_reason 'error'"), ('content_filter', "finish_reason 'content_filter'")])
def test_whatever_fails_for_the_moment_is_asked_for_again_and_changes_nothing(
        fault, words, whole, problems, monkeypatch, capsys, slept):
    said = []
    monkeypatch.setattr(client.tqdm, 'write', lambda text, file: said.append(text))
    with stand_in(lambda number, body: fault if number in (1, 4, 5, 6) else None) as s:
        _, message, path = run(monkeypatch, capsys, s.url, problems, 'out', '--parallel=1')
    assert message is None and rows_of(path) == whole and len(s.requests) == 6 + len(said) == 10
    assert all(words in line and 'of 8 in' in line and '\n' not in line and SECRET not in line for line in said)
    if fault == 429:
        assert slept == [77] * 4                                # what the server asked for
    else:
        assert all(n <= seconds <= 1.5 * n for n, seconds in zip([1, 1, 2, 4], slept, strict=True))


def test_a_server_that_dies_in_mid_run_costs_nothing_that_it_had_said(whole, problems, monkeypatch, capsys):
    monkeypatch.setattr(client, 'TRIES', 2)
    with stand_in(lambda number, body: 'no answer' if number > 4 else None) as dying:
        _, message, path = run(monkeypatch, capsys, dying.url, problems, 'out', '--parallel=1')
    assert message.startswith(f'rsa.py: {dying.url} failed 2 times, at last with: Connection error.')
    assert rows_of(path) == whole[:1] and len(dying.requests) == 6              # a round, and one reply of another
    with stand_in() as s:
        _, message, path = run(monkeypatch, capsys, s.url, problems, 'out')
    assert message is None and rows_of(path) == whole and len(s.requests) == 2


def test_a_killed_run_asks_for_the_missing_replies_only(whole, problems, monkeypatch, capsys):
    path = problems.with_name('out')
    with stand_in(lambda number, body: 'silent' if number > 4 else None) as s:
        process = subprocess.Popen([sys.executable, 'rsa.py', f'--server={s.url}', f'--problems={problems}',
                                    f'--out={path}', *FLAGS, '--parallel=1'], cwd=ROOT, env=ENV | os.environ,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(s.requests) < 5:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert rows_of(path) == whole[:1]
    with open(f'{path}.replies', 'ab') as file:
        file.write(b'{"key": "cut in its mi')                   # as if it had been killed while it wrote
    with stand_in() as s:
        _, message, path = run(monkeypatch, capsys, s.url, problems, 'out')
    assert message is None and rows_of(path) == whole and len(s.requests) == 2


def test_replies_of_an_earlier_run_are_not_used(whole, problems, monkeypatch, capsys):
    with stand_in(lambda number, body: 401 if number == 3 else None) as s:
        _, message, path = run(monkeypatch, capsys, s.url, problems, 'out', '--parallel=1')
        assert '401' in message and path.with_name('out.replies').read_text().count('\n') == 2
        path.unlink()
        _, message, path = run(monkeypatch, capsys, s.url, problems, 'out')
    assert message is None and rows_of(path) == whole and len(s.requests) == 3 + 6


def test_a_silent_server_is_given_up_in_one_line(problems, monkeypatch, capsys):
    monkeypatch.setattr(client, 'TIMEOUT', 0.2)
    monkeypatch.setattr(client, 'TRIES', 2)
    with stand_in(lambda number, body: 'silent') as s:
        _, message, _ = run(monkeypatch, capsys, s.url, problems, 'out')
    assert 'failed 2 times, at last with: Request timed out.' in message


def test_a_slow_server_is_waited_for_as_long_as_it_says_something(whole, problems, monkeypatch, capsys):
    monkeypatch.setattr(client, 'TIMEOUT', 0.6)
    with stand_in(lambda number, body: 0.2 if number == 1 else None) as s:      # a second and more for a reply
        _, message, path = run(monkeypatch, capsys, s.url, problems, 'out')
    assert message is None and rows_of(path) == whole and len(s.requests) == 6


def test_a_refusal_is_one_line_at_once_and_does_not_tell_the_key(problems, monkeypatch, capsys):
    with stand_in(lambda number, body: 401) as s:
        _, message, _ = run(monkeypatch, capsys, s.url, problems, 'out', '--parallel=1')
    assert 'refused: 401, ' in message and 'Bearer ***' in message and len(s.requests) == 1


def test_no_more_requests_than_the_bound_are_under_way(whole, problems, monkeypatch, capsys):
    with stand_in(lambda number, body: 0.02) as s:
        _, message, path = run(monkeypatch, capsys, s.url, problems, 'out', '--parallel=2')
    assert message is None and s.most == 2 and rows_of(path) == whole


@pytest.mark.parametrize('fault', ['reasoning', 'reasoning_content', 'answer only'])
def test_reasoning_may_come_apart_or_not_at_all(fault, whole, problems, monkeypatch, capsys):
    with stand_in(lambda number, body: fault) as s:
        _, message, path = run(monkeypatch, capsys, s.url, problems, 'out')
    assert message is None and rows_of(path)[0]['answers'] == whole[0]['answers'] and None not in whole[0]['answers']
    assert fault == 'answer only' or rows_of(path) == whole


def test_without_a_tokenizer_a_tail_is_four_characters_for_each_token(whole, problems, monkeypatch, capsys):
    with stand_in() as s:
        out, message, _ = run(monkeypatch, capsys, s.url, problems, 'out')
    assert message is None and 'tails are counted in characters, 4 to a token' in out
    tails, prompts = whole[0]['tails'], [body['messages'][0]['content'] for body in s.requests[3:]]
    assert sorted(tails) == sorted(thought(body)[-4 * 5:] for body in s.requests[:3])
    for i, j in whole[1]['sampled']:
        assert any(f'--- 1 ---\n{tails[i]}\n--- 2 ---\n{tails[j]}\n' in prompt for prompt in prompts)


def test_cost_is_what_the_server_counted(whole, problems, monkeypatch, capsys):
    with stand_in() as s:
        run(monkeypatch, capsys, s.url, problems, 'out')
    assert sum(row['tokens'] for row in whole) == sum(1 + body['seed'] % 11 for body in s.requests)
    assert max(row['longest_prompt'] for row in whole) == max(100 + body['seed'] % 7 for body in s.requests)


@pytest.mark.parametrize('fault', ['no usage', 'zero usage', 'length'])
@pytest.mark.parametrize('tokenizer', [False, True])
def test_without_usage_tokens_are_counted_here_and_that_is_said_once(
        fault, tokenizer, folder, whole, problems, monkeypatch, capsys, slept):
    said, flags = [], [f'--ckpt={folder}'] * tokenizer + ['--budget=64']
    monkeypatch.setattr(client.tqdm, 'write', lambda text, file: said.append(text))
    with stand_in(lambda number, body: fault) as s:
        _, message, path = run(monkeypatch, capsys, s.url, problems, 'out', *flags)
    assert message is None and len(s.requests) == 6 and not slept
    assert said == [f'{s.url} reports no usage: tokens are counted here, as those of tails are']
    count = released_language(folder).encode_with_special if tokenizer else client.pieces
    length = lambda body: min(64, 1 + len(count(f'{thought(body)}</think>\\boxed{{{body["seed"] % 5}}}')))
    rows = rows_of(path)
    assert sum(row['tokens'] for row in rows) == sum(
        64 if fault == 'length' else length(body) for body in s.requests)
    assert max(row['longest_prompt'] for row in rows) == max(
        len(count(body['messages'][0]['content'])) for body in s.requests)
    assert rows[0]['answers'] == ([None] * 3 if fault == 'length' else whole[0]['answers'])


def test_a_count_made_here_never_exceeds_the_budget(problems, monkeypatch, capsys):
    with stand_in(lambda number, body: 'no usage') as s:
        _, message, path = run(monkeypatch, capsys, s.url, problems, 'out', '--budget=2', '--tail=1')
    assert message is None and [row['tokens'] for row in rows_of(path)] == [6, 6]


def test_changes_of_the_tokenizer_or_the_model_s_name_are_named(folder, whole, problems, monkeypatch, capsys, tmp_path):
    shutil.copytree(folder, tmp_path / 'copy')
    with stand_in() as s:
        for flags, words in ([], None), ([], None), (['--model=b'], "belongs to a run with model = 'tiny'"), (
                [f'--ckpt={tmp_path / "copy"}'], 'of --ckpt was changed since'):
            _, message, _ = run(monkeypatch, capsys, s.url, problems, 'out', *flags)
            assert (words in message and message.endswith('name another file with --out')) if words else not message
    assert len(s.requests) == 6


def test_a_request_holds_the_settings_of_sampling_and_a_seed_of_its_own(problems, monkeypatch, capsys):
    with stand_in() as s:
        run(monkeypatch, capsys, s.url, problems, 'out', '--temperature=0.5', '--top_p=0.9', '--final_budget=14')
        plain = s.requests
        s.requests = []
        run(monkeypatch, capsys, s.url, problems, 'more', '--min_p=0.1')
    assert {(b['model'], b['temperature'], b['top_p'], b.get('min_p'), b['stream']) for b in plain} == {
        ('tiny', 0.5, 0.9, None, True)} and {b['min_p'] for b in s.requests} == {0.1}
    assert sorted(b['max_tokens'] for b in plain) == [12] * 3 + [14] * 3 and len({b['seed'] for b in plain}) == 6
    assert all([m['role'] for m in b['messages']] == ['user'] for b in plain)


def test_a_server_that_writes_more_than_it_was_asked_for_is_noticed(problems, monkeypatch, capsys):
    with stand_in() as s:
        _, message, _ = run(monkeypatch, capsys, s.url, problems, 'out', '--budget=2', '--tail=1')
    assert 'it was asked for at most 2' in message


def test_a_server_with_one_model_need_not_be_told_which(problems, monkeypatch, capsys):
    with stand_in() as s:
        s.models = ['a', 'b']
        _, message, _ = run(monkeypatch, capsys, s.url, problems, 'out')
        assert 'has 2 models: name one with --model (a, b)' in message
        s.models = ['a', 'a-rsa']
        _, message, path = run(monkeypatch, capsys, s.url, problems, 'rsa')
        assert message is None and {body['model'] for body in s.requests} == {'a'}
    _, message, path = run(monkeypatch, capsys, s.url, problems, 'out')         # and nobody is there any more
    assert 'is it running?' in message and not path.exists()
    _, message, _ = run(monkeypatch, capsys, 'localhost:8000', problems, 'out')
    assert 'write a URL' in message


def test_a_dry_run_asks_the_server_for_nothing(problems, monkeypatch, capsys):
    with stand_in() as s:
        out, message, path = run(monkeypatch, capsys, s.url, problems, 'out', '--dry_run=True')
    assert message is None and 'at most 72 per problem, 72 in all' in out and not s.requests and not path.exists()


# ---- text ----

characters = st.text(st.characters(exclude_categories=['Cs']), max_size=40)


@given(characters, st.integers(1, 12))
def test_the_last_pieces_are_the_last_characters(text, n):
    assert client.joined(client.pieces(text)) == text
    assert client.joined(client.pieces(text)[-n:]) == text[-4 * n:]
