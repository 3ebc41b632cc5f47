"""Sample from a model: `python sample.py --ckpt=RUN_OR_RELEASED_FOLDER --prompt='def '`, interactive without --prompt.

Generation has two phases. Prefill: all prompts go through the model at once and fill the cache (cache.py); equal
prompts are read once. Decode: one token a row and step, each step a forward over that token alone (decode.py), which
the cache makes equal to a forward over everything so far. Prompts may differ in length. A row that has ended leaves the
batch, unless the step is compiled for its size.

A token is drawn from softmax(logits / temperature), by the inverse-CDF method: lay the probabilities end to end,
likeliest first, and take the token that a uniform number u falls on. One number a row decides, so rows are independent.

Legend:  B rows   V vocabulary
"""
import sys
from dataclasses import dataclass

import torch

import checkpoint
import configurator
import decode
import kernels


def sample_tokens(logits, u, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one token a row. logits (B, V), u (B) uniform in [0, 1) -> (B) int64.

    Unlikely tokens can be dropped before: all but the top_k likeliest (0: keep all); those beyond a total probability
    of top_p; those below min_p times the likeliest. temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, token = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)         # (B, V) each
    keep = (probs.cumsum(-1) - probs < top_p) & (probs >= min_p * probs[:, :1])    # before a token lies less than top_p
    if top_k:
        keep[:, top_k:] = False
    keep[:, 0] = True                                           # the likeliest always stays
    cdf = (probs * keep).cumsum(-1)
    chosen = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)                     # first with cdf > u
    chosen = chosen.minimum(keep.sum(-1, keepdim=True) - 1)     # rounding must not carry u past the last kept token
    return token.gather(1, chosen)[:, 0]


def prefill(model, prompts, capacity):
    """Read B prompts, lists of tokens -> a Cache of that capacity that holds them, and the logits (B, V) after each."""
    unique = list(dict.fromkeys(map(tuple, prompts)))           # of equal prompts one is read
    lengths = [len(prompt) for prompt in unique]
    padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in unique]
    cache = model.make_cache(len(unique), capacity)
    logits, _ = model(torch.tensor(padded, device=model.device), cache=cache, n_new=lengths, last_only=True)
    if len(unique) < len(prompts):
        place = {prompt: row for row, prompt in enumerate(unique)}
        copies = [place[tuple(prompt)] for prompt in prompts]
        cache.keep(copies)
        logits = logits[copies]
    return cache, logits[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, stop=(), seed=0,
             stream=None, compiled=False):
    """Continue each prompt, a list of tokens of any length. Return the new tokens of each, as lists.

    A row ends after max_new_tokens, or with the first token in `stop`, which is its last token then. Each row has a
    random generator of its own, made from (seed, row number): up to rounding, its tokens do not depend on its
    neighbours. stream(row, token), if given, is called for every new token. The options of sampling are those of
    sample_tokens. compiled: decode.compiled makes the steps, and finished rows stay until the last one ends.
    Raises ValueError for an empty prompt, a token outside the vocabulary, and what does not fit the context.
    """
    check_prompts(model.config, prompts, max_new_tokens)
    outputs = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return outputs
    was_training = model.training
    model.eval()
    try:
        # Every row draws all its random numbers now, from a generator of its own. (hash of ints is always the same.)
        u = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(hash((seed, row))))
                         for row in range(len(prompts))]).to(model.device)                      # (B, max_new_tokens)
        capacity = max(map(len, prompts)) + max_new_tokens
        if compiled:                                            # the next power of two: compiled once for many lengths
            capacity = min(model.config.context, 1 << (capacity - 1).bit_length())
        cache, logits = prefill(model, prompts, capacity)                                       # logits (B, V)
        step = decode.compiled(model) if compiled else decode.folded(model)
        rows = list(range(len(prompts)))                        # row numbers of those still in the batch
        growing = rows                                          # places in the batch of those that have not ended
        for t in range(max_new_tokens):
            next_tokens = sample_tokens(logits, u[rows, t], temperature, top_k, top_p, min_p)   # (B)
            drawn = next_tokens.tolist()
            for i in growing:
                outputs[rows[i]].append(drawn[i])
                if stream:
                    stream(rows[i], drawn[i])
            growing = [i for i in growing if drawn[i] not in stop]
            if not growing or t == max_new_tokens - 1:
                break
            if len(growing) < len(rows) and not compiled:       # the ended rows leave
                cache.keep(growing)
                rows, next_tokens = [rows[i] for i in growing], next_tokens[growing]
                growing = list(range(len(rows)))
            logits = step(cache, next_tokens)                                                   # (B, V)
    finally:                                                    # also if stream raises, or Ctrl-C comes
        model.train(was_training)
    return outputs


