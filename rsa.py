"""Markovian RSA: a population of rollouts that think in bounded rounds, and outvote each other's mistakes in between.

A long problem does not fit one bounded rollout. So a rollout is cut after `budget` tokens, and only its last `tail`
tokens live on: they say how far it came. In the next round each candidate reads the question and the tails of a few
others, drawn at random, and continues from what most of them agree on. With q a question:

    round 0:     output_i = generate(q)                                      i = 1..N, each at most beta tokens
    always:      tail_i   = the last tau tokens of output_i
    round 1..T:  output_i = generate(q, C tails of the round before)         drawn uniformly, without replacement
    result:      the N outputs of round T; its score is their mean correctness, not that of the best

A prompt is never longer than |q| + C tau and what the template adds, whatever beta and T are, while a line of thought
runs to (T + 1) beta tokens: the depth of reasoning comes apart from the context. The cost counts what is generated,
over all candidates and rounds; prompts, and the tails copied into them, do not count. Three special cases:

    T = 0          N independent samples, the usual parallel sampling
    tau = beta     full-chain RSA: nothing is cut away
    C = 1          Markovian thinking (Delethink): each candidate continues from its own tail, nobody is outvoted

Source: ZAYA1-8B report (arXiv 2605.05365), section VI. The C = 1 of Delethink: Aghajohari et al., arXiv 2510.06557.

Legend: N population, C candidates, T rounds (of aggregation, so there are T + 1 in all), beta budget, tau tail.

After the algorithm comes the command line: `python rsa.py --ckpt=runs/loops --split=hard` measures a model trained on the
loops task (data/loops/task.py), `--show=True` prints how a population fares, `--question=...` takes one of yours.
"""
import itertools
import os
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

import configurator
from data.loops import task
from checkpoint import load
from configurator import pick_device
from sample import generate


def draw(rng, population, candidates):
    """Which candidates of the round before each new one reads -> N lists of C numbers, in the order they are read."""
    if candidates == 1:                                         # a chain stays with itself
        return [[i] for i in range(population)]
    return [rng.sample(range(population), candidates) for _ in range(population)]


def check_draws(population, candidates, compact):
    if candidates > population:
        raise ValueError(f'candidates is {candidates}: that many cannot be drawn from a population of {population}')
    if compact not in ('tail', 'answer'):
        raise ValueError(f"compact is {compact!r}, it must be 'tail' or 'answer'")


