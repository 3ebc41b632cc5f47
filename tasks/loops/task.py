"""Loops: a task whose question is short, whose reasoning is as long as one likes, and whose answer can be checked.

A program with one register, modulo 10. Its K operations run R times over, from a start value:

    question     4x:a-2b*7c+3=5             4 times over: a: subtract 2, b: times 7, c: add 3; start with 5
    trace        5 4a-2=3 4b*7=1 4c+3=4 3a-2=2 ... 1c+3=5        (written without the spaces)
    answer       5

A trace first states the current value. Then each step is 5 tokens: loops left, label, operation, `=`, value.
So a problem can be far deeper (K R steps, up to 234) than the context is long, as Markovian RSA (rsa.py) needs it: the
last two steps of a trace say all of the past that a rollout must know. The next round finds them behind the question,
in brackets, one pair of brackets for each candidate:

    <|user|> 4x:a-2b*7c+3=5 [4c+3=43a-2=2][4c+3=43a-2=2][4c+3=13a-2=9][4b*7=14c+3=4] <|end|> <|assistant|> <think>

and begins by stating the value on which most of them agree, 2 here (the third has erred, the fourth is a step behind);
then it goes on with step b. How to do so is learned from the examples of `aggregation_sample`, in the style of the
ZAYA1-8B report (arXiv 2605.05365, VI): tails of experts who err now and then, and the right continuation. Here the
experts are made up, so that everything can be prepared before training.

No problem is both trained and tested on: a hash of the question says to which of the two it belongs.
"""

import hashlib
import random
import re
from collections import Counter
from typing import NamedTuple

from data.reasoning import Turn
from data.tokenizer import SPECIAL_TOKENS, digest, make_encoding

OPERATIONS = [f'+{n}' for n in range(1, 6)] + [f'-{n}' for n in range(1, 6)] + ['*3', '*7', '*9']    # all invertible
STEP = 5                                           # tokens of a step
LABELS, MOST = 'abcdefghijklmnopqrstuvwxyz', 8     # of operations; so many has a program at most, by default
LENGTHS = {'easy': (3, 7), 'medium': (14, 20), 'hard': (25, 32), 'deep': (56, 64),          # steps of test problems
           'deeper': (112, 120), 'deepest': (225, 234)}        # these take programs of more than MOST operations
NOISE = 0.02                                       # of the values written in training, wrong on purpose

# Every character is a token, but an operation is one token as a whole: a single token says what a step does.
ENC = make_encoding(r'[-+*]\d|[\s\S]', [bytes([b]) for b in range(256)] + [op.encode() for op in OPERATIONS],
                    SPECIAL_TOKENS)
DIGEST = digest(ENC)                               # by it a model that was trained on this task is known
USER, ASSISTANT, END, THINK, CLOSE = map(ENC.encode_single_token,
                                         ['<|user|>', '<|assistant|>', '<|end|>', '<think>', '</think>'])
OPEN_TAIL, CLOSE_TAIL = ENC.encode_ordinary('[]')


class Problem(NamedTuple):
    """A program and its start value."""
    loops: int                                     # R
    operations: tuple                              # K of OPERATIONS
    start: int                                     # 0 to 9

    @property
    def steps(self):
        """Return the number of steps from the start value to the answer."""
        return self.loops * len(self.operations)

    @property
    def question(self):
        """Return the problem as text, 4x:a-2b*7c+3=5."""
        return f'{self.loops}x:{"".join(map("".join, zip(LABELS, self.operations)))}={self.start}'


def parse(question):
    """Return the Problem that a question spells. Raise ValueError if it is none."""
    match = re.fullmatch(r'([1-9])x:((?:[a-z][-+*][0-9])+)=([0-9])', question)
    problem = match and Problem(int(match[1]), tuple(re.findall(r'[-+*][0-9]', match[2])), int(match[3]))
    if not match or problem.question != question or not set(problem.operations) <= set(OPERATIONS):
        raise ValueError(f'{question!r} is not a question like 4x:a-2b*7c+3=5 (loops 1 to 9; up to 26 operations '
                         'a, b, c, ..., each +1 to +5, -1 to -5, *3, *7 or *9; start value 0 to 9)')
    return problem


def apply(operation, value):
    """Return the value after one step of the program: '*7', 3 -> 1."""
    n = int(operation[1:])
    return (value + n if operation[0] == '+' else value - n if operation[0] == '-' else value * n) % 10


def solve(question):
    """Return the answer, by running the program."""
    problem = parse(question)
    return value_at(problem, problem.steps)


