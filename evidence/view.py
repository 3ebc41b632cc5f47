"""Write one HTML page that shows what a model computes for one question. The page needs no network.

    python -m evidence.view --ckpt=runs/loops --question=4x:a-2b*7c+3=5 --open=True
    python -m evidence.view --ckpt=runs/demo --question='class Stack:'

The first runs Markovian RSA on a problem of the loops task, as rsa.py does with the same seed, and shows which tails
each candidate sampled, where outputs go wrong, and how errors are outvoted. The second continues a text, as sample.py
does; a released folder works in the same way. Both show texts token by token (router, attention, residual stream) and,
if the run has a log.csv, the expert load during training. docs/run.html is an example, with config/loops.py's model:

    python -m evidence.view --ckpt=runs/loops --question=4x:a-5b-3c+2d+2=2 --out=docs/run.html

The model is observed from outside, by forward hooks and by wrappers of the functions that it calls. Texts are stored as
JSON in which each `<` is written \\u003c, so that no text can close the script element; view.html inserts them as text.

Legend:  S tokens of a text   L layers   H query heads   G query heads per KV head   M router classes   d head dim
"""
import base64
import contextlib
import csv
import json
import math
import os
import re
import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import configurator
from evidence.claims import replaced
from evidence.plot import by_layer, read_log
from evidence.rl import ends_and_vote, state, what_went_wrong
from router import load_entropy
from rsa import RSASettings, load_policy, markovian_rsa
from runtime import pretrained
from runtime.device import pick_device
from sample import SamplingOptions, generate
from tasks import problems
from tasks.loops import task

TEMPLATE = Path(__file__).with_suffix('.html')
LIMIT = 500_000                 # bytes per page
NEW = 80                        # tokens generated after a prompt that is no loops problem
POINTS = 10_000                 # of all training curves together


@dataclass
class ViewConfig:
    ckpt: str = 'runs/loops'        # a run folder of train.py, or a released folder
    question: str = '-'             # a problem or, for other models, a prompt; '-': the first held-out 'hard' problem
    out: str = ''                   # the page; '': view.html in that folder
    open: bool = False              # open it in the browser
    seed: int = 0

    def __post_init__(self):
        configurator.check_ranges(self, seed=(0, 2**31))
        if self.out and Path(self.out).suffix != '.html':
            raise ValueError(f'out is {self.out!r}: name a file that ends in .html')


# ---- rounds of RSA ----

def run_rsa(policy, question, seed):
    """Run Markovian RSA on a problem of the loops task. Return what the page shows of it, and the Rounds."""
    problem = task.parse(question)
    settings = RSASettings(seed=seed).resolved(task.rounds_needed(problem.steps, 41), 41, 10, 41)        # as in rsa.py
    problems.check_room(policy, [question], settings)
    rounds, = markovian_rsa([policy.encode(question)], policy.sampler(SamplingOptions(seed=seed)), policy, settings)
    answers = [policy.decode(c.answer) if c.answer else None for c in rounds[-1].candidates]
    cells = [[show_candidate(problem, c, [before.candidates[j].tail for j in c.sampled], settings.budget)
              for c in now.candidates] for before, now in zip([None, *rounds], rounds)]
    return {'question': question, 'steps': problem.steps, 'answer': task.solve(question), 'rounds': cells,
            'answers': answers, 'tokens': sum(now.tokens for now in rounds), 'budget': settings.budget,
            'tail': settings.tail}, rounds


def show_candidate(problem, candidate, tails, budget):
    """Return what the page shows of a candidate whose prompt holds these tails. wrong: from what_went_wrong, None for a
    correct output. pieces: from mark_errors. end: where its own tail ends. vote: the majority vote of the tails."""
    text, tail = task.ENC.decode(candidate.output), task.ENC.decode(task.without_end(candidate.tail))
    ends, vote = ends_and_vote(problem, tails)
    wrong = what_went_wrong(problem, tails, candidate.output, budget)
    pieces = mark_errors(problem, text, {done for done, _ in ends})
    if wrong and 'wrong' not in [mark for _, mark in pieces]:   # all pieces are correct, but the output ends too early
        pieces[-1][1] = 'wrong'
    return {'sampled': candidate.sampled, 'wrong': wrong, 'pieces': pieces, 'tail': tail,
            'end': show_state(problem, *state(problem, tail)),
            'vote': show_state(problem, *vote) if vote and tails else None}


def show_state(problem, done, value):
    """Return a value after `done` steps, and whether it is correct. done: None if a text does not end in a step."""
    return {'done': done, 'value': value, 'right': done is not None and value == task.value_at(problem, done)}


