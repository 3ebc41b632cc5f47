"""Sample from a model: `python sample.py --ckpt=RUN_OR_RELEASED_FOLDER --prompt='def '`, interactive without --prompt.

Generation has two phases. Prefill: one forward pass over all prompts fills the KV cache (cache.py); equal prompts are
computed once. Decode: each step is a forward pass over one token per sequence (decode.py), which the cache makes equal
to a forward pass over the whole sequence. A finished sequence leaves the batch, unless decoding is compiled.

Tokens are sampled from softmax(logits / temperature) by the inverse-CDF method: sort the tokens by probability, and
take the first one whose cumulative probability exceeds a uniform number u. Every sequence has its own random generator.

Legend:  B sequences   V vocabulary
"""
import functools
import sys
from dataclasses import dataclass

from configurator import check_ranges, one_line_errors, read, refuse_unused      # before torch, see configurator.py
import torch

import decode
import kernels
from runtime import pretrained
from runtime.chat import Conversation, chat_loop, complete_prompts
from runtime.device import pick_device


@dataclass(frozen=True)
class SamplingOptions:
    temperature: float = 1.0        # below 1: more likely tokens; above 1: more random; 0: always the likeliest token
    top_k: int = 0                  # keep only the top_k likeliest tokens; 0: all
    top_p: float = 1.0              # keep the fewest likeliest tokens with this total probability
    min_p: float = 0.0              # drop tokens below min_p times the largest probability (report, App. E: 1e-5)
    seed: int = 0                   # of the random numbers

    def __post_init__(self):
        check_ranges(self, temperature=(0, 1e9), top_k=(0, 10**9), top_p=(0, 1), min_p=(0, 1))


def sample_from_logits(logits, u, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Sample one token per sequence. logits (B, V), u (B) uniform in [0, 1) -> (B) int64; -1 if logits are not finite.
    The options are those of SamplingOptions. The likeliest token is never dropped."""
    largest, token = logits.float().max(-1, keepdim=True)                       # (B, 1) each
    broken = ~largest[:, 0].isfinite()                          # the maximum is NaN if any logit is
    if temperature == 0:
        return token[:, 0].masked_fill(broken, -1)
    x = (logits.float() - largest) / max(temperature, 1e-30)    # a smaller temperature would give 0 / 0
    probs, token = x.softmax(-1).sort(-1, descending=True)                      # (B, V) each
    keep = (probs.cumsum(-1) - probs < top_p) & (probs >= min_p * probs[:, :1])    # sum of likelier tokens < top_p
    if top_k:
        keep[:, top_k:] = False
    keep[:, 0] = True
    cdf = (probs * keep).cumsum(-1)
    chosen = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)                     # first with cdf > u
    chosen = chosen.minimum(keep.sum(-1, keepdim=True) - 1)     # rounding must not select a dropped token
    return token.gather(1, chosen)[:, 0].masked_fill(broken, -1)


def prefill(model, prompts, capacity, cache=None):
    """Run the model on the prompts, B lists of tokens. Return their Cache, of the given capacity, and the logits (B, V)
    of each prompt's last token. cache: holds the tokens before the prompts, if there are any."""
    unique = prompts if cache else list(dict.fromkeys(map(tuple, prompts)))
    lengths = [len(prompt) for prompt in unique]
    padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in unique]
    cache = cache or model.make_cache(len(unique), 0)           # grown in the next line
    cache.grow(capacity)
    logits, _ = model(torch.tensor(padded, device=model.device), cache=cache, n_new=lengths, last_only=True)
    if len(unique) < len(prompts):
        copies = [unique.index(tuple(prompt)) for prompt in prompts]
        cache.keep(copies)
        logits = logits[copies]
    return cache, logits[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, options=SamplingOptions(), *, stop=(), stream=lambda *_: None,
             step=None, cache=None, watch=lambda *_: None):
    """Continue each prompt, a list of tokens of any length. Return the new tokens of each, as lists.

    A sequence ends after max_new_tokens or with its first token in `stop`. Up to rounding, its tokens do not depend on
    the other sequences of the batch. stream(i, token) is called with every new token of prompt i; watch(active, logits,
    tokens) once per step with the prompt indices of the batch, their logits (B, V) and sampled tokens (B). step: the
    decode step, by default decode.folded(model) (merged weights). cache: a Cache that holds the tokens before the
    prompts. Raises ValueError for prompts that check_prompts refuses, and for logits that are not finite.
    """
    held = cache.lengths if cache else [0] * len(prompts)
    check_prompts(model.config, prompts, max_new_tokens, held)
    outputs = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return outputs
    step, was_training = step or decode.folded(model), model.training
    longest = max(before + len(prompt) for before, prompt in zip(held, prompts))
    limit, capacity = longest + max_new_tokens, longest + min(max_new_tokens, 256)
    if step.static_shapes:                                      # powers of two, so that it compiles for few capacities
        limit = capacity = min(model.config.context, 1 << (limit - 1).bit_length())
    model.eval()
    try:
        # Sequence i has its own generator, seeded by (options.seed, i). The hash of integers is the same everywhere.
        u = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(hash((options.seed, i))))
                         for i in range(len(prompts))]).to(model.device)                        # (B, max_new_tokens)
        cache, logits = prefill(model, prompts, capacity, cache)                                # logits (B, V)
        active = unfinished = list(range(len(prompts)))         # prompt of each batch entry; entries not ended
        for t in range(max_new_tokens):
            tokens = sample_from_logits(logits, u[:, t], options.temperature, options.top_k, options.top_p,
                                        options.min_p)                                          # (B)
            watch(active, logits, tokens)
            sampled = tokens.tolist()
            if min(sampled) < 0:
                raise ValueError('the logits are not finite: the weights are damaged, or too large for their dtype')
            for i in unfinished:
                outputs[active[i]].append(sampled[i])
                stream(active[i], sampled[i])
            unfinished = [i for i in unfinished if sampled[i] not in stop]
            if not unfinished or t == max_new_tokens - 1:
                return outputs
            if len(unfinished) < len(active) and not step.static_shapes:        # drop finished sequences
                cache.keep(unfinished)
                active, tokens, u = [active[i] for i in unfinished], tokens[unfinished], u[unfinished]
                unfinished = list(range(len(active)))
            if max(cache.lengths) == cache.capacity:
                cache.grow(min(limit, 2 * cache.capacity))
            logits = step(cache, tokens)                                                        # (B, V)
    finally:                                                    # also after an exception in stream, or Ctrl-C
        model.train(was_training)


