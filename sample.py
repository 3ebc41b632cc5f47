"""Sample from a trained model: `python sample.py --ckpt=RUN_OR_RELEASED_FOLDER --prompt='def '`, interactive without --prompt.

Generation has two phases. Prefill: all prompts go through the model at once and fill the cache (cca.py); what several
rows share is read once. Decode: one token a row and step, each step a forward over that token alone (decode.py),
which the cache makes equal to a forward over everything so far. Prompts may differ in length, and a row that has finished
leaves the batch, unless the step is compiled for its size.
"""
import os
import sys
from dataclasses import dataclass

import torch

import configurator
import decode
from data.reasoning import prompt_tokens
from data.tokenizer import load_tokenizer
from model import Zaya, ZayaConfig, load_checkpoint, read_json


def pick_device(name):
    """'auto' or the name of a torch device -> torch.device. Raises ValueError if it is not there."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:        # torch has no one way to say no
        raise ValueError(f'device {name!r} cannot be used here ({str(error).splitlines()[0]}); try --device=cpu') from None
    return torch.device(name)


def sample_tokens(logits, u, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one token a row. logits (B, V), u (B) uniform in [0, 1) -> (B) int64.

    The inverse-CDF method: lay the probabilities end to end, likeliest first, and take the token that u falls on. One
    number a row decides, so rows are independent. Before that, unlikely tokens can be dropped: all but the top_k
    likeliest (0: keep all); the tail beyond a total probability of top_p; those below min_p times the likeliest.
    temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, token = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)         # (B, V) each
    keep = (probs.cumsum(-1) - probs < top_p) & (probs >= min_p * probs[:, :1])     # before a token lies less than top_p
    if top_k:
        keep[:, top_k:] = False
    keep[:, 0] = True                                           # the likeliest always stays
    cdf = (probs * keep).cumsum(-1)
    chosen = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)                     # first with cdf > u
    chosen = chosen.minimum(keep.sum(-1, keepdim=True) - 1)     # rounding must not carry u past the last kept token
    return token.gather(1, chosen)[:, 0]


def prefill(model, prompts, capacity, least=8):
    """prompts: B lists of token ids -> a Cache of that capacity that has read them, and the logits (B, V) after each.

    What is shared is read once: of equal prompts one, and first of all what neighbours in the list begin with, a question say,
    if that has `least` tokens, enough to pay for a forward more.
    """
    unique = {tuple(prompt): row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    heads, head_of = [], []                                     # the shared beginnings, and which of them each unique prompt has
    for prompt in unique:
        common = os.path.commonprefix([heads[-1], prompt[:-1]]) if heads else ()                # despite its name, of any tuples
        if len(common) >= least:
            heads[-1] = common                                  # all of this group begin so
        else:
            heads.append(prompt[:-1])                           # a new group; the last token is left, to have logits
        head_of.append(len(heads) - 1)
    cache = model.make_cache(len(heads), capacity)

    def read(rows):
        """The next tokens of each row of the cache -> logits (B, V)."""
        lengths = [len(row) for row in rows]
        padded = [[*row] + [0] * (max(lengths) - len(row)) for row in rows]
        return model(torch.tensor(padded, device=model.device), cache=cache, n_new=lengths, last_only=True)[0][:, 0]

    if len(heads) == len(unique):                               # nobody shares
        logits = read(unique)
    else:
        read(heads)
        cache.keep(head_of)
        logits = read([prompt[len(heads[head]):] for prompt, head in zip(unique, head_of)])
    if len(unique) < len(prompts):
        copies = [unique[tuple(prompt)] for prompt in prompts]
        cache.keep(copies)
        logits = logits[copies]
    return cache, logits


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, stop=(), seed=0, stream=None,
             compiled=False):
    """prompts: lists of token ids, of any lengths -> the new tokens of each, as lists.

    A row ends after max_new_tokens, or with the first token in `stop`, which is its last token then. Each row has a
    random generator of its own, made from (seed, row number): its tokens do not depend on its neighbours. stream(row,
    token), if given, is called for every new token. The options of sampling are those of sample_tokens. compiled: by
    decode.compiled, which must be written first, and computes finished rows as well until the last one ends.
    Raises ValueError for an empty prompt, a token outside the vocabulary, and what does not fit the context.
    """
    config = model.config
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f'prompt {row} is empty: give at least one token')
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise ValueError(f'prompt {row} holds a token outside the vocabulary of {config.vocab_size}')
        if len(prompt) + max_new_tokens > config.context:
            raise ValueError(f'prompt {row} has {len(prompt)} tokens; with {max_new_tokens} new ones that is more than '
                             f'the context of {config.context}')
    outputs = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return outputs
    was_training = model.training
    model.eval()
    try:
        # Every row draws all its random numbers now, from its own generator. (Python's hash of ints is the same in every process.)
        u = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(hash((seed, row))))
                         for row in range(len(prompts))]).to(model.device)                      # (B, max_new_tokens)
        longest = capacity = max(map(len, prompts)) + max_new_tokens
        if compiled:                                            # the next power of two: compiled once for many lengths
            capacity = min(config.context, 1 << (longest - 1).bit_length())
        cache, logits = prefill(model, prompts, capacity)                                       # logits (B, V)
        rows = list(range(len(prompts)))                        # row numbers of those still in the batch
        alive = range(len(rows))                                # places in the batch of those still growing
        folded, step = decode.fold(model), decode.step
        if compiled:
            cache, step = decode.StaticCache(cache), decode.compiled(model.device.type)
        for t in range(max_new_tokens):
            next_tokens = sample_tokens(logits, u[rows, t], temperature, top_k, top_p, min_p)
            tokens = next_tokens.tolist()
            for i in alive:
                outputs[rows[i]].append(tokens[i])
                if stream:
                    stream(rows[i], tokens[i])
            alive = [i for i in alive if tokens[i] not in stop]
            if not alive or t == max_new_tokens - 1:
                break
            if len(alive) < len(rows) and not compiled:         # the finished rows leave
                rows = [rows[i] for i in alive]
                next_tokens = next_tokens[alive]
                cache.keep(alive)
                alive = range(len(rows))
            logits = step(model, folded, cache, next_tokens)                                    # (B, V)
    finally:                                                    # also if stream raises, or Ctrl-C comes
        model.train(was_training)
    return outputs


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
    chat: bool = False              # the prompt is a user's turn, as a run trained on conversations (data/chat) has seen them
    seed: int = 0
    device: str = 'auto'

    def __post_init__(self):
        for key, low, high in (('max_new_tokens', 1, 10**9), ('num_samples', 1, 10**6), ('temperature', 0, 1e9),
                               ('top_k', 0, 10**9), ('top_p', 0, 1), ('min_p', 0, 1), ('seed', 0, 2**31)):
            if not low <= getattr(self, key) <= high:
                raise ValueError(f'{key} is {getattr(self, key)}, it must lie between {low} and {high:g}')


def load(folder, device, chat=False):
    """A run folder or a released one -> model (in eval mode), encode(text) -> ids, decode(ids) -> text, stop ids.
    chat: encode puts the text into a user's turn. Raises ValueError if the folder is neither, or knows no turns."""
    if not os.path.isdir(folder):
        raise ValueError(f'{folder}: no such folder; train a model first (make demo), or name another with --ckpt')
    if os.path.exists(os.path.join(folder, 'config.json')):     # the released layout
        if chat:
            raise ValueError(f'chat is for runs of train.py: ask {folder}, a released model, with `python rsa.py --question=...`')
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError("a released folder needs the package tokenizers: pip install tokenizers") from None
        model = Zaya.from_pretrained(folder, device)
        path = os.path.join(folder, 'tokenizer.json')
        try:
            tokenizer = Tokenizer.from_file(path)
        except Exception as error:                              # tokenizers raises plain Exception
            raise ValueError(f'{path}: cannot be read ({error})') from None
        eos = read_json(os.path.join(folder, 'config.json')).get('eos_token_id', 106)       # the default of transformers' ZayaConfig
        stop = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return (model, lambda text: tokenizer.encode(text).ids,
                lambda ids: tokenizer.decode(ids, skip_special_tokens=False), stop)
    checkpoint = load_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f'{folder}: holds neither a checkpoint of train.py (ckpt.pt) nor a released model (config.json)')
    model = Zaya(ZayaConfig(**checkpoint['model_config'] | {'kernel': 'auto'})).to(device).eval()      # this machine's kernel
    model.load_state_dict(checkpoint['model'])
    tokenizer = load_tokenizer(os.path.join(folder, 'bpe.json'))
    ends = [name for name in ('<|endoftext|>', '<|end|>') if name in tokenizer.special_tokens_set]      # document, turn
    encode = (lambda text: prompt_tokens([{'role': 'user', 'content': text}], tokenizer)) if chat else tokenizer.encode_ordinary
    return model, encode, tokenizer.decode, [tokenizer.encode_single_token(name) for name in ends]