def markovian_rsa(questions, generate, build_prompt, *, population=16, candidates=4, rounds=2, budget, tail,
                  final_budget=None, compact='tail', answer_of=None, seed=0):
    """questions: lists of token ids -> for each a dict with what happened, round by round.

    generate(prompts, max_new_tokens) -> the new tokens of each prompt. It is called once a round, with the prompts of
    all questions, so that its batch is full; it must draw new random numbers at every call.
    build_prompt(question, tails) -> a prompt. `tails` has C lists, some of them empty perhaps; in round 0 it is [].
    answer_of(output) -> the answer in it, as a list of tokens, or None if there is none yet. It alone decides whether a
    candidate is finished, so it should say None to an answer that the budget has cut short. Without answer_of nobody
    finishes. With C = 1 a finished chain stays as it is and is not generated again; one that ended without an answer
    gets another try. With C > 1 a candidate has always others to read, so all are generated.
    compact='answer': the finished pass on their answer (its last tau tokens) instead of their tail, which leaves the
    thoughts out. final_budget: the budget of the last round, if it is another.
    Draws come from (seed, question): they do not depend on the other questions, nor on how many rounds will follow.

    A result: {'rounds': [{'prompts': N lists, None where nothing was generated; 'draws': N lists of C numbers, [] in
    round 0; 'outputs': N lists; 'answers': N lists or None; 'tails': N lists, what is passed on; 'tokens': generated in
    this round}, ...], 'outputs' and 'answers': those of the last round, 'tokens': generated in all rounds}.
    Raises ValueError for settings that make no sense.
    """
    for name, value, low in (('population', population, 1), ('candidates', candidates, 1), ('rounds', rounds, 0),
                             ('budget', budget, 1), ('tail', tail, 1), ('final_budget', final_budget, 1)):
        if value is not None and value < low:
            raise ValueError(f'{name} is {value}, it must be at least {low}')
    check_draws(population, candidates, compact)
    if tail > budget:
        raise ValueError(f'tail is {tail}, more than the budget of {budget} that it is the end of')
    if compact == 'answer' and answer_of is None:
        raise ValueError("compact is 'answer', which needs answer_of to find one")
    if not questions:
        raise ValueError('questions is empty: give at least one')
    for i, question in enumerate(questions):
        if not question:
            raise ValueError(f'question {i} is empty: give at least one token')

    results = [{'rounds': []} for _ in questions]
    rngs = [random.Random(f'{seed} {list(question)}') for question in questions]
    for t in range(rounds + 1):
        # Everybody's prompt. A chain that has reached its answer has nothing left to do, and gets none.
        for question, result, rng in zip(questions, results, rngs):
            before = result['rounds'][-1] if t else None
            draws = draw(rng, population, candidates) if t else [[] for _ in range(population)]
            prompts = [None if len(drawn) == 1 and before['answers'][drawn[0]] is not None else
                       build_prompt(question, [before['tails'][j] for j in drawn]) for drawn in draws]
            result['rounds'].append({'prompts': prompts, 'draws': draws})

        # One batch for all questions.
        limit = final_budget if t == rounds and final_budget is not None else budget
        batch = [prompt for result in results for prompt in result['rounds'][-1]['prompts'] if prompt is not None]
        new = generate(batch, limit) if batch else []
        assert len(new) == len(batch), f'generate gave {len(new)} outputs for {len(batch)} prompts'
        assert all(len(output) <= limit for output in new), f'generate gave an output of more than {limit} tokens'
        new = iter(new)

        # What each passes on.
        for result in results:
            now = result['rounds'][-1]
            now['outputs'] = [result['rounds'][-2]['outputs'][i] if prompt is None else next(new)
                              for i, prompt in enumerate(now['prompts'])]
            now['answers'] = [answer_of(output) if answer_of else None for output in now['outputs']]
            now['tails'] = [(answer if compact == 'answer' and answer else output)[-tail:]
                            for output, answer in zip(now['outputs'], now['answers'])]
            now['tokens'] = sum(len(output) for output, prompt in zip(now['outputs'], now['prompts'])
                                if prompt is not None)          # what is carried over has been counted
    for result in results:
        last = result['rounds'][-1]
        result |= {'outputs': last['outputs'], 'answers': last['answers'],
                   'tokens': sum(now['tokens'] for now in result['rounds'])}
    return results


def majority_vote(answers):
    """The most frequent answer. None does not vote; of equally frequent ones the first to appear wins. None if nobody
    votes."""
    votes = [answer for answer in answers if answer is not None]
    return max(votes, key=votes.count, default=None)            # max returns the first of the greatest


def score(answers, verify):
    """The answers to one problem, None where there is none; verify(answer) -> right or wrong. Three numbers, 0 to 1:

    mean:      the share that is right, which is what the report's tables show
    majority:  1 if the most frequent answer is right: a method too, for it needs no verifier to choose
    best_of_n: 1 if any is right, with the verifier itself choosing: an upper bound, no method
    """
    right = [answer is not None and bool(verify(answer)) for answer in answers]
    vote = majority_vote(answers)
    return {'mean': sum(right) / len(right), 'majority': float(vote is not None and bool(verify(vote))),
            'best_of_n': float(any(right))}


