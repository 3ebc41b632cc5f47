"""In the terminal (sample.py): texts that a model writes on, and conversations with it, `--chat=True`.

In a conversation, what was said once is not read again: the cache (cache.py) keeps it from turn to turn. But of a reply
only the answer is part of the prompts that follow. Its reasoning is dropped, as models are trained to have it; the
cache has read it, and every later key and value depends on it. So the cache is marked before each reply:

    held by the cache     ... said before ... | the reply's opening, reasoning, answer
                                              ^ mark
    the next prompt       ... said before ... | the reply's opening, answer, what is said next, the next opening

If the next prompt does not begin with all that the cache holds, the cache goes back to the mark, and what stands behind
it in the prompt is read: of an old reply, the answer alone.
"""
import sys

import torch

DIM, PLAIN = '\033[2m', '\033[0m'   # what makes a terminal write grey, and the end of it


def typed():
    """Return the next line of the input. Raise EOFError at its end, ValueError for a line that is no text."""
    if sys.stdin.isatty():
        return input('> ')
    line = sys.stdin.buffer.readline()                          # by itself: one bad line must not take others along
    if not line:
        raise EOFError
    try:
        return line.decode().rstrip('\r\n')
    except UnicodeDecodeError:
        raise ValueError(f'a line is not valid UTF-8: {line[:40]!r}') from None


class Conversation:
    """What was said, and the cache that has read it.

    model: a Zaya. language: its Language. think: with reasoning, where the chat template can do without.
    """

    def __init__(self, model, language, think=True):
        self.model, self.language, self.think, self.messages = model, language, think, []
        self.forget()

    def forget(self):
        """Read everything anew at the next turn."""
        self.cache, self.held, self.mark = self.model.make_cache(1, 0), [], ([], None)     # held: tokens in the cache

    @torch.no_grad()
    def ask(self, text):
        """Say something. Return the tokens that the model must read before it replies; the cache holds what stands
        before them. Raise ValueError if the prompt leaves no room for a reply."""
        if not text.strip():
            raise ValueError('the message is empty: say something')
        messages = [*self.messages, {'role': 'user', 'content': text}]
        prompt, said = (self.language.prompt(messages, self.think, reply) for reply in (True, False))
        if len(prompt) >= self.model.config.context:
            raise ValueError(f'the context is full: the conversation has {len(prompt):,} tokens, and the context '
                             f'{self.model.config.context:,}; start a new one')
        if self.held is None or prompt[:len(self.held)] != self.held:
            self.held, state = self.mark
            if state and prompt[:len(self.held)] == self.held:
                self.cache.rewind(state)
            else:
                self.forget()
        same = 0                                                # up to here every later prompt will be the same
        while same < min(len(said), len(prompt) - 1) and said[same] == prompt[same]:
            same += 1
        if same > len(self.held):
            held, self.held = self.held, None                   # stopped on the way, the cache is not to be relied upon
            self.cache.grow(same)
            new = torch.tensor([prompt[len(held):same]], device=self.model.device)
            self.model(new, cache=self.cache, last_only=True)
            self.held = prompt[:same]
            self.mark = self.held, self.cache.mark()
        self.messages = messages
        return prompt[len(self.held):]

    def hear(self, read, reply, whole):
        """Take up the reply that the model gave after it had read those tokens. whole: False if it was stopped on the
        way, so that the cache is not to be relied upon."""
        self.held = self.held + read + reply[:-1] if whole else None            # the last token was not read any more
        text = self.language.decode([token for token in reply if token not in self.language.stop])
        self.messages.append({'role': 'assistant', 'content': text.rpartition('</think>')[2]})


class Printer:
    """Writes a reply as it comes, token by token: write(text). Reasoning stands between its tags, is grey if the output
    is a terminal (grey), and is left out without show_think."""

    def __init__(self, language, write, show_think=True, grey=False):
        self.language, self.write, self.show_think, self.grey = language, write, show_think, grey
        self.line, self.shown, self.thinking = [], 0, False     # tokens of the line; how much of its text is written

    def __call__(self, token):
        if [token] in (self.language.open_think, self.language.close_think):
            self.finish()
            self.thinking = [token] == self.language.open_think
            if self.show_think:
                tag = '<think>' if self.thinking else '</think>'
                self.write(tag if not self.grey else DIM if self.thinking else PLAIN)
        elif token not in self.language.stop and (self.show_think or not self.thinking):
            self.line.append(token)
            text = self.language.decode(self.line)
            if not text.endswith('\ufffd'):                     # a character may span several tokens
                self.write(text[self.shown:])
                self.shown = len(text)
                if text.endswith('\n'):                         # so that no long text is decoded at every token
                    self.line, self.shown = [], 0

    def finish(self):
        """Write what is left: the line may end inside a character."""
        self.write(self.language.decode(self.line)[self.shown:])
        self.line, self.shown = [], 0


def chat_loop(conversation, generate, limit, show_think=True, text=None):
    """Take turns until the end of the input; or a single one, if the user's text is given.

    generate: sample.generate with all but the prompts, their new tokens, stream and cache. limit: tokens of a reply; 0:
    as many as the context has room for.
    """
    language, grey = conversation.language, sys.stdout.isatty()
    if text is None:
        print('Type and press Enter; Ctrl-C stops a reply, Ctrl-D ends the conversation.', file=sys.stderr)
    while True:
        try:
            said = typed() if text is None else text
        except EOFError:
            return print()
        except ValueError as error:
            print(f'sample.py: {error}', file=sys.stderr)
            continue
        read, reply, whole = None, [], True
        printer = Printer(language, lambda text: print(text, end='', flush=True), show_think, grey)

        def stream(row, token):
            reply.append(token)
            printer(token)
        try:
            read = conversation.ask(said)
            room = conversation.model.config.context - len(conversation.held) - len(read)
            tags = [token for token in read if [token] in (language.open_think, language.close_think)]
            if tags[-1:] == language.open_think:                # the template has opened the reasoning
                printer(tags[-1])
            generate([read], min(limit or room, room), stream=stream, cache=conversation.cache)
        except KeyboardInterrupt:
            whole = False
        except ValueError as error:
            if text is not None:
                raise
            print(f'sample.py: {error}', file=sys.stderr)
            continue
        printer.finish()
        print(PLAIN if grey else '')
        if read is not None:
            conversation.hear(read, reply, whole)
        if not whole:
            print('(stopped)', file=sys.stderr)
        elif reply[-1] not in language.stop:
            reason = 'the context is full' if len(reply) == room else '--max_new_tokens'
            print(f'(cut after {len(reply):,} tokens: {reason})', file=sys.stderr)
        if text is not None:
            return


def complete_prompts(model, language, generate, limit, samples=1, prompt=None):
    """Write on after the prompt, or after each line of the input if none is given. generate: as in `talk`."""
    if prompt is not None:
        return complete(model, language, generate, limit, samples, prompt)
    print('Type a prompt and Enter; end with Ctrl-D.', file=sys.stderr)
    while True:
        try:
            complete(model, language, generate, limit, samples, typed())
        except ValueError as error:                             # this prompt was no good, the next may be
            print(f'sample.py: {error}', file=sys.stderr)
        except EOFError:
            return print()


def complete(model, language, generate, limit, samples, prompt):
    """Print continuations of at most `limit` tokens: a single one as it comes, several one after the other."""
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
        generate([tokens], min(room, limit), stream=lambda row, token: printer(token))
        printer.finish()
        return print()
    for i, new in enumerate(generate([tokens] * samples, min(room, limit))):
        print(f'--- sample {i}\n{prompt}{language.decode([token for token in new if token not in language.stop])}')
