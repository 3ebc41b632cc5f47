"""The loops task: short questions, chains of thought of any length, and answers that can be verified.

A question is a program with one register, modulo 10. Its K operations run R times from a start value:

    question     4x:a-2b*7c+3=5             4 times: a: subtract 2, b: multiply by 7, c: add 3; start with 5
    solution     5 4a-2=3 4b*7=1 4c+3=4 3a-2=2 ... 1c+3=5        (written without the spaces)
    answer       5

A solution first states the current value. Each step is 5 tokens: loops left, label, operation, `=`, value. A problem
can have far more steps (K R, up to 234) than fit the context, which is what Markovian RSA (rsa.py) is for: the last two
steps of a solution contain all of the past that a rollout needs. The prompt of the next round has such tails after the
question, one pair of brackets per candidate:

    <|user|> 4x:a-2b*7c+3=5 [4c+3=43a-2=2][4c+3=43a-2=2][4c+3=13a-2=9][4b*7=14c+3=4] <|end|> <|assistant|> <think>

The model states the value of the majority, 2 here (the third candidate has made an error, the fourth is one step
behind), and continues with step b. It learns this from the samples of `aggregation_sample`, in the style of the
ZAYA1-8B report (arXiv 2605.05365, VI): tails of candidates with occasional errors, and the correct continuation. The
candidates are simulated, so that the whole dataset exists before training.

Train, validation and test problems are disjoint: a hash of the question decides the split.
"""
import hashlib
import random
import re
from collections import Counter
from typing import NamedTuple

from data.reasoning import Turn
from data.tokenizer import SPECIAL_TOKENS, digest, make_encoding

OPERATIONS = [f'+{n}' for n in range(1, 6)] + [f'-{n}' for n in range(1, 6)] + ['*3', '*7', '*9']    # all invertible
STEP = 5                                           # tokens per step
LABELS = 'abcdefghijklmnopqrstuvwxyz'              # of the operations
MAX_OPERATIONS = 8                                 # per program, unless stated otherwise
LENGTHS = {'easy': (3, 7), 'medium': (14, 20), 'hard': (25, 32), 'deep': (56, 64),      # steps of the test problems
           'deeper': (112, 120), 'deepest': (225, 234)}        # the last two need more than MAX_OPERATIONS
NOISE_RATE = 0.02                                  # fraction of values in the training data that are wrong on purpose

# Each character is one token, except that an operation is a single token, which says what a step does.
ENC = make_encoding(r'[-+*]\d|[\s\S]', [bytes([b]) for b in range(256)] + [op.encode() for op in OPERATIONS],
                    SPECIAL_TOKENS)
DIGEST = digest(ENC)                               # identifies models that were trained on this task
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

    def apply_step(self, done, value):
        """Return the value after step number `done` (0, 1, ...), which starts from `value`."""
        return apply(self.operations[done % len(self.operations)], value)


def parse(question):
    """Return the Problem of a question. Raise ValueError if it is not a question."""
    match = re.fullmatch(r'([1-9])x:((?:[a-z][-+*][0-9])+)=([0-9])', question)
    problem = match and Problem(int(match[1]), tuple(re.findall(r'[-+*][0-9]', match[2])), int(match[3]))
    if not match or problem.question != question or not set(problem.operations) <= set(OPERATIONS):
        raise ValueError(f'{question!r} is not a question like 4x:a-2b*7c+3=5 (loops 1 to 9; up to 26 operations '
                         'a, b, c, ..., each +1 to +5, -1 to -5, *3, *7 or *9; start value 0 to 9)')
    return problem


def apply(operation, value):
    """Return the value after one operation: '*7', 3 -> 1."""
    n = int(operation[1:])
    return (value + n if operation[0] == '+' else value - n if operation[0] == '-' else value * n) % 10


def solve(question):
    """Return the answer, by running the program."""
    problem = parse(question)
    return value_at(problem, problem.steps)


def value_at(problem, done):
    """Return the value after `done` steps of the program."""
    value = problem.start
    for i in range(done):
        value = problem.apply_step(i, value)
    return value


def split_of(question):
    """Return 'train', 'val' or 'test', by a hash of the question. One in eight is 'test', one in eight is 'val'."""
    return (['test', 'val'] + ['train'] * 6)[hashlib.sha256(question.encode()).digest()[0] % 8]