def mean_ci95(values):
    """One value a problem -> their mean, and half the width of its 95 % confidence interval, 1.96 std / sqrt(n).

    The problems are the independent draws. The N outputs to one problem share its difficulty and each other's tails:
    to count them one by one would make the interval far too narrow.
    """
    if not values:
        raise ValueError('no values to average: give those of at least one problem')
    std = statistics.stdev(values) if len(values) > 1 else float('nan')         # one problem says nothing of the spread
    return statistics.fmean(values), 1.96 * std / len(values) ** 0.5


# --- the command line --------------------------------------------------------------------------------------------


@dataclass
class RSAConfig:
    ckpt: str = 'runs/loops'        # a run folder of train.py, trained on the loops task; or a released folder, for --question
    split: str = 'hard'             # easy, medium, hard or deep: 3-7, 14-20, 25-32, 56-64 steps; or several: 'easy hard'
    question: str = ''              # answer this one instead; a released model answers only what is asked here
    show: bool = False              # of the question, or the split's first, print what every candidate says, round by round
    problems: int = 200             # of a split
    population: int = 16            # N
    candidates: int = 4             # C
    rounds: int = -1                # T; -1: as many as the split's longest problem needs; the report's 2 for a released model
    budget: int = 0                 # beta; 0: 41 for loops, the stated value and 8 steps; the report's 16K for a released model
    tail: int = 0                   # tau; 0: 10 for loops, the last 2 steps; the report's 4K for a released model
    final_budget: int = 0           # of the last round; 0: the budget
    compact: str = 'tail'           # 'answer': the finished pass on their answer alone
    temperature: float = 1.0        # the report's
    top_p: float = 1.0
    rows: int = 512                 # generated together: as many problems at a time as fit, but at least one
    seed: int = 0
    device: str = 'auto'

    def __post_init__(self):
        for key, low in (('problems', 1), ('population', 1), ('rounds', -1), ('budget', 0), ('tail', 0), ('final_budget', 0),
                         ('rows', 1), ('temperature', 0), ('top_p', 0), ('seed', 0), ('candidates', 1)):
            if getattr(self, key) < low:
                raise ValueError(f'{key} is {getattr(self, key)}, it must be at least {low}')
        check_draws(self.population, self.candidates, self.compact)             # now, not after the first rows of a table
        unknown = [name for name in self.split.split() if name not in task.LENGTHS]
        if unknown or not self.split.split():
            raise ValueError(f'split is {self.split!r}, choose from {", ".join(task.LENGTHS)}')


class Speaker(NamedTuple):
    """A model and the language that it was trained to hear and speak. Questions, tails, outputs: lists of tokens."""
    model: torch.nn.Module
    encode: Callable                # text of a question -> tokens
    decode: Callable
    stop: list                      # tokens that end an output
    build_prompt: Callable          # as in markovian_rsa
    answer_of: Callable             # as in markovian_rsa


def load_speaker(folder, device):
    """The model in a run folder or a released one. Raises ValueError if it is neither, or not trained on loops."""
    model, encode, decode, stop = load(folder, device)
    if os.path.exists(os.path.join(folder, 'config.json')):
        return Speaker(model, lambda text: without_begin(encode, text), decode, stop, *chat_format(encode, stop))
    if model.config.vocab_size != task.ENC.n_vocab:
        raise ValueError(f'{folder} was not trained on the loops task: prepare it with data/loops/prepare.py and train '
                         'with config/loops.py')
    return Speaker(model, encode, decode, stop, task.build_prompt, task.answer_of)


