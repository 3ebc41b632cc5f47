"""Text to tokens and back, and a conversation to the prompt that it answers: a tokenizer with its chat template in
jinja2, as most released models have one.

A run and its training data share one template, RUN_TEMPLATE: what renders a prompt for a reply also renders the prompts
of the training samples (reasoning.py). Released folders bring their own (runtime/language.py).

Special tokens (`<|im_end|>` ends a turn, `<think>` opens the reasoning) need care in two places:

  - Some tokenizers add special tokens to every text they encode. That of ZAYA1-8B adds BOS before AND the end of a turn
    after it, so that a prompt encoded that way ends before the model's reply. Text is therefore encoded without added
    tokens. A chat template writes its own BOS; in front of plain text, callers put `bos`.
  - A user who types `<|im_end|>` could end the user turn and write in the name of the model. Only the template may
    therefore produce special tokens. In the content of messages their names are split after the first character, and
    the parts encoded separately: `<` and `|im_end|>` are ordinary tokens.
"""
import datetime
import functools
import json
import re
from dataclasses import dataclass, field

from configurator import package
from data.tokenizer import digest

CUT, LIST = '\ufdd0', '\ufdd1'      # noncharacters: CUT splits a text, two LISTs enclose the index of a token list

# A system message is the start of the user's turn that follows. <think></think> asks for a reply without reasoning.
RUN_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|user|>' if message.role != 'assistant' and (loop.first or loop.previtem.role == 'assistant') }}
{{- message.content + {'system': '\\n\\n', 'user': '<|end|><|assistant|>', 'assistant': '<|end|>'}[message.role] }}
{%- endfor -%}
{{ '<think></think>' if enable_thinking is defined and not enable_thinking and add_generation_prompt }}"""


@dataclass
class ChatTemplate:
    path: str                                       # of its file, for error messages
    source: str | None = None                       # jinja2
    names: dict = field(default_factory=dict)       # variables that it may use, such as bos_token

    def render(self, **variables):
        """Return the text of a conversation, rendered in jinja2's sandbox with the variables that `transformers` gives.

        Raise ValueError, one line, if there is no template, it fails, or it does something forbidden.
        """
        if not self.source:
            raise ValueError(f'{self.path}: there is no chat template (chat_template.jinja) next to the tokenizer')
        try:
            return compile_template(self.source).render(tools=None, documents=None, **self.names, **variables)
        except Exception as error:                              # a template may raise any exception
            line = f', line {error.lineno}' if hasattr(error, 'lineno') else ''
            text = f'{error}'.splitlines() or [type(error).__name__]
            raise ValueError(f'{self.path}{line}: the chat template cannot be rendered ({text[0]})') from None


@functools.lru_cache
def compile_template(source):
    """Return the compiled jinja2 template, with the filters, functions and blocks that `transformers` provides.

    `{% generation %}` marks the assistant's tokens for training, and has its own scope of variables, as `with` has.
    """
    def raise_exception(message):
        raise ValueError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    environment = package('jinja2.sandbox').ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    environment.filters['tojson'] = tojson
    environment.globals |= {'raise_exception': raise_exception,
                            'strftime_now': lambda format: datetime.datetime.now().strftime(format)}
    return environment.from_string(re.sub(r'(\{%[-+]?\s*(?:end)?)generation\b', r'\1with', source))


class Language:
    """The tokenizer and the chat template of one folder.

    encode_with_special(text) -> tokens; names of special tokens in the text become those tokens, nothing is added
    decode(tokens) -> text, including the names of special tokens
    special_tokens: the names of all of them. bos: [BOS token], or [] if the tokenizer has none. stop: the tokens that
    end a reply. template: a ChatTemplate. vocab_size: number of tokens. digest: of a run's tokenizer, else None.
    """

    def __init__(self, encode_with_special, decode, special_tokens, bos, stop, template, vocab_size, digest=None):
        self.encode_with_special, self.decode, self.bos, self.stop = encode_with_special, decode, bos, stop
        self.template, self.vocab_size, self.digest = template, vocab_size, digest
        self.conversations = True                               # False: the model's training data had none
        longest_first = '|'.join(map(re.escape, sorted(special_tokens, key=len, reverse=True)))
        self.special_start = re.compile(f'(?s)(?={longest_first or "(?!)"})(.)')
        self.open_think, self.close_think = encode_with_special('<think>'), encode_with_special('</think>')

    def escape(self, text):
        """Return the text with CUT inside each name of a special token, so that none becomes a special token."""
        return self.special_start.sub(rf'\1{CUT}', re.sub(f'[{CUT}{LIST}]', '', text))

    def encode_escaped(self, text):
        """Return the tokens of a text, its parts between CUTs encoded separately."""
        return [token for part in text.split(CUT) if part for token in self.encode_with_special(part)]

    def encode(self, text):
        """Return the ordinary tokens of a text; names of special tokens stay plain text."""
        return self.encode_escaped(self.escape(text))

    def prompt(self, messages, think=True, reply=True):
        """Render a conversation and return its tokens, which the model continues with the assistant's next turn.

        messages: [{'role': 'system', 'user' or 'assistant', 'content': text}, ...]; content may also be a list of texts
        and lists of tokens, which are inserted unchanged. think: with reasoning, if the template has the
        choice. reply: False omits the opening of the assistant's turn. Raise ValueError as ChatTemplate.render does.
        """
        lists, turns = [], []
        for message in messages:
            parts, text = message['content'], ''
            for part in [parts] if isinstance(parts, str) else parts:
                if not isinstance(part, str):
                    lists.append(part)
                    text += f'{LIST}{len(lists) - 1}{LIST}'
                elif message['role'] == 'assistant':            # here <think> and </think> are special tokens
                    text += ''.join(piece if piece in ('<think>', '</think>') else self.escape(piece)
                                    for piece in re.split('(</?think>)', part))
                else:
                    text += self.escape(part)
            turns.append(message | {'content': text})
        rendered = self.template.render(messages=turns, add_generation_prompt=reply, enable_thinking=think)
        texts = rendered.split(LIST)                            # text, index, text, index, ..., text
        return [token for i, text in enumerate(texts)
                for token in (lists[int(text)] if i % 2 else self.encode_escaped(text))]

    def thought(self, output):
        """Return the tokens of the reasoning in an output: those before the last </think>, or all."""
        at = self.think_closes(output)
        return [token for token in (output if at is None else output[:at]) if token not in self.stop
                and [token] != self.open_think]

    def answer(self, output):
        """Return the tokens of the answer in an output: those after the last </think>, without the stop token.

        Return None without </think>, without a stop token at the end, and for an empty answer.
        """
        at = self.think_closes(output)
        return None if at is None or output[-1] not in self.stop else output[at + len(self.close_think):-1] or None

    def think_closes(self, output):
        """Return the index of the last </think>, or None."""
        n = len(self.close_think)
        return next((i for i in range(len(output) - n, -1, -1) if output[i:i + n] == self.close_think), None)


def language_of(enc, where):
    """Return the Language of a tiktoken.Encoding with RUN_TEMPLATE. where: its folder, for error messages."""
    special_tokens = enc.special_tokens_set
    stop = [enc.encode_single_token(name) for name in ('<|endoftext|>', '<|end|>') if name in special_tokens]
    template = ChatTemplate(where, RUN_TEMPLATE if '<|user|>' in special_tokens else None)
    return Language(lambda text: enc.encode(text, allowed_special='all'), enc.decode, special_tokens, [], stop,
                    template, enc.n_vocab, digest(enc))