def draw_problem(rng, low, high, split, most=MAX_OPERATIONS):
    """Sample a Problem of low to high steps from a split: K = 3 to `most` operations, R = 1 to 9 loops. rng: a
    random.Random. Raise ValueError if no problem has such a number of steps."""
    sizes = [(k, r) for k in range(3, most + 1) for r in range(1, 10) if low <= k * r <= high]
    if not sizes:
        raise ValueError(f'no problem has {low} to {high} steps: 3 to {most} operations, run 1 to 9 times')
    while True:
        k, r = rng.choice(sizes)
        problem = Problem(r, tuple(rng.choices(OPERATIONS, k=k)), rng.randrange(10))
        if split_of(problem.question) == split:
            return problem


def test_problems(split, n, seed=0):
    """Return n different held-out problems of LENGTHS[split]. The first m of n problems do not depend on n."""
    rng, found, (low, high) = random.Random(f'{split} {seed}'), {}, LENGTHS[split]
    most = max(MAX_OPERATIONS, -(-high // 9))      # as many operations as 9 loops need
    while len(found) < n:
        problem = draw_problem(rng, low, high, 'test', most)
        found[problem.question] = problem
    return list(found.values())


# --- solutions ---------------------------------------------------------------------------------------------
# A chain (of thought) is a part of a solution as pairs: [(steps done, value), ...]. A whole one starts at (0, start).


def continue_chain(problem, chain, n, rng, noise):
    """Return the chain with n more steps, fewer if the program ends before. Each new value is wrong with probability
    `noise`. The following values are computed from the wrong one, so that a single error makes the answer wrong."""
    chain, (done, value) = list(chain), chain[-1]
    for i in range(done, min(done + n, problem.steps)):
        value = problem.apply_step(i, value)
        if rng.random() < noise:
            value = (value + rng.randrange(1, 10)) % 10
        chain.append((i + 1, value))
    return chain


def step_texts(problem, chain):
    """Return the texts of a chain, one per pair (steps done, value): the first value, then the steps."""
    return [str(chain[0][1]), *(f'{step_text(problem, done - 1)}{value}' for done, value in chain[1:])]


def step_text(problem, done):
    """Return the text of step number `done` (0, 1, ...) without its value: '4a-2='."""
    loop, i = divmod(done, len(problem.operations))
    return f'{problem.loops - loop}{LABELS[i]}{problem.operations[i]}='


def encode_chain(problem, chain):
    """Return the tokens of a chain: its first value, then the steps."""
    return ENC.encode_ordinary(''.join(step_texts(problem, chain)))


def build_prompt(question, tails):
    """Return the prompt tokens of a rollout. question: tokens; tails: lists of tokens. The <|end|> of a finished
    candidate is removed, so that every tail ends in a value."""
    brackets = [token for tail in tails for token in [OPEN_TAIL, *without_end(tail), CLOSE_TAIL]]
    return [USER, *question, *brackets, END, ASSISTANT, THINK]


def without_end(tail):
    """Return the tokens of a tail without a final <|end|>."""
    return tail[:-1] if tail[-1:] == [END] else tail


def answer_of(output):
    """Return the answer in the tokens of a rollout, a list of one token, or None if there is no complete answer."""
    return output[-2:-1] if len(output) >= 3 and output[-3] == CLOSE and output[-1] == END else None


def training_sample(problem, tails, chain):
    """Return a training sample of one turn: <think>, the chain and, if all steps are done, the answer."""
    prompt, solution = build_prompt(ENC.encode_ordinary(problem.question), tails), encode_chain(problem, chain)
    done, value = chain[-1]
    if done < problem.steps:
        return [Turn(prompt[:-1], [THINK, *solution], [])]
    return [Turn(prompt[:-1], [THINK, *solution, CLOSE], [*ENC.encode_ordinary(str(value)), END])]


def trace_sample(rng, problem, noise=NOISE_RATE):
    """Return a training sample with a whole solution; a fraction `noise` of its values is wrong."""
    chain = continue_chain(problem, [(0, problem.start)], problem.steps, rng, noise)
    return training_sample(problem, [], chain)


def rounds_needed(steps, budget):
    """Return T, the number of aggregation rounds (at least 1) that a solution needs: T + 1 rollouts of `budget` tokens
    write it. Each spends one token on the value that it states first; </think>, the answer and <|end|> take 3 more."""
    return max(1, -(-(steps * STEP + 3) // max(1, budget - 1)) - 1)


def judge(question, text):
    """Return 'ok' or 'wrong' for the last value that a rollout states, '' if it states none."""
    problem = parse(question)
    if found := re.search(r'</think>([0-9])', text):
        return 'ok' if int(found[1]) == solve(question) else 'wrong'
    if not (steps := re.findall(r'([1-9])([a-z])[-+*][0-9]=([0-9])', text)):
        return ''
    loops_left, label, stated = steps[-1]
    done = steps_done(problem, loops_left, label)
    return 'ok' if done and int(stated) == value_at(problem, done) else 'wrong'


def steps_done(problem, loops_left, label):
    """Return the number of steps done after this step, or None if the program has no such step."""
    loop, i, K = problem.loops - int(loops_left), LABELS.index(label), len(problem.operations)
    return loop * K + i + 1 if loop >= 0 and i < K else None


def steps_at_end(problem, text):
    """Return the number of steps done at the end of a text; None if it ends in neither a step nor an answer."""
    if re.search(r'</think>[0-9]?(<\|end\|>)?$', text):
        return problem.steps
    last = re.search(r'([1-9])([a-z])[-+*][0-9]=[0-9]$', text)
    return steps_done(problem, *last.groups()) if last else None


def steps_at_start(problem, text):
    """Return the number of steps done before the first step of an output: all, if no step follows the first value; None
    if the program has no such step."""
    first = re.match(r'[0-9]([1-9])([a-z])', text)
    if not first:
        return problem.steps
    done = steps_done(problem, *first.groups())
    return done - 1 if done else None


def verify(question, tails, output, budget):
    """Return True if a rollout is correct. question: text; tails: the tokens of those in its prompt; output: tokens.
    A correct output states a value and continues step by step from the end of a tail (without tails: from the start).
    It either reaches the end of the program and gives the correct answer; or it is as long as the budget, has at least
    one step, and its last value is correct. Only the last value is checked, not those before it. An answer without a
    solution is wrong, and so is an output that stops early, makes no progress, or restarts."""
    problem, text = parse(question), ENC.decode(output)
    ends = {steps_at_end(problem, ENC.decode(without_end(tail))) for tail in tails} or {0}
    done = start = steps_at_start(problem, text)
    if start is None or start not in ends or not re.match('[0-9]', text):
        return False
    value, rest = text[0], text[1:]                # the last value, and the text after it
    while done < problem.steps:
        step = step_text(problem, done)
        if not re.match(re.escape(step) + '[0-9]', rest):
            break
        value, rest, done = rest[len(step)], rest[len(step) + 1:], done + 1
    else:
        step = f'</think>{solve(question)}<|end|>'
    is_cut = len(output) == budget and step.startswith(rest) and done > start
    return int(value) == value_at(problem, done) and (is_cut or done == problem.steps and rest == step)


def spaced(text):
    """Return the text of a solution with spaces between its steps, as in the docstring of this file."""
    return re.sub(r'^(\d)(?=\d)|(=\d)(?!<)', r'\1\2 ', text).rstrip()


# --- aggregation -------------------------------------------------------------------------------------------
# Simulated candidates stand for the rollouts of a trained model, which does not exist before training. These values are
# therefore estimates, for the default budget of 41 tokens, which is 8 steps per round.

# Probability per sample that
END_OF_ROUND = 0.4         # its candidates stop at the end of a round, as rollouts of one budget do; otherwise anywhere
FINISHED = 0.2             # they have done all steps: short problems need fewer rounds than RSA runs
SHORT_LAST, FEW = 0.5, 3   # if so, their last round had only 0 to FEW - 1 steps left
ANSWERS = 0.8              # if so, it had room for the answer, which a third of the programs end too late for
SHORT = 0.7                # it ends after one step: it teaches the value stated first, whole solutions teach the steps
ERRING = 0.1, 0.3, 0.5     # a candidate has an error, one of these; NOISE_RATE alone gives 15% per round of 8 steps
# Probability per candidate that
SKIPPING = 0.25            # its error is a skipped step; the other errors, wrong values, are more common
LAGGING = 1 / 8            # it is behind: at least one of 4 in 41% of the samples, two or more in only 8%
LAGS = 1, 1, 2, 3, 8       # ... by one of these numbers of steps
EARLY = 1 / 30             # it gives an answer before the last step, so that the model learns to continue regardless


def simulate_candidate(rng, problem, end, error_rate):
    """Sample the chain of a candidate with `end` steps; fewer if it lags, one more if it skips a step. With probability
    error_rate it makes one error, at any step. An error before the tail is visible there only as a wrong first value:
    the steps after it are correct."""
    n = end if rng.random() < 1 - LAGGING else max(0, end - rng.choice(LAGS))
    chain, error = [(0, problem.start)], rng.randrange(1, n + 1) if n and rng.random() < error_rate else None
    if error is None:
        return continue_chain(problem, chain, n, rng, 0)
    chain = continue_chain(problem, chain, error - 1, rng, 0)
    if rng.random() < SKIPPING:                    # skip a step: the number of written steps stays the same
        done, value = chain[-1]
        if done + 2 > problem.steps:
            return chain
        chain.append((done + 2, problem.apply_step(done + 1, value)))
    else:
        chain = continue_chain(problem, chain, 1, rng, 1)
    return continue_chain(problem, chain, n - error, rng, 0)


def tail_of(rng, problem, chain, tail, written, answers=True):
    """Return the last `tail` tokens of a candidate's rollout, which wrote the last `written` steps of the chain. A
    candidate that has done all steps gives the answer if `answers`; a few others give one too early."""
    finished = chain[-1][0] == problem.steps
    steps = written if finished else max(1, written)            # at least one step before the end
    tokens = encode_chain(problem, chain[-1 - steps:])
    if finished and answers or rng.random() < EARLY:
        tokens += [CLOSE, *ENC.encode_ordinary(str(chain[-1][1]))]
    return tokens[-tail:]


def majority_vote(ends):
    """Return the (steps done, value) from which to continue, or None for a tie between values. ends: a list of such
    pairs. The first vote is over the steps done, the larger number winning ties; the second is over the values there.
    """
    counts = Counter(done for done, _ in ends)
    winner = max(counts, key=lambda done: (counts[done], done))
    (value, votes), *others = Counter(value for done, value in ends if done == winner).most_common()
    return None if others and others[0][1] == votes else (winner, value)


def draw_aggregation(rng, problem, candidates, per_round, noise=NOISE_RATE, short=SHORT):
    """Sample the parts of an aggregation sample: the chains of `candidates` simulated candidates; the number of steps
    that each wrote in its last round, and whether the answer fitted; and the chain that continues from their majority.
    Candidates are resampled until their vote is correct, so that the value stated first always is; the values after it
    are wrong with probability `noise`, as in any solution. A fraction `short` of the samples ends after one step, the
    others after per_round steps. Without candidates the continuation is the first round of a solution."""
    true = continue_chain(problem, [(0, problem.start)], problem.steps, rng, 0)
    end = rng.randrange(1, problem.steps + 1)      # steps that the candidates have done
    round_end = -(-end // per_round) * per_round
    if round_end < problem.steps and rng.random() < END_OF_ROUND:
        end = round_end
    if rng.random() < FINISHED:
        end = problem.steps
    written = rng.randrange(FEW) if end == problem.steps and rng.random() < SHORT_LAST else per_round
    answers = rng.random() < ANSWERS
    error_rate, start, chains = rng.choice(ERRING), true[0], []
    while candidates and (not chains or start not in true):
        chains = [simulate_candidate(rng, problem, end, error_rate) for _ in range(candidates)]
        start = majority_vote([chain[-1] for chain in chains])
    steps = 1 if candidates and rng.random() < short else per_round
    return chains, written, answers, continue_chain(problem, [start], steps, rng, noise)


def aggregation_sample(rng, problem, candidates, budget, tail, noise=NOISE_RATE, short=SHORT):
    """Return a training sample of draw_aggregation: question, tails, and the continuation, cut at the budget."""
    chains, written, answers, chain = draw_aggregation(rng, problem, candidates, max(1, budget // STEP), noise, short)
    tails = [tail_of(rng, problem, chain, tail, written, answers) for chain in chains]
    (turn,) = training_sample(problem, tails, chain)
    room = budget + 1                              # the prompt ends in <think>, which is part of turn.think
    return [turn._replace(think=turn.think[:room], answer=turn.answer[:max(0, room - len(turn.think))])]
