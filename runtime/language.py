"""A model's language: text to tokens and back, and a conversation to the prompt that the model answers.

Released folders and runs of train.py speak through the same door. A released folder brings tokenizer.json and a chat
template in jinja2, as most released models do; a run brings bpe.json, and its template is RUN_TEMPLATE, which writes
what data/reasoning.py trains on.

Control tokens (`<|im_end|>` ends a turn, `<think>` begins reasoning) mean something to the model, and two mistakes are
easy to make with them:

  - Some tokenizers put special tokens around all that they encode. That of ZAYA1-8B puts a begin token before AND the
    end of a turn behind it: a prompt made that way is over before the model has said a word. So text is encoded without
    them, and `bos` goes in front of a prompt once.
  - A user who types `<|im_end|>` would end the own turn, and could go on in the name of the model. So control tokens
    are made by the template alone. In all that people say, their names are cut after the first character, and the
    pieces encoded apart: `<` and `|im_end|>` are ordinary tokens.
"""
import datetime
import functools
import json
import os
import re

from configurator import package
from validate import read_bytes, read_json, reading
from data.tokenizer import digest, load_tokenizer

STOP = {'eos_token_id?': (None, int, [int])}
TEMPLATES = {'chat_template?': (None, str, [{'name': str, 'template': str}])}
CUT, LIST = '\ufdd0', '\ufdd1'      # where text is cut; around the number of a list of tokens. No text has these two

RUN_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|user|>' + message.content + '<|end|><|assistant|>' if message.role == 'user' else message.content + '<|end|>' }}
{%- endfor -%}
{{ '<think></think>' if not enable_thinking and add_generation_prompt }}"""


class Language:
    """Of one folder.

    parse(text) -> tokens, those of control tokens' names among them, and nothing put around the text
    decode(tokens) -> text, with the names of control tokens
    controls: the names of all control tokens. bos: the tokens that stand before any text, [] or one.
    stop: the tokens that end what a model says. template: jinja2 source, or None. names: what it may call, such as
    bos_token. path: of the template, for errors. vocab_size: how many tokens it knows. digest: of a run's tokenizer.
    """

    def __init__(self, parse, decode, controls, bos, stop, template, names, path, vocab_size,
                 digest=None):
        self.vocab_size, self.digest = vocab_size, digest
        self.parse, self.decode, self.bos, self.stop = parse, decode, bos, stop
        self.template, self.names, self.path = template, names, path
        longest_first = '|'.join(map(re.escape, sorted(controls, key=len, reverse=True)))
        self.at_control = re.compile(f'(?s)(?={longest_first or "(?!)"})(.)')
        self.open_think, self.close_think = parse('<think>'), parse('</think>')

    def guard(self, text):
        """Return the text with its control tokens' names cut, so that it makes none."""
        return self.at_control.sub(rf'\1{CUT}', re.sub(f'[{CUT}{LIST}]', '', text))

    def pieces(self, text):
        """Encode the pieces of a text that has been cut."""
        return [token for piece in text.split(CUT) if piece for token in self.parse(piece)]

    def encode(self, text):
        """Encode what somebody says: text -> ordinary tokens."""
        return self.pieces(self.guard(text))

    def prompt(self, messages, think=True, reply=True):
        """Render a conversation -> the tokens to which the model adds the assistant's next turn.

        messages: [{'role': 'system', 'user' or 'assistant', 'content': text}, ...]; the content of a user may also be a
        list of texts and lists of tokens, which go into the prompt as they are. think: with reasoning, where the
        template can do without. reply: False leaves out what opens the assistant's turn.
        Raise ValueError if there is no template, or it fails or does what is forbidden to it.
        """
        if not self.template:
            raise ValueError(f'{self.path}: there is no chat template (chat_template.jinja) beside the tokenizer')
        lists, turns = [], []
        for message in messages:
            parts = message['content']
            text = ''
            for part in [parts] if isinstance(parts, str) else parts:
                if not isinstance(part, str):
                    lists.append(part)
                    part = f'{LIST}{len(lists) - 1}{LIST}'
                elif message['role'] == 'assistant':            # its reasoning stands between control tokens
                    part = ''.join(piece if piece in ('<think>', '</think>') else self.guard(piece)
                                   for piece in re.split('(</?think>)', part))
                else:
                    part = self.guard(part)
                text += part
            turns.append(message | {'content': text})
        rendered = render(self.template, self.path, messages=turns, tools=None, documents=None,
                          add_generation_prompt=reply, enable_thinking=think, **self.names)
        texts = rendered.split(LIST)                            # text, number, text, number, ..., text
        return [token for i, text in enumerate(texts)
                for token in (lists[int(text)] if i % 2 else self.pieces(text))]

    def thought(self, output):
        """Return the reasoning in an output: what stands before the last </think>, or all of it."""
        at = self.think_closes(output)
        return [token for token in (output if at is None else output[:at]) if token not in self.stop
                and [token] != self.open_think]

    def answer(self, output):
        """Return the tokens of the answer in an output: what follows the last </think>. None if there is no </think>,
        nothing behind it, or no end."""
        at = self.think_closes(output)
        return None if at is None or output[-1] not in self.stop else output[at + len(self.close_think):-1] or None

    def think_closes(self, output):
        """Return where the last </think> begins, or None."""
        n = len(self.close_think)
        return next((i for i in range(len(output) - n, -1, -1) if output[i:i + n] == self.close_think), None)