def complete(model, encode, decode, stop, prompt, config):
    """Print config.num_samples continuations of `prompt`: a single one as it comes, several one after the other."""
    ids = encode(prompt)
    room = model.config.context - len(ids)
    if ids and room < 1:
        raise ValueError(f'the prompt has {len(ids)} tokens, and the context {model.config.context}: shorten it')
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
    samples = generate(model, [ids] * config.num_samples, min(room, config.max_new_tokens), config.temperature, config.top_k,
                       config.top_p, config.min_p, stop, config.seed, stream if single else None,
                       compiled=config.compile)
    if single:
        print(decode(samples[0])[shown:])                       # the sample may end inside a character
    else:
        print(*(f'--- sample {i}\n{prompt}{decode(new)}' for i, new in enumerate(samples)), sep='\n')


if __name__ == '__main__':
    with configurator.one_line_errors('sample.py', 'try fewer or shorter samples, or --device=cpu'):
        config, = configurator.read(sys.argv[1:], SampleConfig)
        model_and_tokenizer = load(config.ckpt, pick_device(config.device), config.chat)
        if config.prompt or '--prompt=' in sys.argv:            # an empty prompt on purpose gets its error
            complete(*model_and_tokenizer, config.prompt, config)
        else:
            print('Type a prompt and Enter; end with Ctrl-D.', file=sys.stderr)
            while True:
                try:
                    prompt = input('> ' if sys.stdin.isatty() else '')
                    complete(*model_and_tokenizer, prompt, config)
                except ValueError as error:                     # this prompt was no good, the next may be
                    print(f'sample.py: {error}', file=sys.stderr)
                except EOFError:
                    print()
                    break