def check_prompts(config, prompts, max_new_tokens):
    """Raise ValueError for a prompt that `generate` cannot continue."""
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f'prompt {row} is empty: give at least one token')
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise ValueError(f'prompt {row} holds a token outside the vocabulary of {config.vocab_size}')
        if len(prompt) + max_new_tokens > config.context:
            raise ValueError(f'prompt {row} has {len(prompt)} tokens; with {max_new_tokens} new ones that is more than '
                             f'the context of {config.context}')


@dataclass
class SampleConfig:
    ckpt: str = 'runs/small'        # a run folder of train.py, or a folder in the released layout
    prompt: str = ''                # without one, prompts are read from the terminal
    max_new_tokens: int = 200
    num_samples: int = 1            # samples of the same prompt, drawn together in one batch
    temperature: float = 1.0        # below 1: safer, above 1: wilder, 0: always the likeliest token
    top_k: int = 0                  # see sample_tokens
    top_p: float = 1.0
    min_p: float = 0.0
    compile: bool = False           # torch.compile: half a minute to start, for a token in half the time
    chat: bool = False           # the prompt is a user's turn, for a run trained on conversations (data/chat)
    kernel: str = 'torch'           # 'hip' or 'auto': CCA's own kernel reads the prompts, see kernels/README.md
    seed: int = 0
    device: str = 'auto'

    def __post_init__(self):
        configurator.check_ranges(self, max_new_tokens=(1, 10**9), num_samples=(1, 10**6), temperature=(0, 1e9),
                                  top_k=(0, 10**9), top_p=(0, 1), min_p=(0, 1), seed=(0, 2**31),
                                  kernel=('torch', 'hip', 'auto'))


def complete(model, encode, decode, stop, prompt, config):
    """Print config.num_samples continuations of `prompt`: a single one as it comes, several one after the other."""
    tokens = encode(prompt)
    room = model.config.context - len(tokens)
    if tokens and room < 1:
        raise ValueError(f'the prompt has {len(tokens)} tokens, and the context {model.config.context}: shorten it')
    if room < config.max_new_tokens:
        print(f'(the context has room for {room} new tokens only)', file=sys.stderr)
    so_far, shown = [], 0

    def stream(row, token):
        """Print what is new of the text. A character may span several tokens: wait until it is whole."""
        nonlocal shown
        so_far.append(token)
        text = decode(so_far)
        if not text.endswith('\ufffd'):
            print(text[shown:], end='', flush=True)
            shown = len(text)

    single = config.num_samples == 1
    if single:
        print(prompt, end='\n' if config.chat else '', flush=True)
    samples = generate(model, [tokens] * config.num_samples, min(room, config.max_new_tokens), config.temperature,
                       config.top_k, config.top_p, config.min_p, stop, config.seed, stream if single else None,
                       compiled=config.compile)
    if single:
        print(decode(samples[0])[shown:])                       # the sample may end inside a character
    else:
        print(*(f'--- sample {i}\n{prompt}{decode(new)}' for i, new in enumerate(samples)), sep='\n')


def main(arguments):
    config, = configurator.read(arguments, SampleConfig)
    model, *language = checkpoint.load(config.ckpt, configurator.pick_device(config.device), config.chat)
    kernels.use(model, config.kernel, model.embedding.weight.dtype)
    if config.prompt or '--prompt=' in arguments:               # an empty prompt on purpose gets its error
        return complete(model, *language, config.prompt, config)
    print('Type a prompt and Enter; end with Ctrl-D.', file=sys.stderr)
    while True:
        try:
            complete(model, *language, input('> ' if sys.stdin.isatty() else ''), config)
        except ValueError as error:                             # this prompt was no good, the next may be
            print(f'sample.py: {error}', file=sys.stderr)
        except EOFError:
            return print()


if __name__ == '__main__':
    with configurator.one_line_errors('sample.py', 'try fewer or shorter samples, or --device=cpu'):
        main(sys.argv[1:])
