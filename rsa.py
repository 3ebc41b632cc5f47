"""Markovian RSA: a population thinks in rounds of bounded length, and in between it outvotes the errors of its members.

An output is cut after `budget` tokens, and only its last `tail` tokens live on. In the next round each candidate reads
the question and some of these tails, drawn uniformly without replacement, and goes on from what most of them agree on:

    round 0      output_i = generate(question)                                  i = 1..N
    round 1..T   output_i = generate(question, C tails of the round before)
    always       tail_i   = last tau tokens of output_i
    result       the N outputs of round T; its score is their mean correctness, not that of the best

T = 0 is parallel sampling; tau = beta, full-chain RSA; C = 1, where each goes on from its own tail, Delethink. Whatever
beta and T are, a prompt holds the question and C tails: to think longer takes no longer context. The cost is the number
of tokens generated in all; prompts do not count.

Source: ZAYA1-8B report (arXiv 2605.05365), section VI. Delethink, Markovian thinking: Aghajohari et al., 2510.06557.
Legend: N population   C candidates   T rounds after round 0   beta budget   tau tail
Use: `python rsa.py --ckpt=FOLDER --question=...`; without one, a loops model gets the first held-out 'hard' problem.
"""
import itertools
import random
import statistics
import sys
from collections import Counter, namedtuple
from dataclasses import dataclass

import checkpoint
import configurator
import sample
from data.chatml import chat_format
from data.loops import task


def markovian_rsa(questions, generate, build_prompt, *, population=16, candidates=4, rounds=2, budget, tail,
                  final_budget=None, compact='tail', answer_of=None, seed=0):
    """Let a population think about each question, a list of tokens. Return for each a dict of what happened.

    generate(prompts, max_new_tokens) -> the new tokens of each prompt. It is called once a round, with the prompts of
    all questions, and must draw new random numbers at every call.
    build_prompt(question, tails) -> a prompt. tails: [] in round 0, then C lists of tokens, of which some may be empty.
    answer_of(output) -> the answer in it, a list of tokens, or None if none is complete. Without answer_of nobody
    finishes. If C = 1, who has finished is not generated again; if C > 1, there are others to read, so everybody is.
    final_budget: the budget of the last round, if it is another. compact='answer': who has finished passes on the last
    tau tokens of the answer alone. seed: draws depend on it and the question, not on other questions or on `rounds`.
    Each dict: {'rounds': [{'draws': N lists of C numbers, empty in round 0; 'prompts': N lists, None where nothing was
    generated; 'outputs': N lists; 'answers': N lists or None; 'tails': N lists; 'tokens': how many were generated},
    ...], 'outputs', 'answers': those of the last round, 'tokens': of all rounds}. Raise ValueError if a setting is bad.
    """
    at_least = (('population', population, 1), ('candidates', candidates, 1), ('rounds', rounds, 0),
                ('budget', budget, 1), ('tail', tail, 1), ('final_budget', final_budget, 1))
    for wrong, message in (
            *((x is not None and x < low, f'{name} is {x}, it must be at least {low}') for name, x, low in at_least),
            (candidates > population,
             f'candidates is {candidates}: that many cannot be drawn from a population of {population}'),
            (compact not in ('tail', 'answer'), f"compact is {compact!r}, it must be 'tail' or 'answer'"),
            (tail > budget, f'tail is {tail}, more than the budget of {budget} that it is the end of'),
            (compact == 'answer' and answer_of is None, "compact is 'answer', which needs answer_of to find one"),
            (not questions, 'questions is empty: give at least one'),
            *((not x, f'question {i} is empty: give at least one token') for i, x in enumerate(questions))):
        if wrong:
            raise ValueError(message)

    everybody, histories = range(population), [[] for _ in questions]           # a history: the rounds of one question
    rngs = [random.Random(f'{seed} {list(question)}') for question in questions]
    for t in range(rounds + 1):
        for question, history, rng in zip(questions, histories, rngs):          # what each reads; None: it has finished
            draws = [[] if t == 0 else [i] if candidates == 1 else rng.sample(everybody, candidates) for i in everybody]
            prompts = [None if len(drawn) == 1 and history[-1]['answers'][drawn[0]] is not None else
                       build_prompt(question, [history[-1]['tails'][j] for j in drawn]) for drawn in draws]
            history.append({'draws': draws, 'prompts': prompts})
        limit = final_budget if t == rounds and final_budget is not None else budget
        batch = [prompt for history in histories for prompt in history[-1]['prompts'] if prompt is not None]
        new = [*generate(batch, limit)] if batch else []        # what each says, for all questions together
        assert len(new) == len(batch), f'generate gave {len(new)} outputs for {len(batch)} prompts'
        assert all(len(output) <= limit for output in new), f'generate gave an output of more than {limit} tokens'
        for history in histories:                               # what each passes on
            now, fresh = history[-1], {i: new.pop(0) for i in everybody if history[-1]['prompts'][i] is not None}
            now['outputs'] = [fresh[i] if i in fresh else history[-2]['outputs'][i] for i in everybody]
            now['answers'] = [answer_of(output) if answer_of else None for output in now['outputs']]
            now['tails'] = [(answer if compact == 'answer' and answer else output)[-tail:]
                            for output, answer in zip(now['outputs'], now['answers'])]
            now['tokens'] = sum(map(len, fresh.values()))       # what was said in an earlier round has been counted
    return [{'rounds': history, 'outputs': history[-1]['outputs'], 'answers': history[-1]['answers'],
             'tokens': sum(now['tokens'] for now in history)} for history in histories]


def majority_vote(answers):
    """Return the most frequent answer, of several the first to appear. None is no vote; return it if nobody votes."""
    votes = [answer for answer in answers if answer is not None]
    return max(votes, key=votes.count, default=None)            # max returns the first of the greatest


