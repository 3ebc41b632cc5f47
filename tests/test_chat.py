"""Conversations: the content of the KV cache between turns, and the printed part of a reply."""
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

pytest.importorskip('tokenizers')

import configurator
import tokenizers
import train
from common import TINY_RUN, run_script, tiny_model
from model import ZayaConfig
from runtime.checkpoint import load_run
from runtime.pretrained import save_pretrained
from runtime import chat
from runtime.chat import DIM, PLAIN, Conversation, Printer, chat_loop
from runtime.language import released_language
from sample import SamplingOptions, generate
from test_language import TEMPLATE, write_language

KEEPS_ALL = TEMPLATE.replace("message.content.split('</think>')[-1] | trim if", "message.content if").replace(
    "'<think>\\n' if enable_thinking else '<think>\\n\\n</think>\\n\\n'", "''")


@pytest.fixture(scope='module')
def model():
    return tiny_model(vocab_size=300, context=200, n_layer=2, skip_expert=True)


@pytest.fixture(scope='module', params=[TEMPLATE, KEEPS_ALL])
def language(request, tmp_path_factory):
    return released_language(write_language(tmp_path_factory.mktemp('talk'), template=request.param))


def read_by(model, monkeypatch):
    """A list that grows by the number of tokens of every forward."""
    read, forward = [], type(model).forward

    def watched(self, tokens, *args, **options):
        read.append(tokens.shape[1])
        return forward(self, tokens, *args, **options)
    monkeypatch.setattr(type(model), 'forward', watched)
    return read


replies = st.lists(st.tuples(st.text('ab ', min_size=1, max_size=4).filter(str.strip), st.sampled_from(
    ['<think>so</think>c<|im_end|>', 'x</think>y<|im_end|>', 'zz<|im_end|>', 'cut', 'stopped', '<think>never closed'])),
    min_size=1, max_size=4)


@torch.no_grad()
@given(replies)
@settings(max_examples=25)
def test_what_the_cache_holds_is_what_the_prompt_says(model, language, turns):
    """However the turns before ended, the next token after held and read is that after the whole prompt."""
    conversation = Conversation(model, language)
    for text, said in turns:
        read = conversation.ask(text)
        prompt = language.prompt(conversation.messages)
        assert conversation.held + read == prompt and len(conversation.held) == conversation.cache.lengths[0]
        reply = language.encode_with_special(said)
        given = iter(reply)
        logits = []

        def step_by_step(tokens):                               # as generate does: all but the last reply token is read
            cache = conversation.cache
            cache.grow(len(prompt) + len(reply))
            logits.append(model(torch.tensor([tokens]), cache=cache)[0][:, -1])
            for token in list(given)[:-1]:
                model(torch.tensor([[token]]), cache=cache)
        step_by_step(read)
        torch.testing.assert_close(logits[0], model(torch.tensor([prompt]))[0][:, -1], atol=1e-4, rtol=1e-4)
        conversation.add_reply(read, reply, complete=said != 'stopped')
        assert '</think>' not in conversation.messages[-1]['content']


def test_only_what_is_new_is_read(model, language, monkeypatch):
    """The prompt grows by each turn; what a turn reads does not."""
    read, conversation, lengths = read_by(model, monkeypatch), Conversation(model, language), []
    for turn in range(6):
        read.clear()
        tokens = conversation.ask('and now?')
        lengths.append(sum(read) + len(tokens))
        reply = language.encode_with_special('x</think>yes<|im_end|>')
        model(torch.tensor([tokens + reply[:-1]]), cache=grown(conversation.cache, len(tokens) + len(reply)))
        conversation.add_reply(tokens, reply, complete=True)
    assert max(lengths[1:]) == min(lengths[1:]) < 50 < len(language.prompt(conversation.messages))


def grown(cache, more):
    cache.grow(cache.lengths[0] + more)
    return cache


def test_a_conversation_s_replies_are_those_of_a_model_that_reads_it_all_anew(model, language, monkeypatch, capsys):
    said, prompts = iter(['hello', 'why?', 'a']), []
    monkeypatch.setattr(chat, 'read_line', lambda: next(said, None) or (_ for _ in ()).throw(EOFError))

    def reply(batch, n, stream, cache):
        new = generate(model, batch, n, SamplingOptions(0), stop=language.stop, cache=cache, stream=stream)
        prompts.append((conversation.held + batch[0], new[0]))
    conversation = Conversation(model, language)
    chat_loop(conversation, reply, limit=9)
    assert len(prompts) == 3
    for prompt, output in prompts:
        assert output == generate(model, [prompt], 9, SamplingOptions(0), stop=language.stop)[0]


def test_chatting_with_a_model_that_saw_no_conversations_is_said(dataset, tmp_path, monkeypatch, capsys):
    flags = [f'--{key}={value}' for key, value in dict(dataset=dataset, out_dir=tmp_path / 'text', max_steps=1).items()]
    train.train(*configurator.read(TINY_RUN + flags, train.TrainConfig, ZayaConfig))
    chatting = [f"--ckpt={tmp_path / 'text'}", '--prompt=hi', '--max_new_tokens=2', '--device=cpu', '--chat=True']
    _, message = run_script(monkeypatch, capsys, 'sample.py', *chatting)
    assert message is None
    model, language = load_run(tmp_path / 'text')
    assert not language.conversations
    reply = lambda batch, n, stream, cache: [stream(0, token) for token in language.stop[:1]]
    chat_loop(Conversation(model, language), reply, 2, text='hi')
    assert 'trained on text without conversations' in capsys.readouterr().err
    language.conversations = True
    chat_loop(Conversation(model, language), reply, 2, text='hi')
    assert 'without conversations' not in capsys.readouterr().err