def mark_errors(problem, text, starts):
    """Split an output into [piece, mark]: the first value, the steps, the answer. mark: 'wrong' for the first error,
    'after' for all later pieces, else ''. starts: numbers of steps after which the output may start."""
    step = r'[1-9][a-z][-+*]\d=\d'
    pieces = re.findall(rf'{step}|</think>\d?|<\|end\|>|[^<]+?(?={step}|<|$)|.', text, re.S)
    start = task.steps_at_start(problem, text)
    chain = [(done, task.value_at(problem, done))
             for done in range(problem.steps if start is None else start, problem.steps + 1)]
    expected = [*task.step_texts(problem, chain), f'</think>{chain[-1][1]}', '<|end|>', *[''] * len(pieces)]

    def is_wrong(i):
        cut = i == len(pieces) - 1 and expected[i].startswith(pieces[i])        # by the budget
        return pieces[i] != expected[i] and not cut or i == 1 and start not in starts
    first = next(filter(is_wrong, range(len(pieces))), len(pieces))
    return [[piece, 'wrong' if i == first else 'after' if i > first else ''] for i, piece in enumerate(pieces)]


def notable(rounds):
    """Return (round, index) of the candidates to show token by token: the first correct one that sampled a wrong tail,
    and the first wrong one; without errors, the last one."""
    cells = [(t, i, cell) for t, candidates in enumerate(rounds) for i, cell in enumerate(candidates)]
    outvoted = [(t, i) for t, i, cell in cells
                if not cell['wrong'] and not all(rounds[t - 1][j]['end']['right'] for j in cell['sampled'])]
    return [*outvoted[:1], *[(t, i) for t, i, cell in cells if cell['wrong']][:1]] or [cells[-1][:2]]


# ---- a text, token by token ----

def attention_weights(q, k):
    """Return softmax(q k^T / sqrt(d)), causal, which scaled_dot_product_attention does not return.
    q (1, H, S, d), k (1, H / G, S, d) -> (H, S, S) float32."""
    q, k = q[0].float(), k[0].float().repeat_interleave(q.shape[1] // k.shape[1], 0)        # (H, S, d) each
    causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~causal, -torch.inf).softmax(-1)


@torch.no_grad()
def observe(model, tokens):
    """Run a model on a list of tokens. Return expert (L, S), probs (L, S, M) without the balancing bias, attention
    (L, H, S, S), and rms (2 L + 1, S) of the residual stream: after the embedding and after each sublayer."""
    experts, probs, attention, rms = [], [], [], []
    attend = F.scaled_dot_product_attention

    def observed_attend(q, k, v, **settings):
        attention.append(attention_weights(q, k))
        return attend(q, k, v, **settings)

    def observed(choose):
        def observed_choose(p, bias):
            expert, weight = choose(p, bias)
            experts.append(expert[0])
            probs.append(p[0])
            return expert, weight
        return observed_choose
    measure = lambda x: rms.append(x[0].float().square().mean(-1).sqrt())
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(F, scaled_dot_product_attention=observed_attend))
        for router in model.routers:
            stack.enter_context(replaced(router, choose=observed(router.choose)))
        stack.enter_context(model.layers[0].register_forward_pre_hook(lambda module, args: measure(args[0])))
        for sublayer in (part for layer in model.layers for part in (layer.attn_residual, layer.moe_residual)):
            stack.enter_context(sublayer.register_forward_hook(lambda module, args, out: measure(out)))
        model(torch.tensor([tokens], device=model.device))
    return tuple(torch.stack(values).cpu() for values in (experts, probs, attention, rms))


def show_text(model, decode, tokens, n_prompt):
    """Return what the page shows of a text whose first n_prompt tokens are the prompt. probs are thousandths. attention
    is, per token t, the base64 of L H (t + 1) bytes, [layer][head][position]. A byte is 255 sqrt(weight), because most
    weights are small."""
    experts, probs, attention, rms = observe(model, tokens)
    levels = (255 * attention.sqrt()).round().byte()
    rounded = lambda x, digits: [[round(value, digits) for value in values] for values in x.tolist()]
    return {'tokens': [decode([token]) for token in tokens], 'n_prompt': n_prompt, 'expert': experts.tolist(),
            'probs': (1000 * probs).round().int().tolist(), 'entropy': rounded(load_entropy(probs), 3),
            'attention': [base64.b64encode(levels[:, :, t, :t + 1].numpy().tobytes()).decode()
                          for t in range(len(tokens))], 'rms': rounded(rms, 4)}


