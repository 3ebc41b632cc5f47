"""A window into a run: one page of HTML, which needs no network, on what a model does with one question.

    python -m evidence.view --ckpt=runs/loops --question=4x:a-2b*7c+3=5 --open=True
    python -m evidence.view --ckpt=runs/demo --question='class Stack:'

The first thinks about a problem of the loops task as rsa.py does, with the same numbers drawn, and the page shows who
read whom, where it went wrong, and how that was outvoted. The second lets the model write on after a text, as sample.py
does. Either way the page then goes into a text token by token: router, attention, residual stream; and, if the run has
a log.csv, shows how its experts were kept busy in training. A released folder is taken like a run of text.

The model is watched from outside, while it runs as it always does: forward hooks, and functions that note what they are
given and call the one in whose place they stand. What people and models wrote is data, and stays data: as JSON in which
each `<` is spelled \\u003c, so that no text can end the element it stands in; view.html shows it as text only.

Legend:  S tokens of a text   L layers   H query heads   G query heads a KV head   M router classes   d head dim
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

from runtime import pretrained
import configurator
from tasks import problems
from tasks.loops import task
from evaluate import TableConfig
from evidence.claims import replaced
from evidence.plot import by_layer, read_log
from evidence.rl import ends_and_vote, state, what_went_wrong
from router import load_entropy
from rsa import load_policy, markovian_rsa, sampler
from sample import generate
from runtime.device import pick_device

TEMPLATE = Path(__file__).with_suffix('.html')
LIMIT = 500_000                 # bytes of a page
NEW = 80                        # tokens that a model of text writes on
POINTS = 10_000                 # of the curves over training, all together


@dataclass
class ViewConfig:
    ckpt: str = 'runs/loops'        # a run folder of train.py, or a released folder
    question: str = '-'             # a problem or, for other models, a text; '-': the first held-out 'hard' problem
    out: str = ''                   # the page; '': view.html in that folder
    open: bool = False              # show it in the browser
    seed: int = 0

    def __post_init__(self):
        configurator.check_ranges(self, seed=(0, 2**31))
        if self.out and Path(self.out).suffix != '.html':
            raise ValueError(f'out is {self.out!r}: name a file that ends in .html')


# ---- a population that thinks ----

def think(policy, question, seed):
    """Let a population think about a problem of the loops task. Return what the page shows of it, and the tokens of all
    candidates: rounds of (prompt, output)."""
    problem, table = task.parse(question), TableConfig(seed=seed)
    settings = dict(population=table.population, candidates=table.candidates, budget=table.budget, tail=table.tail,
                    rounds=task.rounds_needed(problem.steps, table.budget))
    problems.check_room(policy, [question], final_budget=table.budget, **settings)
    result, = markovian_rsa([policy.encode(question)], sampler(policy, table), policy.build_prompt, seed=seed,
                            answer_of=policy.answer_of, **settings)
    rounds, tails = [], []                                      # tails: those of the round before
    for now in result['rounds']:
        rounds.append([candidate(problem, [tails[j] for j in draw], output, tail, table.budget) | {'reads': draw}
                       for draw, output, tail in zip(now['sampled'], now['outputs'], now['tails'])])
        tails = now['tails']
    answers = [policy.decode(answer) if answer else None for answer in result['answers']]
    shown = {'question': question, 'steps': problem.steps, 'answer': task.solve(question), 'rounds': rounds,
             'answers': answers, 'tokens': result['tokens'], 'budget': table.budget, 'tail': table.tail}
    return shown, [list(zip(now['prompts'], now['outputs'])) for now in result['rounds']]


def candidate(problem, read, output, tail, budget):
    """One candidate of one round. read: the tails that it read. wrong: the word of what_went_wrong, None if the
    verifier calls it right; pieces: see marked; tail: the text that it passes on, end: where that ends; vote: what the
    ends of the tails that it read come to, None if to nothing."""
    text, tail = task.ENC.decode(output), task.ENC.decode(task.without_end(tail))
    ends, vote = ends_and_vote(problem, read)
    wrong, pieces = what_went_wrong(problem, read, output, budget), marked(problem, text, {done for done, _ in ends})
    if wrong and 'wrong' not in [mark for _, mark in pieces]:   # each piece is right, but it stopped too early
        pieces[-1][1] = 'wrong'
    return {'wrong': wrong, 'pieces': pieces, 'tail': tail, 'end': place(problem, *state(problem, tail)),
            'vote': place(problem, *vote) if vote and read else None}


def place(problem, done, value):
    """A value after so many steps, and whether it is right. done is None where a text ends in no such way."""
    return {'done': done, 'value': value, 'right': done is not None and value == task.value_at(problem, done)}


def marked(problem, text, places):
    """Cut what a candidate wrote into [piece, mark] each: the value stated first, the steps, the answer. mark: 'wrong'
    where it goes wrong, 'after' on all that comes of that, else ''. places: how many steps may be done at its begin."""
    step = r'[1-9][a-z][-+*]\d=\d'
    pieces = re.findall(rf'{step}|</think>\d?|<\|end\|>|[^<]+?(?={step}|<|$)|.', text, re.S)
    begin = task.steps_at_start(problem, text)
    true = [(done, task.value_at(problem, done))
            for done in range(problem.steps if begin is None else begin, problem.steps + 1)]
    expected = [*task.step_texts(problem, true), f'</think>{true[-1][1]}', '<|end|>', *[''] * len(pieces)]
    fits = lambda i: (pieces[i] == expected[i] or i == len(pieces) - 1 and expected[i].startswith(pieces[i])) and (
        i != 1 or begin in places)                              # the budget may end within the last piece
    wrong = next((i for i in range(len(pieces)) if not fits(i)), len(pieces))
    return [[piece, 'wrong' if i == wrong else 'after' if i > wrong else ''] for i, piece in enumerate(pieces)]


def telling(rounds):
    """The candidates (round, number) whose texts tell most: the first who read an error and is right, and the first who
    is wrong; without errors the last one."""
    cells = [(t, i, now) for t, candidates in enumerate(rounds) for i, now in enumerate(candidates)]
    outvoted = [(t, i) for t, i, now in cells
                if not now['wrong'] and not all(rounds[t - 1][j]['end']['right'] for j in now['reads'])]
    return [*outvoted[:1], *[(t, i) for t, i, now in cells if now['wrong']][:1]] or [cells[-1][:2]]


# ---- a text, token by token ----

def attention_weights(q, k):
    """softmax(q k^T / sqrt(d)), causal: what scaled_dot_product_attention multiplies v by, and does not tell.
    q (1, H, S, d), k (1, H / G, S, d) -> (H, S, S) float32."""
    q, k = q[0].float(), k[0].float().repeat_interleave(q.shape[1] // k.shape[1], 0)        # (H, S, d) each
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)


@torch.no_grad()
def look(model, tokens):
    """Run a model on tokens, a list, and watch. Return expert (L, S), probs (L, S, M) before the balancing bias,
    attention (L, H, S, S), and rms (2 L + 1, S) of the residual stream: at first, and after each sublayer."""
    experts, probs, attention, rms = [], [], [], []
    attend = F.scaled_dot_product_attention

    def attend_watched(q, k, v, **settings):
        attention.append(attention_weights(q, k))
        return attend(q, k, v, **settings)

    def watched(choose):
        def choose_watched(p, bias):
            expert, weight = choose(p, bias)
            experts.append(expert[0])
            probs.append(p[0])
            return expert, weight
        return choose_watched
    measure = lambda x: rms.append(x[0].float().square().mean(-1).sqrt())
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(F, scaled_dot_product_attention=attend_watched))
        for router in model.routers:
            stack.enter_context(replaced(router, choose=watched(router.choose)))
        stack.enter_context(model.layers[0].register_forward_pre_hook(lambda module, args: measure(args[0])))
        for sublayer in (part for layer in model.layers for part in (layer.attn_residual, layer.moe_residual)):
            stack.enter_context(sublayer.register_forward_hook(lambda module, args, out: measure(out)))
        model(torch.tensor([tokens], device=model.device))
    return tuple(torch.stack(found).cpu() for found in (experts, probs, attention, rms))


def text_of(model, decode, tokens, n_prompt):
    """What the page shows of a text whose first n_prompt tokens were given. Probabilities are thousandths. attention: a
    string for each token t, base64 of L H (t + 1) bytes, [layer][head][position]; a byte is 255 sqrt(weight), the root
    because most weights are small."""
    experts, probs, attention, rms = look(model, tokens)
    levels = (255 * attention.sqrt()).round().byte()
    rounded = lambda x, digits: [[round(value, digits) for value in row] for row in x.tolist()]
    return {'tokens': [decode([token]) for token in tokens], 'n_prompt': n_prompt, 'expert': experts.tolist(),
            'probs': (1000 * probs).round().int().tolist(), 'entropy': rounded(load_entropy(probs), 3),
            'attention': [base64.b64encode(levels[:, :, t, :t + 1].numpy().tobytes()).decode()
                          for t in range(len(tokens))], 'rms': rounded(rms, 4)}


def room_for(config, room):
    """How many tokens of a text fit into so many bytes of a page, at most: 4/3 bytes for each weight of attention, and
    what else is shown of a token in each layer."""
    L, M = config.n_layer, config.n_expert + config.skip_expert
    size = lambda S: S * (L * (config.n_head * (S + 1) * 2 / 3 + 5 * M + 30) + 60)
    return next((S for S in range(config.context, 0, -1) if size(S) < room), 0)


def texts_of_rsa(model, decode, rounds, spoken, room):
    """The texts of the telling candidates, as many as fit; of the first at least the beginning."""
    texts = []
    for t, i in telling(rounds):
        prompt, output = spoken[t][i]
        tokens, most = [*prompt, *output], room_for(model.config, room)
        if not texts or len(tokens) <= most:
            texts.append(text_of(model, decode, tokens[:most], len(prompt)) | {'cell': [t, i]})
            room -= len(json.dumps(texts[-1]))
    return texts


def text_written_on(model, language, question, seed, room):
    """The text that a model makes of a prompt, which it reads behind what begins any text."""
    prompt, most = [*language.bos, *language.encode(question)], room_for(model.config, room)
    if not prompt or len(prompt) >= most:
        raise ValueError(f'question has {len(prompt)} tokens: a page has room for 1 to {most - 1} of this model')
    output, = generate(model, [prompt], min(NEW, most - len(prompt)), stop=language.stop, seed=seed)
    return text_of(model, language.decode, [*prompt, *output], len(prompt))


# ---- the run ----

def training(folder):
    """The curves of a run's log, {kind: [a layer's curves]}, a curve being [steps, values]; {} without a log. 'load'
    (fractions of the tokens) and 'bias' have a curve for each expert, 'entropy' has one; a kind that the run did not
    log is left out."""
    if not os.path.exists(os.path.join(folder, 'log.csv')):
        return {}
    try:
        log = read_log(folder)
    except csv.Error as error:
        raise ValueError(f'{folder}: log.csv was not written by train.py: {error}') from None
    layers = range(len(by_layer(log, 'entropy')))
    found = {kind: [by_layer(log, f'{kind}_{layer}') for layer in layers] for kind in ('load', 'bias')}
    found = {kind: curves for kind, curves in found.items() if all(curves)}
    found['entropy'] = [[curve] for curve in by_layer(log, 'entropy')]
    most = max(2, POINTS // sum(len(of_layer) for curves in found.values() for of_layer in curves))
    return {kind: [[thinned(*curve, most) for curve in of_layer] for of_layer in curves]
            for kind, curves in found.items()}


def thinned(steps, values, most):
    """At most so many points of a curve, the last among them; what is not finite is None."""
    every = slice((len(steps) - 1) % (apart := max(1, math.ceil(len(steps) / most))), None, apart)
    return [[round(step) for step in steps[every]],
            [float(f'{value:.4g}') if math.isfinite(value) else None for value in values[every]]]


def page(shown):
    """The page that shows this."""
    text = json.dumps(shown, separators=(',', ':'), allow_nan=False).replace('<', '\\u003c')
    return TEMPLATE.read_text(encoding='utf-8').replace('{{shown}}', text)


def view(config):
    """Gather all that the page shows. Raises ValueError if the folder or the question is of no use."""
    device = pick_device('auto')
    model, language = pretrained.load(config.ckpt, device)
    sizes, loops = model.config, language.digest == task.DIGEST
    if not loops and config.question == '-':
        raise ValueError(f'{config.ckpt} needs a --question: a text to write on after')
    shown = {'folder': config.ckpt, 'n_layer': sizes.n_layer, 'n_head': sizes.n_head, 'n_kv_head': sizes.n_kv_head,
             'n_expert': sizes.n_expert, 'n_class': sizes.n_expert + sizes.skip_expert, 'rsa': None,
             'training': training(config.ckpt),
             'bias': [[round(b, 4) for b in router.balancing_bias.tolist()] for router in model.routers]}
    room = lambda: LIMIT - 2000 - len(page(shown).encode())
    if loops:
        question = config.question if config.question != '-' else task.test_problems('hard', 1)[0].question
        shown['rsa'], spoken = think(load_policy(config.ckpt, device), question, config.seed)
        shown['texts'] = texts_of_rsa(model, language.decode, shown['rsa']['rounds'], spoken, room())
    else:
        shown['texts'] = [text_written_on(model, language, config.question, config.seed, room())]
    return shown


def main(config):
    out = Path(config.out or Path(config.ckpt, 'view.html'))
    text = page(view(config))
    out.write_text(text, encoding='utf-8')
    print(out)
    if config.open:
        webbrowser.open(out.resolve().as_uri())


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.view'):
        main(*configurator.read(sys.argv[1:], ViewConfig))
