"""Loops: a task whose question is short, whose reasoning is as long as one likes, and whose answer can be checked.

A program with one register, modulo 10. Its K operations run R times over, from a start value:

    question     4x:a-2b*7c+3=5             4 times over: a: subtract 2, b: times 7, c: add 3; start with 5
    trace        5 4a-2=3 4b*7=1 4c+3=4 3a-2=2 ... 1c+3=5        (written without the spaces)
    answer       5

A trace first states the current value. Then each step is 5 tokens: loops left, label, operation, `=`, value.
So depth (K R steps, 3 to 72) and context come apart, as Markovian RSA (rsa.py) needs it: the last two steps of a trace
are all that a rollout must know of its past. The next round finds them behind the question, in brackets, one pair of
brackets for each candidate:

    <|user|> 4x:a-2b*7c+3=5 [4c+3=43a-2=2][4c+3=43a-2=2][4c+3=13a-2=9][4b*7=14c+3=4] <|end|> <|assistant|> <think>

and begins by stating the value that most of them agree on, 2 here (the third has erred, the fourth is a step behind);
then it goes on with step b. How to do so is learned from the examples of `aggregation_sample`, in the style of the
ZAYA1-8B report (arXiv 2605.05365, VI): tails of experts who err now and then, and the right continuation. Here the
experts are made up, so that everything can be prepared before training.

Train and test problems differ by construction: a hash of the question says which it is.
"""

import hashlib
import random
import re
from collections import Counter
from typing import NamedTuple

from data.reasoning import Turn
from data.tokenizer import SPECIAL_TOKENS, make_encoding

OPERATIONS = [f'+{n}' for n in range(1, 6)] + [f'-{n}' for n in range(1, 6)] + ['*3', '*7', '*9']    # all can be undone
STEP = 5                                           # tokens of a step
LENGTHS = {'easy': (3, 7), 'medium': (14, 20), 'hard': (25, 32), 'deep': (56, 64)}      # steps of the test problems
NOISE = 0.02                                       # of the values written in training, wrong on purpose

# A token a character, but for the operations, which are one token each: what a step does is then told by a single token.
ENC = make_encoding(r'[-+*]\d|[\s\S]', [bytes([b]) for b in range(256)] + [op.encode() for op in OPERATIONS], SPECIAL_TOKENS)
USER, ASSISTANT, END, THINK, CLOSE = map(ENC.encode_single_token,
                                         ['<|user|>', '<|assistant|>', '<|end|>', '<think>', '</think>'])
OPEN_TAIL, CLOSE_TAIL = ENC.encode_ordinary('[]')


class Problem(NamedTuple):
    loops: int                                     # R
    operations: tuple                              # K of OPERATIONS
    start: int

    @property
    def steps(self):
        return self.loops * len(self.operations)

    @property
    def question(self):
        return f'{self.loops}x:{"".join(map("".join, zip("abcdefgh", self.operations)))}={self.start}'


def parse(question):
    """The Problem that a question spells. Raises ValueError if it is none."""
    match = re.fullmatch(r'([1-9])x:((?:[a-h][-+*][0-9])+)=([0-9])', question)
    problem = match and Problem(int(match[1]), tuple(re.findall(r'[-+*][0-9]', match[2])), int(match[3]))
    if not match or problem.question != question or not set(problem.operations) <= set(OPERATIONS):
        raise ValueError(f'{question!r} is not a question like 4x:a-2b*7c+3=5 (loops 1 to 9; up to 8 operations '
                         'a, b, c, ..., each +1 to +5, -1 to -5, *3, *7 or *9; start value 0 to 9)')
    return problem


def apply(operation, value):
    """'*7', 3 -> 1: one step of the program."""
    n = int(operation[1:])
    return (value + n if operation[0] == '+' else value - n if operation[0] == '-' else value * n) % 10


def solve(question):
    """The answer, by running the program."""
    problem = parse(question)
    value = problem.start
    for _ in range(problem.loops):
        for operation in problem.operations:
            value = apply(operation, value)
    return value


def side(question):
    """'train', 'val' or 'test': where a problem belongs, by a hash of its question. One in eight is for tests."""
    return (['test', 'val'] + ['train'] * 6)[hashlib.sha256(question.encode()).digest()[0] % 8]