def tokens_that_fit(config, size):
    """Return how many tokens of a text fit into `size` bytes of a page: 4/3 bytes per attention weight, and the other
    values per token and layer."""
    L, M = config.n_layer, config.n_expert + config.skip_expert
    needed = lambda S: S * (L * (config.n_head * (S + 1) * 2 / 3 + 5 * M + 30) + 60)
    return next((S for S in range(config.context, 0, -1) if needed(S) < size), 0)


def show_notable(model, decode, cells, rounds, size):
    """Return the texts of the notable candidates that fit into `size` bytes; the first one is truncated to fit."""
    texts = []
    for t, i in notable(cells):
        c, most = rounds[t].candidates[i], tokens_that_fit(model.config, size)
        tokens = [*c.prompt, *c.output]
        if not texts or len(tokens) <= most:
            texts.append(show_text(model, decode, tokens[:most], len(c.prompt)) | {'cell': [t, i]})
            size -= len(json.dumps(texts[-1]))
    return texts


def show_completion(model, language, question, seed, size):
    """Return the text that a model generates after a prompt."""
    prompt, most = [*language.bos, *language.encode(question)], tokens_that_fit(model.config, size)
    if not prompt or len(prompt) >= most:
        raise ValueError(f'question has {len(prompt)} tokens: a page has room for 1 to {most - 1} of this model')
    output, = generate(model, [prompt], min(NEW, most - len(prompt)), SamplingOptions(seed=seed), stop=language.stop)
    return show_text(model, language.decode, [*prompt, *output], len(prompt))


# ---- the run ----

def training_curves(folder):
    """Return the curves of a run's log as {kind: [curves of a layer]}, {} without a log. A curve is [steps, values].
    'load' (fraction of tokens) and 'bias' have one curve per expert if they were logged, 'entropy' has one."""
    if not os.path.exists(os.path.join(folder, 'log.csv')):
        return {}
    try:
        log = read_log(folder)
    except csv.Error as error:
        raise ValueError(f'{folder}: log.csv was not written by train.py: {error}') from None
    entropy = by_layer(log, 'entropy')
    found = {kind: [by_layer(log, f'{kind}_{layer}') for layer in range(len(entropy))] for kind in ('load', 'bias')}
    found = {kind: curves for kind, curves in found.items() if all(curves)} | {'entropy': [[c] for c in entropy]}
    most = max(2, POINTS // sum(len(of_layer) for curves in found.values() for of_layer in curves))
    return {kind: [[thin_out(*curve, most) for curve in of_layer] for of_layer in curves]
            for kind, curves in found.items()}


def thin_out(steps, values, most):
    """Return at most `most` points of a curve, with the last one. Values that are not finite become None."""
    every = math.ceil(len(steps) / most)
    kept = slice((len(steps) - 1) % every, None, every)
    return [[round(step) for step in steps[kept]],
            [float(f'{value:.4g}') if math.isfinite(value) else None for value in values[kept]]]


def page(shown):
    text = json.dumps(shown, separators=(',', ':'), allow_nan=False).replace('<', '\\u003c')
    return TEMPLATE.read_text(encoding='utf-8').replace('{{shown}}', text)


def view(config):
    """Return everything that the page shows. Raise ValueError if the folder or the question cannot be used."""
    device = pick_device('auto')
    model, language = pretrained.load(config.ckpt, device)
    sizes, loops = model.config, language.digest == task.DIGEST
    if not loops and config.question == '-':
        raise ValueError(f'{config.ckpt} needs a --question: a text to continue')
    shown = {'folder': config.ckpt, 'n_layer': sizes.n_layer, 'n_head': sizes.n_head, 'n_kv_head': sizes.n_kv_head,
             'n_expert': sizes.n_expert, 'n_class': sizes.n_expert + sizes.skip_expert, 'rsa': None,
             'training': training_curves(config.ckpt),
             'bias': [[round(b, 4) for b in router.balancing_bias.tolist()] for router in model.routers]}
    free = lambda: LIMIT - 2000 - len(page(shown).encode())
    if loops:
        question = config.question if config.question != '-' else task.test_problems('hard', 1)[0].question
        shown['rsa'], rounds = run_rsa(load_policy(config.ckpt, device), question, config.seed)
        shown['texts'] = show_notable(model, language.decode, shown['rsa']['rounds'], rounds, free())
    else:
        shown['texts'] = [show_completion(model, language, config.question, config.seed, free())]
    return shown


def main(config):
    out = Path(config.out or Path(config.ckpt, 'view.html'))
    out.write_text(page(view(config)), encoding='utf-8')
    print(out)
    if config.open:
        webbrowser.open(out.resolve().as_uri())


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.view'):
        main(*configurator.read(sys.argv[1:], ViewConfig))
