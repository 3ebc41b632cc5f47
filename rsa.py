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
import sys
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

from runtime import pretrained
import configurator
import decode
import sample
from tasks import client, problems
from tasks.loops import task
from runtime.device import pick_device


def markovian_rsa(questions, *args, **settings):
    """Let a population think about each question, a list of tokens: all rounds of rounds_of, which has the arguments.
    Return for each question a dict: 'rounds', those of rounds_of; 'outputs' and 'answers', those of the last round;
    'tokens', of all rounds."""
    histories = [[] for _ in questions]
    for now in rounds_of(questions, *args, **settings):
        for history, of_question in zip(histories, now):
            history.append(of_question)
    return [{'rounds': history, 'outputs': history[-1]['outputs'], 'answers': history[-1]['answers'],
             'tokens': sum(now['tokens'] for now in history)} for history in histories]


def rounds_of(questions, generate, build_prompt, *, population=16, candidates=4, rounds=2, budget, tail,
              final_budget=None, compact='tail', answer_of=None, thought_of=list, seed=0, done=()):
    """Think in rounds. After each, yield for each question a dict: 'sampled', N lists of C numbers, empty in round 0;
    'prompts', N lists, None where nothing was generated; 'outputs', N lists; 'answers', N lists or None; 'tails', N
    lists; 'tokens', how many were generated.

    generate(prompts, max_new_tokens) -> the new tokens of each prompt. It is called once a round, with the prompts of
    all questions, and must draw new random numbers at every call.
    build_prompt(question, tails) -> a prompt. tails: [] in round 0, then C lists of tokens, of which some may be empty.
    answer_of(output) -> the answer in it, a list of tokens, or None if none is complete. Without answer_of nobody
    finishes. If C = 1, who has finished is not generated again; if C > 1, there are others to read, so everybody is.
    thought_of(output) -> what of an output the tail is the end of; all of it by default.
    final_budget: the budget of the last round, if it is another. compact='answer': who has finished passes on the last
    tau tokens of the answer alone. seed: draws depend on it and the question, not on other questions or on `rounds`.
    done: the rounds that are over, each as it was yielded, to go on after them. Raise ValueError for a bad setting.
    """
    final_budget = budget if final_budget is None else final_budget
    configurator.check_ranges(
        SimpleNamespace(**locals()), population=(1, None), candidates=(1, population), rounds=(0, None),
        budget=(1, None), tail=(1, budget), final_budget=(1, None), compact=('tail', 'answer'))
    if compact == 'answer' and answer_of is None:
        raise ValueError("compact is 'answer', which needs answer_of to find one")
    if not questions or not all(questions):
        raise ValueError('questions: give at least one, and each at least one token')

    everybody, before = range(population), None                 # before: the last round, a dict for each question
    rngs = [random.Random(f'{seed} {list(question)}') for question in questions]
    for t in range(rounds + 1):
        drawn = [[[] if t == 0 else [i] if candidates == 1 else rng.sample(everybody, candidates) for i in everybody]
                 for rng in rngs]                               # what each reads
        if t < len(done):
            before = done[t]
            continue
        now = [{'sampled': draws, 'prompts': [                    # None: who reads nobody else, and has finished
            None if len(draw) == 1 and before[q]['answers'][draw[0]] is not None else
            build_prompt(question, [before[q]['tails'][j] for j in draw]) for draw in draws]}
            for q, (question, draws) in enumerate(zip(questions, drawn))]
        limit = final_budget if t == rounds else budget
        batch = [prompt for of_question in now for prompt in of_question['prompts'] if prompt is not None]
        new = [*generate(batch, limit)] if batch else []        # what each says, for all questions together
        assert len(new) == len(batch), f'generate gave {len(new)} outputs for {len(batch)} prompts'
        assert all(len(output) <= limit for output in new), f'generate gave an output of more than {limit} tokens'
        for q, of_question in enumerate(now):                   # what each passes on
            of_question |= {'outputs': [], 'answers': [], 'tails': [], 'tokens': 0}
            for i, prompt in enumerate(of_question['prompts']):
                if prompt is None:                              # as it was, and counted then
                    output, answer, end = (before[q][key][i] for key in ('outputs', 'answers', 'tails'))
                else:
                    output = new.pop(0)
                    answer = answer_of(output) if answer_of else None
                    end = (answer if compact == 'answer' and answer else thought_of(output))[-tail:]
                    of_question['tokens'] += len(output)
                for key, value in ('outputs', output), ('answers', answer), ('tails', end):
                    of_question[key].append(value)
        before = now
        yield now


# A model that speaks. step: of decode.py; stop: tokens that end an output; encode(question); the rest as in rounds_of.
Policy = namedtuple('Policy', 'model step decode stop encode build_prompt answer_of thought_of')


