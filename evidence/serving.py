"""Measure the server: `python -m evidence.serving [--tokens=N] [--peer=True]`, after `make demo`.

Claim. Requests that share a batch share its cost: a decode step reads the weights once, for however many sequences
(runtime/engine.py). Less throughput with 16 clients than with one would refute it.

Test. 1, 4 and 16 clients at once, each with one streamed chat completion on a prompt of its own, of a small model with
random weights and the tokenizer of runs/demo. Latency is the time from the request to the first text. --peer=True adds
`transformers serve` with the same folder. Clients, HTTP and model share the cores. A short round warms up.
"""
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from configurator import one_line_errors, package, read
from evidence.claims import print_table
from model import Zaya, ZayaConfig
from runtime.language import run_language
from runtime.pretrained import save_pretrained

TEXT = 'Write a class for a queue of requests, with a method that adds one and a method that removes the oldest. ' * 2


@dataclass
class ServingConfig:
    tokens: int = 100               # per reply
    peer: bool = False              # also `transformers serve`


@contextlib.contextmanager
def running(server, folder):
    """Start a server, wait until it accepts connections, and yield its URL."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = ['runtime.serve', f'--ckpt={folder}'] if server == 'runtime.serve' else [
        'transformers.cli.transformers', 'serve', folder, '--dtype=float32', '--host=127.0.0.1']
    with subprocess.Popen([sys.executable, '-m', *command, '--device=cpu', f'--port={port}'], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port)):
                break
            time.sleep(0.1)
        yield f'http://127.0.0.1:{port}/v1'


async def one_client(client, model, i, tokens):
    """Return the seconds to the first text, and the generated tokens."""
    start, first = time.perf_counter(), None
    async for chunk in await client.chat.completions.create(
            model=model, messages=[{'role': 'user', 'content': f'{i}. {TEXT}'}], max_tokens=tokens, seed=i, stream=True,
            stream_options={'include_usage': True}):
        first = first or (time.perf_counter() - start if chunk.choices and chunk.choices[0].delta.content else None)
    return first or time.perf_counter() - start, chunk.usage.completion_tokens         # the last chunk has it


async def measure(url, model, n, tokens):
    """Return (tokens/s of n clients together, median seconds to their first text)."""
    async with package('openai').AsyncOpenAI(base_url=url, api_key='none', timeout=300) as client:
        start = time.perf_counter()
        firsts, counts = zip(*await asyncio.gather(*(one_client(client, model, i, tokens) for i in range(n))))
        return sum(counts) / (time.perf_counter() - start), statistics.median(firsts)


def main(config):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        small = ZayaConfig(vocab_size=run_language('runs/demo').vocab_size, context=1024, skip_expert=True)
        save_pretrained(Zaya(small), folder, 'runs/demo')
        for server in ['runtime.serve'] + ['transformers serve'] * config.peer:
            with running(server, folder) as url:
                model = os.path.basename(folder) if server == 'runtime.serve' else folder
                asyncio.run(measure(url, model, 2, 4))
                for n in (1, 4, 16):
                    speed, first = asyncio.run(measure(url, model, n, config.tokens))
                    rows.append([server, n, f'{speed:,.0f}', f'{1000 * first:,.0f}'])
    print(f'{config.tokens} tokens per reply')
    print_table(['server', 'clients', 'tokens/s', 'median ms to the first text'], rows)


if __name__ == '__main__':
    with one_line_errors('evidence.serving'):
        main(*read(sys.argv[1:], ServingConfig))