def draw_problem(rng, low, high, split):
    """A Problem of low to high steps that belongs to split: K 3 to 8, R 1 to 9, rng a random.Random. Raises ValueError if
    there is none."""
    sizes = [(k, r) for k in range(3, 9) for r in range(1, 10) if low <= k * r <= high]
    if not sizes:
        raise ValueError(f'no problem has {low} to {high} steps: 3 to 8 operations, run 1 to 9 times')
    while True:
        k, r = rng.choice(sizes)
        problem = Problem(r, tuple(rng.choices(OPERATIONS, k=k)), rng.randrange(10))
        if side(problem.question) == split:
            return problem


def test_problems(split, n, seed=0):
    """n different held-out problems of LENGTHS[split]. The first of them are the same for every n."""
    rng, found = random.Random(f'{split} {seed}'), {}
    while len(found) < n:
        problem = draw_problem(rng, *LENGTHS[split], 'test')
        found[problem.question] = problem
    return list(found.values())


# --- traces ------------------------------------------------------------------------------------------------
# A chain is what an expert did so far: [(steps of the program done, value), ...], from (0, start) on.


def continue_chain(problem, chain, n, rng, noise):
    """The chain and n more steps, or as many as there are. A share `noise` of their values is wrong; what follows a
    wrong value is computed from it, so that one error spoils the answer."""
    chain = list(chain)
    done, value = chain[-1]
    for done in range(done + 1, min(done + n, problem.steps) + 1):
        value = apply(problem.operations[(done - 1) % len(problem.operations)], value)
        if rng.random() < noise:
            value = (value + rng.randrange(1, 10)) % 10
        chain.append((done, value))
    return chain


def write(problem, chain):
    """The tokens of a chain: its first value, then the steps."""
    text, K = str(chain[0][1]), len(problem.operations)
    for done, value in chain[1:]:
        loop, i = divmod(done - 1, K)
        text += f'{problem.loops - loop}{"abcdefgh"[i]}{problem.operations[i]}={value}'
    return ENC.encode_ordinary(text)


def build_prompt(question, tails):
    """What a rollout reads: question and tails as tokens, ready for the first token of the trace.

    The <|end|> of a finished candidate is left out, so that a tail always ends in its last value.
    """
    brackets = [token for tail in tails for token in [OPEN_TAIL, *without_end(tail), CLOSE_TAIL]]
    return [USER, *question, *brackets, END, ASSISTANT, THINK]


def without_end(tail):
    return tail[:-1] if tail[-1:] == [END] else tail


def answer_of(output):
    """The answer in the tokens of a rollout, as a list of one token, or None without a complete one."""
    return output[-2:-1] if len(output) >= 3 and output[-3] == CLOSE and output[-1] == END else None


def sample(problem, tails, chain):
    """A training sample for data/reasoning.py, of one turn: the prompt is not scored; <think>, the chain and, if it is at
    its end, the answer are."""
    prompt, trace, (done, value) = build_prompt(ENC.encode_ordinary(problem.question), tails), write(problem, chain), chain[-1]
    if done < problem.steps:
        return [Turn(prompt[:-1], [THINK, *trace], [])]
    return [Turn(prompt[:-1], [THINK, *trace, CLOSE], [*ENC.encode_ordinary(str(value)), END])]


def trace_sample(rng, problem, noise=NOISE):
    """A whole solution."""
    return sample(problem, [], continue_chain(problem, [(0, problem.start)], problem.steps, rng, noise))