def value_at(problem, done):
    """Return the value after so many steps of the program."""
    value = problem.start
    for i in range(done):
        value = apply(problem.operations[i % len(problem.operations)], value)
    return value


def side(question):
    """Return 'train', 'val' or 'test', by a hash of the question. One in eight is 'test', one in eight is 'val'."""
    return (['test', 'val'] + ['train'] * 6)[hashlib.sha256(question.encode()).digest()[0] % 8]


def draw_problem(rng, low, high, split, most=MOST):
    """Draw a Problem of low to high steps that belongs to split: K 3 to most, R 1 to 9.

    rng: a random.Random. Raise ValueError if no problem has so few or so many steps.
    """
    sizes = [(k, r) for k in range(3, most + 1) for r in range(1, 10) if low <= k * r <= high]
    if not sizes:
        raise ValueError(f'no problem has {low} to {high} steps: 3 to {most} operations, run 1 to 9 times')
    while True:
        k, r = rng.choice(sizes)
        problem = Problem(r, tuple(rng.choices(OPERATIONS, k=k)), rng.randrange(10))
        if side(problem.question) == split:
            return problem


def test_problems(split, n, seed=0):
    """Return a list of n different held-out problems of LENGTHS[split]. A larger n only adds problems at the end."""
    rng, found, (low, high) = random.Random(f'{split} {seed}'), {}, LENGTHS[split]
    most = max(MOST, -(-high // 9))                # as many as it takes, running 9 times
    while len(found) < n:
        problem = draw_problem(rng, low, high, 'test', most)
        found[problem.question] = problem
    return list(found.values())


# --- traces ------------------------------------------------------------------------------------------------
# A chain is what an expert did so far: [(steps of the program done, value), ...], from (0, start) on.


def continue_chain(problem, chain, n, rng, noise):
    """Return the chain with n more steps, fewer only if the program ends.

    A share `noise` of the new values is wrong. What follows a wrong value is computed from it, so that one error spoils
    the answer.
    """
    chain = list(chain)
    done, value = chain[-1]
    for i in range(done, min(done + n, problem.steps)):
        value = apply(problem.operations[i % len(problem.operations)], value)
        if rng.random() < noise:
            value = (value + rng.randrange(1, 10)) % 10
        chain.append((i + 1, value))
    return chain


def texts_of(problem, chain):
    """Return the texts of a chain, one for each of its pairs (steps done, value): the first value, then the steps."""
    return [str(chain[0][1]), *(f'{step_text(problem, done - 1)}{value}' for done, value in chain[1:])]


def step_text(problem, done):
    """Return the text of the step that comes after so many, up to its value: '4a-2='."""
    loop, i = divmod(done, len(problem.operations))
    return f'{problem.loops - loop}{LABELS[i]}{problem.operations[i]}='


def write(problem, chain):
    """Return the tokens of a chain: its first value, then the steps."""
    return ENC.encode_ordinary(''.join(texts_of(problem, chain)))


def build_prompt(question, tails):
    """Return the tokens that a rollout reads before it writes the first token of its trace.

    question: list of tokens; tails: list of such lists. The <|end|> of a finished candidate is left out, so that every
    tail ends in a value.
    """
    brackets = [token for tail in tails for token in [OPEN_TAIL, *without_end(tail), CLOSE_TAIL]]
    return [USER, *question, *brackets, END, ASSISTANT, THINK]


def without_end(tail):
    """Return the tokens of a tail without the <|end|> at its end, if there is one."""
    return tail[:-1] if tail[-1:] == [END] else tail


def answer_of(output):
    """Return the answer in the tokens of a rollout, as a list of one token, or None if there is no complete one."""
    return output[-2:-1] if len(output) >= 3 and output[-3] == CLOSE and output[-1] == END else None


def sample(problem, tails, chain):
    """Return a training sample of one turn, as in data/reasoning.py.

    The prompt is not scored. Scored are <think>, the chain and, if all steps are done, the answer.
    """
    prompt, trace = build_prompt(ENC.encode_ordinary(problem.question), tails), write(problem, chain)
    done, value = chain[-1]
    if done < problem.steps:
        return [Turn(prompt[:-1], [THINK, *trace], [])]
    return [Turn(prompt[:-1], [THINK, *trace, CLOSE], [*ENC.encode_ordinary(str(value)), END])]


def trace_sample(rng, problem, noise=NOISE):
    """Return a training sample that is a whole solution; a share `noise` of its values is wrong."""
    return sample(problem, [], continue_chain(problem, [(0, problem.start)], problem.steps, rng, noise))


def rounds_needed(steps, budget):
    """Return T, how many rounds of aggregation (at least 1) a trace takes to come to its end.

    The trace is written by T + 1 rollouts of `budget` tokens. Each spends one token on the value that it states first;
    </think>, answer and <|end|> take 3 more.
    """
    return max(1, -(-(steps * STEP + 3) // max(1, budget - 1)) - 1)


def judge(question, text):
    """Return 'ok' or 'wrong', for the last value that a rollout states; '' if its text states none."""
    problem = parse(question)
    if found := re.search(r'</think>([0-9])', text):
        return 'ok' if int(found[1]) == solve(question) else 'wrong'
    if not (steps := re.findall(r'([1-9])([a-z])[-+*][0-9]=([0-9])', text)):
        return ''
    loops_left, label, said = steps[-1]
    done = steps_done(problem, loops_left, label)
    return 'ok' if done and int(said) == value_at(problem, done) else 'wrong'


def steps_done(problem, loops_left, label):
    """Return how many steps are done after this one, or None if it is no step of the program."""
    loop, i, K = problem.loops - int(loops_left), LABELS.index(label), len(problem.operations)
    return loop * K + i + 1 if loop >= 0 and i < K else None


def place_of(problem, text):
    """Return how many steps are done where the text of a trace ends, None if that is neither a step nor an answer."""
    if re.search(r'</think>[0-9]?(<\|end\|>)?$', text):
        return problem.steps
    last = re.search(r'([1-9])([a-z])[-+*][0-9]=[0-9]$', text)
    return steps_done(problem, *last.groups()) if last else None


def begin_of(problem, text):
    """Return how many steps are done where the text of an output begins: all, if no step follows its first value; None
    if that is no step of the program."""
    first = re.match(r'[0-9]([1-9])([a-z])', text)
    if not first:
        return problem.steps
    done = steps_done(problem, *first.groups())
    return done - 1 if done else None


def verify(question, tails, output, budget):
    """Return True if a rollout is right, False if not. question: text; tails: those that it read; output: its tokens.

    It is right if it states a value and goes on, step by step and leaving none out, from where a tail ended (without
    tails: from the start) to the end, and says the right answer; or, if it is as long as the budget, if at least one
    step is done and the last value is right. Only the last value is looked at, not the way to it. An answer without a
    solution is wrong, and so is an output that stops early, stands still, or begins anew.
    """
    problem, text = parse(question), ENC.decode(output)
    ends = {place_of(problem, ENC.decode(without_end(tail))) for tail in tails} or {0}
    done = begin = begin_of(problem, text)
    if begin is None or begin not in ends or not re.match('[0-9]', text):
        return False
    said, rest = text[0], text[1:]                 # the last value, and what comes after it
    while done < problem.steps:
        step = step_text(problem, done)
        if not re.match(re.escape(step) + '[0-9]', rest):
            break
        said, rest, done = rest[len(step)], rest[len(step) + 1:], done + 1
    else:
        step = f'</think>{solve(question)}<|end|>'
    cut = len(output) == budget and step.startswith(rest) and done > begin
    return int(said) == value_at(problem, done) and (cut or done == problem.steps and rest == step)


def spaced(text):
    """Return the text of a trace with spaces between its steps, as in the first lines of this file."""
    return re.sub(r'^(\d)(?=\d)|(=\d)(?!<)', r'\1\2 ', text).rstrip()


# --- aggregation -------------------------------------------------------------------------------------------
# The experts stand for the rollouts of a trained model, which do not exist before training. So these numbers are
# guesses. They suit the default budget of 41 tokens, which is 8 steps a round.

# Chance that a sample's experts stop where a round ends, as rollouts of one budget do. Else they stop anywhere, so that
# the model can also read tails of other budgets.
END_OF_ROUND = 0.4
# Chance that a sample's experts have done all steps in any case, so that only the answer is left to say. RSA has such
# rounds: short problems need fewer than it runs.
FINISHED = 0.2
# Share of the finished whose last round had few steps left to write: 0 to FEW - 1.
SHORT_LAST = 0.5
FEW = 3
# Share of the finished whose last round had room for the answer. A third of the programs end just where a round does,
# which leaves no room; with a smaller budget it is more of them.
ANSWERS = 0.8
# Share of the samples that end after one step. What they have to teach is the value stated first; how the steps go is
# learned from whole solutions.
SHORT = 0.7
# Share of the experts that err. A sample draws one of these for all its experts, because they have the same problem,
# easy or hard. With NOISE alone, 15% of the rounds of 8 steps hold an error; a model that has learned little errs more.
ERRING = 0.1, 0.3, 0.5
# Share of the errors that are a step left out. The others, a wrong value, are the commoner kind.
SKIPPING = 0.25
# Share of the experts that are behind, by LAGS steps. At least one of 4 is in 41% of the samples, but two or more only
# in 8%: they must be read past, and seldom win the vote.
LAGGING = 1 / 8
# By how many steps an expert is behind, each equally often: mostly by one, sometimes by a whole round.
LAGS = 1, 1, 2, 3, 8
# Share of the experts that say an answer before the last step. A few, so that the model learns to go on all the same.
EARLY = 1 / 30


def expert(rng, problem, end, wrong):
    """Draw the chain of an expert, of `end` steps, fewer if it lags, one more if it leaves one out.

    With probability `wrong` it makes one error, at any step. An error before the tail shows there only as a wrong value
    to begin with: the steps from it are right.
    """
    n = end if rng.random() < 1 - LAGGING else max(0, end - rng.choice(LAGS))
    chain, error = [(0, problem.start)], rng.randrange(1, n + 1) if n and rng.random() < wrong else None
    if error is None:
        return continue_chain(problem, chain, n, rng, 0)
    chain = continue_chain(problem, chain, error - 1, rng, 0)
    done, value = chain[-1]
    if rng.random() < SKIPPING:                    # leave out a step: as many are written, but the last is one further
        if done + 2 > problem.steps:
            return chain
        chain.append((done + 2, apply(problem.operations[(done + 1) % len(problem.operations)], value)))
    else:
        chain = continue_chain(problem, chain, 1, rng, 1)
    return continue_chain(problem, chain, n - error, rng, 0)


def tail_of(rng, problem, chain, tail, written, answers=True):
    """Return the last `tail` tokens of an expert's rollout, which wrote the last `written` steps of the chain.

    An expert who has done all steps says the answer, if `answers`; a few say one too early.
    """
    there = chain[-1][0] == problem.steps
    steps = written if there else max(1, written)                               # before the end, at least one step
    tokens = write(problem, chain[-1 - steps:])
    if there and answers or rng.random() < EARLY:
        tokens += [CLOSE, *ENC.encode_ordinary(str(chain[-1][1]))]
    return tokens[-tail:]


def vote(ends):
    """Return the (steps done, value) from which to continue, or None if two values are equally common.

    ends: a list of such pairs. First the place: where most ends are; of equally full places the furthest. Then the
    commonest value of the ends there.
    """
    places = Counter(done for done, _ in ends)
    place = max(places, key=lambda done: (places[done], done))
    (value, votes), *others = Counter(value for done, value in ends if done == place).most_common()
    return None if others and others[0][1] == votes else (place, value)


def draw_aggregation(rng, problem, candidates, per_round, noise=NOISE, short=SHORT):
    """Draw what an aggregation sample is made of: the chains of `candidates` experts; how many steps each wrote in its
    last round, and whether that had room for the answer; and the chain that continues what most of them agree on.

    The experts are drawn until their vote is right, so that the value stated first always is; of the values after it, a
    share `noise` is wrong, as in any trace. A share `short` of the samples ends after one step, the others after
    per_round steps. Without candidates the continuation is the first round of a solution.
    """
    true = continue_chain(problem, [(0, problem.start)], problem.steps, rng, 0)
    end = rng.randrange(1, problem.steps + 1)      # how far the experts are
    round_end = -(-end // per_round) * per_round
    if round_end < problem.steps and rng.random() < END_OF_ROUND:
        end = round_end
    if rng.random() < FINISHED:
        end = problem.steps
    written = rng.randrange(FEW) if end == problem.steps and rng.random() < SHORT_LAST else per_round
    answers = rng.random() < ANSWERS
    wrong, begin, chains = rng.choice(ERRING), true[0], []
    while candidates and (not chains or begin not in true):
        chains = [expert(rng, problem, end, wrong) for _ in range(candidates)]
        begin = vote([chain[-1] for chain in chains])
    steps = 1 if candidates and rng.random() < short else per_round
    return chains, written, answers, continue_chain(problem, [begin], steps, rng, noise)


def aggregation_sample(rng, problem, candidates, budget, tail, noise=NOISE, short=SHORT):
    """Return a training sample of draw_aggregation: question, tails, and the continuation, cut at the budget."""
    chains, written, answers, chain = draw_aggregation(rng, problem, candidates, max(1, budget // STEP), noise, short)
    tails = [tail_of(rng, problem, chain, tail, written, answers) for chain in chains]
    (turn,) = sample(problem, tails, chain)
    room = budget + 1                              # for <think>, which is given at generation
    return [turn._replace(think=turn.think[:room], answer=turn.answer[:max(0, room - len(turn.think))])]