def score(answers, verify):
    """Return scores, 0 to 1, of the answers to one problem (None: there is none): `mean`, the share that verify(answer)
    calls right; `majority`, 1 if the majority's is; `best_of_n`, 1 if any is: a bound, for it lets verify choose."""
    *right, majority = [answer is not None and bool(verify(answer)) for answer in [*answers, majority_vote(answers)]]
    return {'mean': sum(right) / len(right), 'majority': float(majority), 'best_of_n': float(any(right))}


def mean_ci95(values):
    """Return the mean of values, one a problem, and half the width of its 95 % confidence interval, 1.96 std / sqrt(n);
    nan if n = 1. One value an output would be too many: outputs to a problem share its difficulty and their tails."""
    if not values:
        raise ValueError('no values to average: give those of at least one problem')
    std = statistics.stdev(values) if len(values) > 1 else float('nan')
    return statistics.fmean(values), 1.96 * std / len(values) ** 0.5


# A model and its language. stop: tokens that end an output; encode(question) -> tokens; the rest as in markovian_rsa.
Speaker = namedtuple('Speaker', 'model decode stop encode build_prompt answer_of')


def load_speaker(folder, device):
    """Read a Speaker from a run or a released folder. Raise ValueError if it is neither, or not trained on loops."""
    model, encode, decode, stop = checkpoint.load(folder, device)
    if hasattr(model, 'released_config'):
        return Speaker(model, decode, stop, *chat_format(encode, stop))
    if model.config.vocab_size != task.ENC.n_vocab:
        raise ValueError(f'{folder} was not trained on the loops task: prepare data.loops, train by config/loops.py')
    return Speaker(model, decode, stop, encode, task.build_prompt, task.answer_of)


def sampler(speaker, config):
    """Return a `generate` for markovian_rsa: sample.generate, with another seed at every call."""
    seeds = itertools.count(config.seed * 1_000_003)
    return lambda prompts, max_new_tokens: sample.generate(speaker.model, prompts, max_new_tokens, config.temperature,
                                                           top_p=config.top_p, stop=speaker.stop, seed=next(seeds))


def print_population(result, question, decode, judge=lambda question, text: '', spaced=str):
    """Print a result of markovian_rsa round by round: who read whom ('!': a tail that is wrong), and what each said.
    judge(question, text) -> 'ok', 'wrong' or ''; spaced(text) -> the text, easier to read."""
    marks = []
    for t, now in enumerate(result['rounds']):
        said, before = [decode(output) for output in now['outputs']], marks
        marks = [judge(question, text) for text in said]
        print(f'\nround {t}' + (f': {marks.count("ok")} of {len(marks)} are right so far' if any(marks) else ''))
        for i, drawn in enumerate(now['draws']):
            reads = ['reads', *(f'{j:2}{"!" if before[j] == "wrong" else " "}' for j in drawn), ''] if drawn else []
            print(f'{i:2}  {" ".join(reads)}{marks[i]:6}{"" if now["prompts"][i] else "(finished) "}{spaced(said[i])}')
    print()


@dataclass
class RSAConfig:
    ckpt: str = 'runs/loops'        # a run folder of train.py, trained on the loops task; or a released folder
    question: str = ''              # '': the first held-out 'hard' problem, for a model trained on the loops task
    show: bool = False              # print what every candidate says, round by round
    population: int = 16            # N
    candidates: int = 4             # C
    rounds: int = -1                # T; -1: as many as the loops problem needs; 2 for a released model
    budget: int = 0                 # beta; 0: 41 for loops, a value and 8 steps; 16K for a released model
    tail: int = 0                   # tau; 0: 10 for loops, the last 2 steps; 4K for a released model
    final_budget: int = 0           # of the last round; 0: the budget
    compact: str = 'tail'           # 'answer': who has finished passes on the answer alone
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    device: str = 'auto'

    def __post_init__(self):
        configurator.check_ranges(self, population=(1, None), candidates=(1, None), rounds=(-1, None), budget=(0, None),
                                  tail=(0, None), final_budget=(0, None), compact=('tail', 'answer'),
                                  temperature=(0, None), top_p=(0, 1), seed=(0, None))


def main(config):
    speaker, question = load_speaker(config.ckpt, configurator.pick_device(config.device)), config.question
    budget, tail, rounds, extras = 16_384, 4096, 2, ()          # the report's
    if speaker.build_prompt is task.build_prompt:
        question = question or task.test_problems('hard', 1)[0].question
        steps = task.parse(question).steps
        budget, tail, rounds, extras = 41, 10, task.rounds_needed(steps, config.budget or 41), (task.judge, task.spaced)
        print(f'{question}   {steps} steps, the answer is {task.solve(question)}')
    elif not question:
        raise ValueError(f'{config.ckpt} is a released model: give it a --question')
    result, = markovian_rsa(
        [speaker.encode(question)], sampler(speaker, config), speaker.build_prompt, population=config.population,
        candidates=config.candidates, rounds=rounds if config.rounds < 0 else config.rounds, compact=config.compact,
        budget=config.budget or budget, tail=config.tail or tail, final_budget=config.final_budget or None,
        answer_of=speaker.answer_of, seed=config.seed)
    if config.show:
        print_population(result, question, speaker.decode, *extras)
    votes = Counter(speaker.decode(answer).strip() for answer in result['answers'] if answer is not None)
    said = ', '.join(f'{answer} ({n})' for answer, n in votes.most_common()) or 'none'
    print(f'answers: {said}; {result["tokens"]:,} tokens generated')


if __name__ == '__main__':
    with configurator.one_line_errors('rsa.py', 'try a smaller --population or --budget'):
        main(*configurator.read(sys.argv[1:], RSAConfig))