def test_a_full_context_is_said_and_ends_nothing(model, language, monkeypatch, capsys):
    said = iter(['a ' * 300, 'short'])
    monkeypatch.setattr(chat, 'read_line', lambda: next(said, None) or (_ for _ in ()).throw(EOFError))
    conversation = Conversation(model, language)
    ok = language.encode_with_special('ok')
    chat_loop(conversation, lambda batch, n, stream, cache: [stream(0, token) for token in ok], limit=0)
    out, err = capsys.readouterr()
    assert 'the context is full' in err and 'ok' in out and len(conversation.messages) == 2


def test_ctrl_c_ends_the_reply_and_not_the_conversation(model, language, monkeypatch, capsys):
    said = iter(['one', 'two'])
    monkeypatch.setattr(chat, 'read_line', lambda: next(said, None) or (_ for _ in ()).throw(EOFError))
    calls = []

    def reply(batch, n, stream, cache):
        calls.append(batch)
        for token in language.encode_with_special('abc'):
            stream(0, token)
        if len(calls) == 1:
            raise KeyboardInterrupt
    conversation = Conversation(model, language)
    chat_loop(conversation, reply, limit=5)
    assert len(calls) == 2 and '(stopped)' in capsys.readouterr().err
    assert [m['role'] for m in conversation.messages] == ['user', 'assistant'] * 2


@pytest.mark.parametrize('show_think, grey, expected', [
    (True, False, '<think>so é</think>4'), (True, True, f'{DIM}so é{PLAIN}4'), (False, False, '4')])
def test_reasoning_is_grey_or_hidden(language, show_think, grey, expected):
    written = []
    printer = Printer(language, written.append, show_think, grey)
    for token in language.encode_with_special('<think>so é</think>4<|im_end|>'):
        printer(token)
    printer.finish()
    assert ''.join(written) == expected and not any('\ufffd' in text for text in written)


def pieces_of(text, size):
    data = text.encode()
    return [data[i:i + size] for i in range(0, len(data), size)]


FALLBACK = tokenizers.decoders.Sequence([tokenizers.decoders.Replace('▁', ' '), tokenizers.decoders.ByteFallback(),
                                         tokenizers.decoders.Fuse()])           # ZAYA1-8B's
BYTES = lambda tokens: b''.join(tokens).decode(errors='replace')
said = st.text('ab 漢🙂é\n', max_size=80)


@pytest.mark.parametrize('decode, replies', [
    (BYTES, st.lists(st.binary(min_size=1, max_size=4))), (BYTES, st.builds(pieces_of, said, st.integers(1, 5))),
    (FALLBACK.decode, said.map(lambda text: [token for c in text for token in (
        [c.replace(' ', '▁')] if c < '~' else [f'<0x{byte:02X}>' for byte in c.encode()])]))])
@given(data=st.data())
def test_a_printer_writes_all_complete_characters_and_decodes_only_the_latest_tokens(decode, replies, data):
    decoded, written, tokens, pending = [], [], data.draw(replies), 0
    printer = Printer(SimpleNamespace(stop=[], open_think=[0], close_think=[1], decode=lambda tokens: decoded.append(
        len(tokens)) or decode(tokens)), written.append)
    for n, token in enumerate(tokens, 1):
        printer(token)
        assert max(decoded) <= 16 + pending + 1                 # pending: tokens since the last complete character
        pending = pending + 1 if decode(tokens[:n]).endswith('\ufffd') else 0
        assert pending or ''.join(written) == decode(tokens[:n])
        decoded.clear()
    printer.finish()
    assert ''.join(written) == decode(tokens)


def test_a_released_model_is_talked_to_from_the_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip('safetensors')
    model = tiny_model(vocab_size=300, context=200, skip_expert=True)
    model.released_config = {'eos_token_id': 2}
    save_pretrained(model, write_language(tmp_path))            # writes config.json anew
    flags = [f'--ckpt={tmp_path}', '--chat=True', '--prompt=2 + 2?', '--max_new_tokens=8', '--device=cpu']
    out, message = run_script(monkeypatch, capsys, 'sample.py', *flags, '--preset=math', '--temperature=0')
    assert message is None and out.startswith('<think>')
    hidden, message = run_script(monkeypatch, capsys, 'sample.py', *flags, '--temperature=0', '--show_think=False')
    assert message is None and len(hidden) < len(out)
    _, message = run_script(monkeypatch, capsys, 'sample.py', *flags, '--preset=poems')
    assert 'preset is' in message
    (tmp_path / 'chat_template.jinja').unlink()
    _, message = run_script(monkeypatch, capsys, 'sample.py', *flags)
    assert 'there is no chat template' in message