def load_policy(folder, device, words=None, compact='tail'):
    """Read a Policy: of a model trained on the loops task, in that task's own tokens, else in words, by its chat
    template. words, compact: see problems.message. Raise ValueError if the folder holds no model."""
    model, language = pretrained.load(folder, device)
    common = model, decode.folded(model), language.decode, language.stop, language.encode
    if language.digest == task.DIGEST:
        return Policy(*common, task.build_prompt, task.answer_of, list)
    prompt = lambda question, tails: language.prompt(
        [{'role': 'user', 'content': problems.message(question, tails, words, compact)}])
    return Policy(*common, prompt, language.answer, language.thought)


def sampler(policy, config, stream=None, first=0):
    """Return a `generate` for rounds_of: sample.generate, with another seed at every call."""
    seeds = itertools.count(config.seed * 1_000_003 + first)
    return lambda prompts, max_new_tokens: sample.generate(
        policy.model, prompts, max_new_tokens, config.temperature, 0, config.top_p, config.min_p, policy.stop,
        next(seeds), stream, step=policy.step)


@dataclass
class RSAConfig:
    ckpt: str = ''                  # a run folder of train.py, or a released folder; '': runs/loops
    server: str = ''                # the URL of an OpenAI API (tasks/client.py); ckpt is for the tokenizer then
    model: str = ''                 # on that server; '': the only one it has
    parallel: int = 16              # requests to it at once
    question: str = '-'             # '-': the first held-out 'hard' problem, for a model trained on the loops task
    show: bool = False              # print what every candidate says, round by round
    problems: str = ''              # a file of problems (tasks/problems.py), in place of a question
    out: str = ''                   # what becomes of them, and of a run that was killed; '': FILE.rsa.jsonl
    dry_run: bool = False           # only say what these problems will take
    aggregation_prompt: str = ''    # a file of other words for it, with {problem} and {candidates} in them
    population: int = 16            # N
    candidates: int = 4             # C
    rounds: int = -1                # T; -1: as many as the loops problem needs; 2 for other models
    budget: int = 0                 # beta; 0: 41 for loops, a value and 8 steps; 16K for other models
    tail: int = 0                   # tau; 0: 10 for loops, the last 2 steps; 4K for other models
    final_budget: int = 0           # of the last round; 0: the budget; 40K for other models whose budget is not given
    compact: str = 'tail'           # 'answer': who has finished passes on the answer alone
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    device: str = 'auto'

    def __post_init__(self):
        configurator.check_ranges(self, population=(1, None), candidates=(1, None), rounds=(-1, None), budget=(0, None),
                                  tail=(0, None), final_budget=(0, None), compact=('tail', 'answer'),
                                  temperature=(0, None), top_p=(0, 1), min_p=(0, 1), seed=(0, None), parallel=(1, 1024))
        self.ckpt = self.ckpt or ('' if self.server else 'runs/loops')


def main(config):
    words = problems.read_words(config.aggregation_prompt) if config.aggregation_prompt else None
    listed = problems.read_problems(config.problems) if config.problems else None
    path = listed and (config.out or config.problems.removesuffix('.jsonl') + '.rsa.jsonl')
    policy = client.load_policy(config, words, path) if config.server else load_policy(
        config.ckpt, pick_device(config.device), words, config.compact)
    draw = client.sampler if config.server else sampler
    question, extras, loops = config.question, (), policy.build_prompt is task.build_prompt
    budget, tail, rounds, last = 16_384, 4096, 2, config.budget or 40_960       # the report's
    if loops and not listed:
        question = question if question != '-' else task.test_problems('hard', 1)[0].question
        steps = task.parse(question).steps
        budget, tail, rounds, extras = 41, 10, task.rounds_needed(steps, config.budget or 41), (task.judge, task.spaced)
        last = config.budget or budget
        print(f'{question}   {steps} steps, the answer is {task.solve(question)}')
    elif loops or question == '-' and not listed:
        raise ValueError(f'{config.server or config.ckpt} ' + (
            'was trained on the loops task: evaluate has its problems' if loops else
            'needs a --question or a file of --problems'))
    settings = dict(population=config.population, candidates=config.candidates, budget=config.budget or budget,
                    rounds=rounds if config.rounds < 0 else config.rounds, tail=config.tail or tail,
                    final_budget=config.final_budget or last, compact=config.compact, seed=config.seed)
    problems.check_room(policy, [text + problems.INSTRUCTION for text, _ in listed or ()] or [question], **settings)
    functions = dict(answer_of=policy.answer_of, thought_of=policy.thought_of)
    if not listed:
        result, = markovian_rsa([policy.encode(question)], draw(policy, config), policy.build_prompt, **settings,
                                **functions)
        return problems.print_result(result, question, policy.decode, config.show, *extras)
    think = lambda k, question, done, stream: rounds_of(
        [question], draw(policy, config, stream, 1000 * k + len(done)), policy.build_prompt, done=done, **settings,
        **functions)
    problems.solve(listed, policy, think, path, settings, config)


if __name__ == '__main__':
    with configurator.one_line_errors('rsa.py', 'try a smaller --population or --budget',
                                      'the same command goes on with the problems where it was'):
        main(*configurator.read(sys.argv[1:], RSAConfig))