def check_prompts(config, prompts, max_new_tokens, held):
    """Raise ValueError for a prompt that `generate` cannot continue. held: number of tokens before each prompt."""
    for i, (prompt, before) in enumerate(zip(prompts, held, strict=True)):
        if not prompt:
            raise ValueError(f'prompt {i} is empty: give at least one token')
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise ValueError(f'prompt {i} holds a token outside the vocabulary of {config.vocab_size}')
        if before + len(prompt) + max_new_tokens > config.context:
            raise ValueError(f'prompt {i} has {before + len(prompt)} tokens; with {max_new_tokens} new ones that is '
                             f'more than the context of {config.context}')


# The report's sampling (Table VII): mathematics, knowledge and instructions; code, agents and style.
PRESETS = {'': {}, 'math': dict(temperature=1.0, top_p=0.95), 'code': dict(temperature=0.6, top_p=0.95, top_k=20)}


@dataclass
class SampleConfig:                 # these flags and those of SamplingOptions
    ckpt: str = 'runs/small'        # a run folder of train.py, or a folder in the released layout
    prompt: str = ''                # without one, prompts are read from the terminal
    max_new_tokens: int = 0         # 0: 200; in a conversation, as many as the context has room for
    num_samples: int = 1            # samples of the same prompt, generated in one batch
    preset: str = ''                # the report's sampling options, 'math' or 'code'; other flags override it
    compile: bool = False           # torch.compile: half a minute to start, then half the time per token
    chat: bool = False              # a conversation; with a prompt, one turn of it
    think: bool = True              # in a conversation: with reasoning, if the chat template makes it optional
    show_think: bool = True         # False: hide the reasoning
    kernel: str = 'torch'           # 'hip' or 'auto': prefill with the CCA kernel, see kernels/README.md
    device: str = 'auto'

    def __post_init__(self):
        check_ranges(self, max_new_tokens=(0, 10**9), num_samples=(1, 10**6), preset=[*PRESETS], kernel=kernels.KERNELS)
        unused = ('num_samples', 'with --chat=True') if self.chat else ('think show_think', 'without --chat=True')
        refuse_unused(self, *unused)


def main(arguments):
    config, _ = read(arguments, SampleConfig, SamplingOptions)
    config, options = read(arguments, SampleConfig, SamplingOptions, **PRESETS[config.preset])
    model, language = pretrained.load(config.ckpt, pick_device(config.device))
    kernels.use(model, config.kernel, model.dtype)
    step = decode.compiled(model) if config.compile else decode.folded(model)
    reply = functools.partial(generate, model, options=options, stop=language.stop, step=step)
    prompt = config.prompt if config.prompt or '--prompt=' in arguments else None   # an explicit '' is an error
    if config.chat:
        chat_loop(Conversation(model, language, config.think), reply, config.max_new_tokens, config.show_think, prompt)
    else:
        complete_prompts(model, language, reply, config.max_new_tokens or 200, config.num_samples, prompt)


if __name__ == '__main__':
    with one_line_errors('sample.py', 'try fewer or shorter samples, or --device=cpu'):
        main(sys.argv[1:])
