"""The terminal interface of sample.py: text completion, and conversations (`--chat=True`).

In a conversation, the KV cache (cache.py) is kept between turns, so that each turn computes only new tokens. However,
only the answer of a reply is part of later prompts; its reasoning is dropped, as in the model's training. The cache has
the reasoning, and all later keys and values depend on it. Therefore its state is marked before each reply:

    cache           ... earlier turns ... | the reply's opening, reasoning, answer
                                          ^ mark
    next prompt     ... earlier turns ... | the reply's opening, answer, the user's message, the next opening

If the next prompt does not start with the tokens in the cache, the cache is rewound to the mark, and the rest of the
prompt is computed again: of the old reply, only the answer.
"""
import sys

import torch

DIM, PLAIN = '\033[2m', '\033[0m'   # terminal codes: start and end of grey text
NO_CONVERSATIONS = ('sample.py: this model was trained on text without conversations, so it continues text instead of '
                    'answering: leave out --chat, or train on data of data.chat.prepare')


def read_line():
    """Return the next line of standard input. Raise EOFError at its end, ValueError for a line that is not UTF-8."""
    if sys.stdin.isatty():
        return input('> ')
    line = sys.stdin.buffer.readline()                          # bytes: an invalid line must not affect others
    if not line:
        raise EOFError
    try:
        return line.decode().rstrip('\r\n')
    except UnicodeDecodeError:
        raise ValueError(f'a line is not valid UTF-8: {line[:40]!r}') from None


class Conversation:
    """The messages of a conversation, and the KV cache of its tokens. think: with reasoning, if the chat template makes
    it optional."""

    def __init__(self, model, language, think=True):
        self.model, self.language, self.think, self.messages = model, language, think, []
        self.reset()

    def reset(self):
        """Empty the cache."""
        self.cache, self.held, self.mark = self.model.make_cache(1, 0), [], ([], None)     # held: tokens in the cache

    @torch.no_grad()
    def ask(self, text):
        """Add a user message. Return the last tokens of the prompt, with which to generate the reply; the cache holds
        all tokens before them. Raise ValueError if there is no room for a reply."""
        if not text.strip():
            raise ValueError('the message is empty: write something')
        messages = [*self.messages, {'role': 'user', 'content': text}]
        prompt, lasting = (self.language.prompt(messages, self.think, reply) for reply in (True, False))
        if len(prompt) >= self.model.config.context:
            raise ValueError(f'the context is full: the conversation has {len(prompt):,} tokens, and the context '
                             f'{self.model.config.context:,}; start a new one')
        if self.held is None or prompt[:len(self.held)] != self.held:
            self.held, state = self.mark
            if state and prompt[:len(self.held)] == self.held:
                self.cache.rewind(state)
            else:
                self.reset()
        n = 0                                                   # length of the prefix that later prompts share
        while n < min(len(lasting), len(prompt) - 1) and lasting[n] == prompt[n]:
            n += 1
        if n > len(self.held):
            held, self.held = self.held, None                   # None: invalid, if this is interrupted
            self.cache.grow(n)
            new = torch.tensor([prompt[len(held):n]], device=self.model.device)
            self.model(new, cache=self.cache, last_only=True)
            self.held = prompt[:n]
            self.mark = self.held, self.cache.mark()
        self.messages = messages
        return prompt[len(self.held):]

    def add_reply(self, new, reply, complete):
        """Add the model's reply. new: the prompt tokens that `ask` returned. complete: False if generation was
        interrupted, so that the content of the cache is unknown."""
        self.held = self.held + new + reply[:-1] if complete else None          # the last token is not in the cache
        text = self.language.decode([token for token in reply if token not in self.language.stop])
        self.messages.append({'role': 'assistant', 'content': text.rpartition('</think>')[2]})


