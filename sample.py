"""Sample from a model: `python sample.py --ckpt=RUN_OR_RELEASED_FOLDER --prompt='def '`, interactive without --prompt.

Generation has two phases. Prefill: all prompts go through the model at once and fill the cache (cache.py); equal
prompts are read once. Decode: one token a row and step, each step a forward over that token alone (decode.py), which
the cache makes equal to a forward over everything so far. Prompts may differ in length. A row that has ended leaves the
batch, unless the step is compiled for its size.

A token is drawn from softmax(logits / temperature), by the inverse-CDF method: lay the probabilities end to end,
likeliest first, and take the token that a uniform number u falls on. One number a row decides, so rows are independent.

Legend:  B rows   V vocabulary
"""
import functools
import sys
from dataclasses import dataclass

import torch

from runtime import pretrained
import configurator
import decode
import kernels
from runtime.chat import Conversation, chat_loop, complete_prompts
from runtime.device import pick_device


def sample_from_logits(logits, u, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one token a row. logits (B, V), u (B) uniform in [0, 1) -> (B) int64; -1 if the logits are not finite.

    Unlikely tokens can be dropped before: all but the top_k likeliest (0: keep all); those beyond a total probability
    of top_p; those below min_p times the likeliest. temperature 0 takes the likeliest token.
    """
    largest, token = logits.float().max(-1, keepdim=True)                       # (B, 1) each
    broken = ~largest[:, 0].isfinite()                          # the largest of numbers is NaN if one of them is
    if temperature == 0:
        return token[:, 0].masked_fill(broken, -1)
    x = (logits.float() - largest) / max(temperature, 1e-30)    # below, differences would become 0 / 0
    probs, token = x.softmax(-1).sort(-1, descending=True)                      # (B, V) each
    keep = (probs.cumsum(-1) - probs < top_p) & (probs >= min_p * probs[:, :1])    # before a token lies less than top_p
    if top_k:
        keep[:, top_k:] = False
    keep[:, 0] = True                                           # the likeliest always stays
    cdf = (probs * keep).cumsum(-1)
    chosen = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)                     # first with cdf > u
    chosen = chosen.minimum(keep.sum(-1, keepdim=True) - 1)     # rounding must not carry u past the last kept token
    return token.gather(1, chosen)[:, 0].masked_fill(broken, -1)


def prefill(model, prompts, capacity, cache=None):
    """Read B prompts, lists of tokens -> a Cache of that capacity that holds them, and the logits (B, V) after each.
    cache: one that holds what comes before the prompts."""
    unique = prompts if cache else list(dict.fromkeys(map(tuple, prompts)))     # of equal prompts one is read
    lengths = [len(prompt) for prompt in unique]
    padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in unique]
    cache = cache or model.make_cache(len(unique), 0)
    cache.grow(capacity)
    logits, _ = model(torch.tensor(padded, device=model.device), cache=cache, n_new=lengths, last_only=True)
    if len(unique) < len(prompts):
        copies = [unique.index(tuple(prompt)) for prompt in prompts]
        cache.keep(copies)
        logits = logits[copies]
    return cache, logits[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, stop=(), seed=0,
             stream=None, compiled=False, step=None, cache=None, watch=lambda *step: None):
    """Continue each prompt, a list of tokens of any length. Return the new tokens of each, as lists.

    A row ends after max_new_tokens, or with the first token in `stop`, which is its last token then. Each row has a
    random generator of its own, made from (seed, row number): up to rounding, its tokens do not depend on its
    neighbours. stream(row, token), if given, is called for every new token. The options of sampling are those of
    sample_tokens. compiled: decode.compiled makes the steps, and finished rows stay until the last one ends. step: the
    function of decode.py that makes them, if it is at hand. cache: a Cache that holds what comes before the prompts.
    watch(rows, logits, drawn) sees every step: which rows are in the batch, their logits (B, V), their tokens (B).
    Raises ValueError for an empty prompt, a token outside the vocabulary, what does not fit the context, and NaN.
    """
    held = cache.lengths if cache else [0] * len(prompts)
    check_prompts(model.config, prompts, max_new_tokens, held)
    outputs = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return outputs
    was_training = model.training
    model.eval()
    try:
        # Every row draws all its random numbers now, from a generator of its own. (hash of ints is always the same.)
        u = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(hash((seed, row))))
                         for row in range(len(prompts))]).to(model.device)                      # (B, max_new_tokens)
        longest = max(old + len(prompt) for old, prompt in zip(held, prompts))
        largest = longest + max_new_tokens
        if compiled:                                            # the next power of two: compiled once for many lengths
            longest = largest = min(model.config.context, 1 << (largest - 1).bit_length())
        cache, logits = prefill(model, prompts, min(largest, longest + 256), cache)             # logits (B, V)
        step = step or (decode.compiled(model) if compiled else decode.folded(model))
        rows = growing = list(range(len(prompts)))              # rows still in the batch; of these, where some grow
        for t in range(max_new_tokens):
            next_tokens = sample_from_logits(logits, u[rows, t], temperature, top_k, top_p, min_p)   # (B)
            watch(rows, logits, next_tokens)
            drawn = next_tokens.tolist()
            if min(drawn) < 0:
                raise ValueError('the logits are not finite: the weights are damaged, or too large for their dtype')
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
            if max(cache.lengths) == cache.capacity:
                cache.grow(min(largest, 2 * cache.capacity))
            logits = step(cache, next_tokens)                                                   # (B, V)
    finally:                                                    # also if stream raises, or Ctrl-C comes
        model.train(was_training)
    return outputs


def check_prompts(config, prompts, max_new_tokens, held):
    """Raise ValueError for a prompt that `generate` cannot continue. held: how many tokens come before each."""
    for row, (prompt, before) in enumerate(zip(prompts, held, strict=True)):
        if not prompt:
            raise ValueError(f'prompt {row} is empty: give at least one token')
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise ValueError(f'prompt {row} holds a token outside the vocabulary of {config.vocab_size}')
        if before + len(prompt) + max_new_tokens > config.context:
            raise ValueError(f'prompt {row} has {before + len(prompt)} tokens; with {max_new_tokens} new ones that is '
                             f'more than the context of {config.context}')


# The report's sampling (Table VII): mathematics, knowledge and instructions; code, agents and style.
PRESETS = {'math': dict(temperature=1.0, top_p=0.95, top_k=0), 'code': dict(temperature=0.6, top_p=0.95, top_k=20)}


@dataclass
class SampleConfig:
    ckpt: str = 'runs/small'        # a run folder of train.py, or a folder in the released layout
    prompt: str = ''                # without one, prompts are read from the terminal
    max_new_tokens: int = 0         # 0: 200; in a conversation, as many as the context has room for
    num_samples: int = 1            # samples of the same prompt, drawn together in one batch
    temperature: float = 1.0        # below 1: safer, above 1: wilder, 0: always the likeliest token
    top_k: int = 0                  # see sample_tokens
    top_p: float = 1.0
    min_p: float = 0.0              # with 1e-5, gibberish in ZAYA1's replies fell from 19.9 to 0.1 % (report, App. E)
    preset: str = ''                # the report's sampling, 'math' or 'code'; what else is given overrides it
    compile: bool = False           # torch.compile: half a minute to start, for a token in half the time
    chat: bool = False              # a conversation; with a prompt, one turn of it
    think: bool = True              # in a conversation: with reasoning, where the model can do without
    show_think: bool = True         # False: hide the reasoning
    kernel: str = 'torch'           # 'hip' or 'auto': CCA's own kernel reads the prompts, see kernels/README.md
    seed: int = 0
    device: str = 'auto'

    def __post_init__(self):
        configurator.check_ranges(self, max_new_tokens=(0, 10**9), num_samples=(1, 10**6), temperature=(0, 1e9),
                                  top_k=(0, 10**9), top_p=(0, 1), min_p=(0, 1), seed=(0, 2**31),
                                  preset=('', *PRESETS), kernel=('torch', 'hip', 'auto'))


def main(arguments):
    config, = configurator.read(arguments, SampleConfig)
    if config.preset:
        config, = configurator.read(arguments, SampleConfig, **PRESETS[config.preset])
    model, language = pretrained.load(config.ckpt, pick_device(config.device))
    kernels.use(model, config.kernel, model.dtype)
    options = {key: getattr(config, key) for key in ('temperature', 'top_k', 'top_p', 'min_p', 'seed')}
    options['step'] = decode.compiled(model) if config.compile else decode.folded(model)
    reply = functools.partial(generate, model, stop=language.stop, compiled=config.compile, **options)
    prompt = config.prompt if config.prompt or '--prompt=' in arguments else None   # empty on purpose: gets its error
    if config.chat:
        chat_loop(Conversation(model, language, config.think), reply, config.max_new_tokens, config.show_think, prompt)
    else:
        complete_prompts(model, language, reply, config.max_new_tokens or 200, config.num_samples, prompt)


if __name__ == '__main__':
    with configurator.one_line_errors('sample.py', 'try fewer or shorter samples, or --device=cpu'):
        main(sys.argv[1:])