def chat_format(encode, stop):
    """build_prompt and answer_of for a released model, which has to be told in words what the tails are.

    Assumed is the chat format with <|im_start|> and <|im_end|> (ChatML), a bare <think> to begin with, and that the answer
    is what follows the last </think>. Tails go into the prompt as the tokens they are.
    """
    text = lambda words: without_begin(encode, words)
    begin, open_user, close_think = encode(''), text('<|im_start|>user\n'), text('</think>')
    open_reply = text('<|im_end|>\n<|im_start|>assistant\n<think>\n')

    def build_prompt(question, tails):
        if not tails:
            return begin + open_user + question + open_reply
        several = f'{len(tails)} attempts, each cut off and shown from near its end' if len(tails) > 1 else \
            'an attempt, cut off and shown from near its end'
        prompt = begin + open_user + question + text(f'\n\nBelow is what is left of {several}. It may hold mistakes. Check it, '
                                                     'keep what is right, and write one solution that is better.\n')
        for i, tail in enumerate(tails):
            prompt += text(f'\n--- attempt {i + 1} ---\n') + [token for token in tail if token not in stop]
        return prompt + open_reply

    def answer_of(output):
        if not output or output[-1] not in stop:
            return None
        n = len(close_think)
        ends = [i + n for i in range(len(output) - n + 1) if output[i:i + n] == close_think]
        return output[ends[-1]:-1] or None if ends else None
    return build_prompt, answer_of


def without_begin(encode, text):
    """The tokens of a text in the middle of a prompt: without the one that a tokenizer may put first."""
    return encode(text)[len(encode('')):]


def sampler(speaker, config):
    """generate(prompts, max_new_tokens) for markovian_rsa: another seed at every call."""
    seeds = itertools.count(config.seed * 1_000_003)
    return lambda prompts, n: generate(speaker.model, prompts, n, config.temperature, top_p=config.top_p,
                                       stop=speaker.stop, seed=next(seeds))


class Row(NamedTuple):
    """One method on the problems of one length."""
    name: str
    mean: float                     # as in `score`, over problems, with half the width of its 95 % interval
    half: float
    majority: float
    best: float
    tokens: float                   # generated, a problem
    longest: int                    # prompt, in tokens
    seconds: float