class Printer:
    """Write a reply token by token, by write(text). Reasoning is written between its tags, or in grey if `grey` is set;
    without show_think it is omitted."""

    def __init__(self, language, write, show_think=True, grey=False):
        self.language, self.write, self.show_think, self.grey = language, write, show_think, grey
        self.thinking, self.recent = False, []                  # the latest tokens
        self.shown, self.complete = 0, 0                        # characters written of them; tokens of these

    def __call__(self, token):
        if [token] in (self.language.open_think, self.language.close_think):
            self.finish()
            self.thinking = [token] == self.language.open_think
            if self.show_think:
                tag = '<think>' if self.thinking else '</think>'
                self.write(tag if not self.grey else DIM if self.thinking else PLAIN)
        elif token not in self.language.stop and (self.show_think or not self.thinking):
            self.recent.append(token)
            text = self.language.decode(self.recent)
            if not text.endswith('\ufffd'):                     # a character may span several tokens
                self.write(text[self.shown:])
                if len(self.recent) > 16:                       # keep those of the last write, as context of the next
                    self.recent = self.recent[self.complete:]
                    text = self.language.decode(self.recent)
                self.shown, self.complete = len(text), len(self.recent)

    def finish(self):
        """Write the rest, which may end within a character."""
        self.write(self.language.decode(self.recent)[self.shown:])
        self.recent, self.shown, self.complete = [], 0, 0


def chat_loop(conversation, generate, limit, show_think=True, text=None):
    """Run a conversation until the end of the input, or a single turn if `text`, the user's message, is given.

    generate: sample.generate with all options but the prompts, max_new_tokens, stream and cache. limit: most tokens of
    a reply; 0: as many as the context has room for.
    """
    language, grey = conversation.language, sys.stdout.isatty()
    if not language.conversations:
        print(NO_CONVERSATIONS, file=sys.stderr)
    if text is None:
        print('Type and press Enter; Ctrl-C stops a reply, Ctrl-D ends the conversation.', file=sys.stderr)
    while True:
        try:
            message = read_line() if text is None else text
        except EOFError:
            return print()
        except ValueError as error:
            print(f'sample.py: {error}', file=sys.stderr)
            continue
        new, reply, complete = None, [], True
        printer = Printer(language, lambda text: print(text, end='', flush=True), show_think, grey)

        def stream(_, token):
            reply.append(token)
            printer(token)
        try:
            new = conversation.ask(message)
            room = conversation.model.config.context - len(conversation.held) - len(new)
            tags = [token for token in new if [token] in (language.open_think, language.close_think)]
            if tags[-1:] == language.open_think:                # the template opens the reasoning
                printer(tags[-1])
            generate([new], min(limit or room, room), stream=stream, cache=conversation.cache)
        except KeyboardInterrupt:
            complete = False
        except ValueError as error:
            if text is not None:
                raise
            print(f'sample.py: {error}', file=sys.stderr)
            continue
        printer.finish()
        print(PLAIN if grey else '')
        if new is not None:
            conversation.add_reply(new, reply, complete)
        if not complete:
            print('(stopped)', file=sys.stderr)
        elif reply[-1] not in language.stop:
            reason = 'the context is full' if len(reply) == room else '--max_new_tokens'
            print(f'(cut after {len(reply):,} tokens: {reason})', file=sys.stderr)
        if text is not None:
            return


def complete_prompts(model, language, generate, limit, samples=1, prompt=None):
    """Continue the prompt, or each line of the input if none is given. generate: see chat_loop."""
    if prompt is not None:
        return continue_prompt(model, language, generate, limit, samples, prompt)
    print('Type a prompt and Enter; end with Ctrl-D.', file=sys.stderr)
    while True:
        try:
            continue_prompt(model, language, generate, limit, samples, read_line())
        except ValueError as error:                             # of this prompt: ask for the next one
            print(f'sample.py: {error}', file=sys.stderr)
        except EOFError:
            return print()


def continue_prompt(model, language, generate, limit, samples, prompt):
    """Print continuations of at most `limit` tokens: a single one token by token, several one after the other."""
    tokens = language.bos + language.encode(prompt)
    room = model.config.context - len(tokens)
    if tokens and room < 1:
        raise ValueError(f'the prompt has {len(tokens)} tokens, and the context {model.config.context}: shorten it')
    if room < limit:
        print(f'(the context has room for {room} new tokens only)', file=sys.stderr)
    if samples == 1:
        write = lambda text: print(text, end='', flush=True)
        write(prompt)
        printer = Printer(language, write)
        generate([tokens], min(room, limit), stream=lambda _, token: printer(token))
        printer.finish()
        return print()
    for i, new in enumerate(generate([tokens] * samples, min(room, limit))):
        print(f'--- sample {i}\n{prompt}{language.decode([token for token in new if token not in language.stop])}')