@functools.lru_cache
def compile_template(template):
    """Read a template, once."""
    def raise_exception(message):
        raise ValueError(message)
    environment = package('jinja2.sandbox').ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    environment.filters['tojson'] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals |= {'raise_exception': raise_exception,
                            'strftime_now': lambda format: datetime.datetime.now().strftime(format)}
    return environment.from_string(template)


def render(template, path, **names):
    """Render a chat template in jinja2's sandbox, which cannot call or change what it should not. Templates expect
    the settings and functions that `transformers` gives them. Raise ValueError, one line, for what goes wrong."""
    try:
        return compile_template(template).render(**names)
    except Exception as error:                                  # a template may fail in any way that Python can
        line = f', line {error.lineno}' if hasattr(error, 'lineno') else ''
        text = f'{error}'.splitlines() or [type(error).__name__]
        raise ValueError(f'{path}{line}: the chat template cannot be rendered ({text[0]})') from None


def released_language(folder):
    """The Language of a released folder: tokenizer.json; the template in chat_template.jinja, else in
    tokenizer_config.json; the stop tokens in generation_config.json, else in config.json."""
    path, Tokenizer = os.path.join(folder, 'tokenizer.json'), package('tokenizers').Tokenizer
    with reading(path):
        tokenizer = Tokenizer.from_file(path)
    parse = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    around = tokenizer.encode('a')                              # with what the tokenizer puts around every text
    bos = around.ids[:1] if around.special_tokens_mask[:1] == [1] else []

    configs = {}                                                # of the two that need not be there
    for name, kind in ('tokenizer_config.json', TEMPLATES), ('generation_config.json', STOP):
        configs[name] = read_json(at, kind) if os.path.exists(at := os.path.join(folder, name)) else {}
    stop = configs['generation_config.json'].get('eos_token_id')
    if stop is None:                                            # 106 is the default of transformers' ZayaConfig
        stop = read_json(os.path.join(folder, 'config.json'), STOP).get('eos_token_id', 106)
    stop = stop if isinstance(stop, list) else [] if stop is None else [stop]

    settings = configs['tokenizer_config.json']
    template_path, template = os.path.join(folder, 'chat_template.jinja'), settings.get('chat_template')
    if os.path.exists(template_path):
        with reading(template_path):
            template = read_bytes(template_path).decode()
    else:
        template_path = os.path.join(folder, 'tokenizer_config.json')
    if isinstance(template, list):                              # several with names
        template = {t['name']: t['template'] for t in template}.get('default')
    names = {key: value.get('content') if isinstance(value, dict) else value
             for key, value in settings.items() if re.fullmatch('(bos|eos|unk|sep|pad|cls|mask)_token', key) and value}
    controls = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    return Language(parse, lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False), controls, bos, stop,
                    template, names, template_path, tokenizer.get_vocab_size())


def run_language(folder):
    """The Language of a run of train.py."""
    tokenizer = load_tokenizer(os.path.join(folder, 'bpe.json'))
    controls = tokenizer.special_tokens_set
    ends = [name for name in ('<|endoftext|>', '<|end|>') if name in controls]              # of a document, of a turn
    return Language(lambda text: tokenizer.encode(text, allowed_special='all'), tokenizer.decode, controls, [],
                    [tokenizer.encode_single_token(name) for name in ends],
                    RUN_TEMPLATE if '<|user|>' in controls else None, {}, folder, tokenizer.n_vocab, digest(tokenizer))