def measure(speaker, problems, config, name, budget=None, **settings):
    """One row of the table: RSA with these settings on all problems, some at a time. Without a budget, a rollout has what its
    question leaves of the context. Returns a Row."""
    generate, at_a_time = sampler(speaker, config), max(1, config.rows // config.population)
    scores, tokens, longest, began = [], 0, 0, time.perf_counter()
    groups = defaultdict(list)                                  # budget -> problems that have it
    for problem in problems:
        room = speaker.model.config.context - len(speaker.build_prompt(speaker.encode(problem.question), []))
        groups[budget or room].append(problem)
    chunks = [(limit, group[i:i + at_a_time]) for limit, group in groups.items() for i in range(0, len(group), at_a_time)]
    with tqdm(total=len(problems), desc=name, leave=False, dynamic_ncols=True, unit='problem') as bar:
        for limit, chunk in chunks:
            results = markovian_rsa([speaker.encode(problem.question) for problem in chunk], generate, speaker.build_prompt,
                                    answer_of=speaker.answer_of, population=config.population, seed=config.seed, budget=limit,
                                    **settings)
            for problem, result in zip(chunk, results):
                right = str(task.solve(problem.question))
                scores.append(score(result['answers'], lambda answer: speaker.decode(answer) == right))
                tokens += result['tokens']
                longest = max(longest, *(len(p) for now in result['rounds'] for p in now['prompts'] if p is not None))
            bar.update(len(chunk))
    majority, best = (statistics.fmean(s[key] for s in scores) for key in ('majority', 'best_of_n'))
    return Row(name, *mean_ci95([s['mean'] for s in scores]), majority, best, tokens / len(problems), longest,
               time.perf_counter() - began)


def rows_of_table(speaker, config, split, budget, tail):
    """Measure the methods on one split, cheapest first; yields a Row for each."""
    problems = task.test_problems(split, config.problems)
    low, high = task.LENGTHS[split]
    T = config.rounds if config.rounds >= 0 else task.rounds_needed(high, budget)
    rsa = dict(budget=budget, tail=tail, final_budget=config.final_budget or None, compact=config.compact, rounds=T)
    yield measure(speaker, problems, config, 'one bounded rollout each, T=0', budget=budget, tail=tail, candidates=1, rounds=0)
    prompt = max(len(speaker.build_prompt(speaker.encode(problem.question), [])) for problem in problems)
    if prompt + 1 + high * task.STEP + 3 <= speaker.model.config.context:       # start value, steps, </think>, answer, <|end|>
        yield measure(speaker, problems, config, 'one unbounded rollout each', tail=1, candidates=1, rounds=0)
    for C in sorted({1, config.candidates}):
        yield measure(speaker, problems, config, f'C={C}, T={T}', candidates=C, **rsa)


def print_table(speaker, config, budget, tail):
    N = config.population
    print(f'{config.problems} held-out problems of each length, N={N}, beta={budget}, tau={tail}, temperature '
          f'{config.temperature:g}; mean with its 95 % CI over problems; best: if the verifier chose\n')
    print(f'| steps | method | mean of {N}, % | majority of {N}, % | best of {N}, % | generated tokens | longest prompt | seconds |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- |')
    for split in config.split.split():
        steps = '-'.join(map(str, task.LENGTHS[split]))
        for row in rows_of_table(speaker, config, split, budget, tail):
            print(f'| {steps} | {row.name} | {100 * row.mean:.1f} +-{100 * row.half:.1f} | {100 * row.majority:.1f} | '
                  f'{100 * row.best:.1f} | {row.tokens:,.0f} | {row.longest} | {row.seconds:.0f} |', flush=True)


def print_population(result, question, decode, judge=lambda question, text: '', spaced=str):
    """A result of markovian_rsa, round by round: who read whom ('!': a tail that is wrong), and what each said.
    judge(question, text) -> 'ok', 'wrong' or ''; spaced(text) -> the text, easier to read."""
    marks = []
    for t, now in enumerate(result['rounds']):
        said, before = [decode(output) for output in now['outputs']], marks
        marks = [judge(question, text) for text in said]
        print(f'\nround {t}' + (f': {marks.count("ok")} of {len(marks)} are right so far' if any(marks) else ''))
        for i, (drawn, text, mark) in enumerate(zip(now['draws'], said, marks)):
            reads = 'reads ' + ' '.join(f'{j:2}{"!" if before[j] == "wrong" else " "}' for j in drawn) + ' ' if drawn else ''
            waits = '(finished) ' if now['prompts'][i] is None else ''
            print(f'{i:2}  {reads}{mark:6}{waits}{spaced(text)}')
    print()


def main(config):
    speaker = load_speaker(config.ckpt, pick_device(config.device))
    released = speaker.build_prompt is not task.build_prompt
    budget = config.budget or (16_384 if released else 41)
    tail = config.tail or (4096 if released else 10)
    if released and not config.question:
        raise ValueError(f'{config.ckpt} is a released model: give it a --question')
    if not config.question and not config.show:
        return print_table(speaker, config, budget, tail)

    question = config.question or task.test_problems(config.split.split()[0], 1)[0].question
    T, extras = 2, ()
    if not released:
        problem, extras = task.parse(question), (task.judge, task.spaced)
        T = task.rounds_needed(problem.steps, budget)
        print(f'{question}   {problem.steps} steps, the answer is {task.solve(question)}')
    result, = markovian_rsa([speaker.encode(question)], sampler(speaker, config), speaker.build_prompt, seed=config.seed,
                            answer_of=speaker.answer_of, population=config.population, candidates=config.candidates,
                            rounds=config.rounds if config.rounds >= 0 else T, budget=budget, tail=tail,
                            final_budget=config.final_budget or None, compact=config.compact)
    if config.show:
        print_population(result, question, speaker.decode, *extras)
    votes = Counter(speaker.decode(answer).strip() for answer in result['answers'] if answer is not None)
    print('answers: ' + (', '.join(f'{answer} ({n})' for answer, n in votes.most_common()) or 'none')
          + f'; {result["tokens"]:,} tokens generated')


if __name__ == '__main__':
    with configurator.one_line_errors('rsa.py', 'try a smaller --rows, --population or --budget'):
        main(*configurator.read(sys.argv[1:], RSAConfig))