def rounds_needed(steps, budget):
    """Rounds of aggregation, at least 1, in which to end a trace: each of the T + 1 rollouts spends a token on stating the
    value, and </think>, answer and <|end|> take 3."""
    return max(1, -(-(steps * STEP + 3) // max(1, budget - 1)) - 1)


def judge(question, text):
    """What a rollout says last, against the truth: 'ok', 'wrong', or '' if it says nothing that can be checked."""
    problem = parse(question)
    K, value = len(problem.operations), problem.start
    if found := re.search(r'</think>(\d)', text):
        return 'ok' if int(found[1]) == solve(question) else 'wrong'
    if not (steps := re.findall(r'([1-9])([a-h])[-+*]\d=(\d)', text)):
        return ''
    loops_left, label, said = steps[-1]
    for done in range((problem.loops - int(loops_left)) * K + 'abcdefgh'.index(label) + 1):
        value = apply(problem.operations[done % K], value)
    return 'ok' if int(said) == value else 'wrong'


def spaced(text):
    """A trace as in the first lines of this file, easier to read."""
    return re.sub(r'^(\d)(?=\d)|(=\d)(?!<)', r'\1\2 ', text).rstrip()


# --- aggregation -------------------------------------------------------------------------------------------


def expert(rng, problem, end, wrong):
    """A chain of about `end` steps. Most experts are right and there. With probability `wrong` one has made an error
    at some step, which is seen only if that step is in the tail; one in eight lags, and a few have left out a step."""
    n = end if rng.random() < 7 / 8 else max(0, end - rng.choice([1, 1, 2, 3, 8]))
    chain, error = [(0, problem.start)], rng.randrange(1, n + 1) if n and rng.random() < wrong else None
    if error is None:
        return continue_chain(problem, chain, n, rng, 0)
    chain = continue_chain(problem, chain, error - 1, rng, 0)
    done, value = chain[-1]
    if rng.random() < 0.25:                        # a step left out: as many steps written, one further on
        if done + 2 > problem.steps:
            return chain
        chain.append((done + 2, apply(problem.operations[(done + 1) % len(problem.operations)], value)))
    else:
        chain = continue_chain(problem, chain, 1, rng, 1)
    return continue_chain(problem, chain, n - error, rng, 0)


def tail_of(rng, problem, chain, tail, written, answers=True):
    """The last `tail` tokens of an expert's rollout, which wrote about so many steps in this round, and says its answer, if it
    `answers`, where it is at the end; one in thirty thinks that it is there too early."""
    there = chain[-1][0] == problem.steps
    tokens = write(problem, chain[-1 - max(written, not there):])               # a step at least, if it is not at the end
    if there and answers or rng.random() < 1 / 30:
        tokens += [CLOSE, *ENC.encode_ordinary(str(chain[-1][1]))]
    return tokens[-tail:]


def vote(ends):
    """[(steps done, value), ...] -> the one to continue from: the place where most are, of equals the furthest, and
    the value that most have there. None if no value has more votes than every other."""
    places = Counter(done for done, _ in ends)
    place = max(places, key=lambda done: (places[done], done))
    (value, votes), *others = Counter(value for done, value in ends if done == place).most_common()
    return None if others and others[0][1] == votes else (place, value)


def aggregation_sample(rng, problem, candidates, budget, tail, noise=NOISE, short=0.7):
    """Tails of `candidates` experts and the right continuation, cut at the budget; a share `short` of the examples after
    one step, for the value stated first is what there is to learn. The experts are drawn until their vote is right, so
    what is stated always is; after that, `noise` as in any trace. Without candidates: the first round of a problem."""
    true = continue_chain(problem, [(0, problem.start)], problem.steps, rng, 0)
    # How far they have come: anywhere, often to where a round ends, or to the end of all. How often is a guess of what
    # rollouts do, as are the other shares here and in `expert` and `tail_of`.
    per_round = max(1, budget // STEP)             # steps
    end = rng.randrange(1, problem.steps + 1)
    if (round_end := -(-end // per_round) * per_round) < problem.steps and rng.random() < 0.4:
        end = round_end
    if rng.random() < 0.2:
        end = problem.steps
    written = rng.randrange(3) if end == problem.steps and rng.random() < 0.5 else per_round        # the last round can be short
    answers = rng.random() < 0.8                   # or the budget has left no room for it
    wrong, begin, chains = rng.choice([0.1, 0.3, 0.5]), true[0], []
    while candidates and (not chains or begin not in true):
        chains = [expert(rng, problem, end, wrong) for _ in range(candidates)]
        begin = vote([chain[-1] for chain in chains])
    tails = [tail_of(rng, problem, chain, tail, written, answers) for chain in chains]
    steps = 1 if candidates and rng.random() < short else per_round
    (turn,) = sample(problem, tails, continue_chain(problem, [begin], steps, rng, noise))
    room = budget + 1                              # for <think>, which is given at generation
    return [turn._replace(think=turn.think[:room], answer=turn.answer[:max(0, room - len(turn.think))])]
