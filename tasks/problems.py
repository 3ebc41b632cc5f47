"""Problem files for Markovian RSA (rsa.py): prompts, answers, scores, and the results file of a run.

    {"problem": "What is 2 + 2?", "answer": "4"}                one line of the file

`python rsa.py --ckpt=FOLDER --problems=FILE.jsonl`. In round 0 a candidate reads the problem and the instruction to put
its answer into \\boxed{}. In later rounds it reads one user message with the problem and C tails of the previous
round's reasoning (the text before </think>): AGGREGATE below, CONTINUE if C = 1, or ANSWERS if --compact=answer. The
message has the structure of the published one (Zyphra's fork of vLLM, examples/markovian_rsa), in other words; a file
given by --aggregation_prompt replaces it. Tails are inserted as tokens, so that the prompt's length is bounded.
"""
import json
import operator
import os
import re
import statistics
import time
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from tqdm import tqdm

from configurator import refuse_unused
from validate import parse_json, read_bytes, reading

INSTRUCTION = '\n\nReason step by step, and put the final answer into \\boxed{}.'

AGGREGATE = """\
Below are a problem and {n} attempts at it. Each shows only the end of somebody's reasoning, which may be unfinished \
or wrong. Use what is right in them. Where they differ, find out which is right; if none is, go another way. Do not \
repeat them.

# Problem
{problem}

# Attempts
{candidates}

# Task
Write one solution that is better than all of these, and put the final answer into \\boxed{}."""

CONTINUE = """\
Below are a problem and the end of your own reasoning about it, which was cut off there. Check it, and go on from \
where it ends instead of starting again.

# Problem
{problem}

# Your reasoning so far
{candidates}

# Task
Finish the solution, and put the final answer into \\boxed{}."""

ANSWERS = """\
Below are a problem and {n} attempts at it. Of those that came to an end you see the answer, of the others the end of \
the reasoning. They may be wrong. Weigh them against each other; if none is right, go another way. Do not repeat them.

# Problem
{problem}

# Attempts
{candidates}

# Task
Write one solution that is better than all of these, and put the final answer into \\boxed{}."""


@dataclass
class FileConfig:
    problems: str = ''              # a file of problems, instead of a question
    out: str = ''                   # results file, from which a stopped run resumes; '': FILE.rsa.jsonl
    dry_run: bool = False           # only estimate the cost
    aggregation_prompt: str = ''    # a file with another aggregation prompt, which contains {problem} and {candidates}

    def __post_init__(self):
        if not self.problems:
            refuse_unused(self, 'out dry_run', 'without --problems')
        self.out = self.problems and (self.out or self.problems.removesuffix('.jsonl') + '.rsa.jsonl')


def read_problems(path):
    """Return the (problem, answer) pairs of a file, as texts. Raise ValueError that names the line."""
    problems = []
    for number, line in enumerate(read_bytes(path).split(b'\n'), 1):
        if line.strip():
            where = f'{path}, line {number}'
            row = parse_json(line, where, {'problem': str, 'answer': (str, float)})
            if not row['problem'].strip() or not str(row['answer']).strip():
                raise ValueError(f'{where}: the problem or its answer is empty')
            problems.append((row['problem'], str(row['answer'])))
    if not problems:
        raise ValueError(f'{path} holds no problem')
    return problems


# ---- prompts ----

def read_words(path):
    """Return the aggregation prompt in a file. Raise ValueError unless it contains {problem} and {candidates} once."""
    with reading(path):
        words = read_bytes(path).decode()
    for name in '{problem}', '{candidates}':
        if words.count(name) != 1:
            raise ValueError(f'{path}: must hold {name} once: it says where that goes in the prompt')
    return words


def message(question, tails, words=None, compact='tail'):
    """Return the user message, a list of texts and lists of tokens (Language.prompt). question: tokens of the problem.
    tails: lists of tokens; [] in round 0. words: an aggregation prompt that replaces those above."""
    if not tails:
        return [question]
    words = words or (ANSWERS if compact == 'answer' else AGGREGATE if len(tails) > 1 else CONTINUE)
    parts = []
    for piece in re.split(r'(\{problem\}|\{candidates\})', words.replace('{n}', str(len(tails)))):
        if piece == '{candidates}':
            for i, tail in enumerate(tails, 1):
                parts += [f'--- {i} ---\n' if len(tails) > 1 else '', tail, '\n' * (i < len(tails))]
        else:
            parts.append(question if piece == '{problem}' else piece)
    return parts


# ---- answers ----

def final_answer(text):
    r"""Return the content of the last \boxed{...} in a text, nested braces included; without one, the text."""
    at = text.rfind('\\boxed{')
    if at < 0:
        return text.strip()
    depth, start = 1, at + len('\\boxed{')
    for end in range(start, len(text)):
        depth += (text[end] == '{') - (text[end] == '}')
        if depth == 0:
            return text[start:end].strip()
    return text[start:].strip()                                 # cut off before the closing brace


def canonical(answer):
    """Return a Fraction for a number (7, -1,200, 0.50, 3/4, a LaTeX fraction), else normalized text."""
    text = re.sub(r'\\(text|mathrm|mathbf)\{([^{}]*)\}', r'\2', answer.strip())
    text = re.sub(r'\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}', r'\1/\2', text)
    text = re.sub(r'\\[()\[\],;! ]|\\(left|right)(?![a-z])|[$\s]|\^?\\circ', '', text).rstrip('.')
    number = re.fullmatch(r'([-+]?)(\d+|\d{1,3}(?:,\d{3})+)?(\.\d+)?(?:/(\d+))?', text)
    if number and len(text) < 1000 and (number[2] or number[3]) and int(number[4] or 1):
        value = Fraction((number[2] or '0').replace(',', '') + (number[3] or '')) / int(number[4] or 1)
        return -value if number[1] == '-' else value
    return text.casefold()


def equal(a, b):
    """Return whether two answers are equal as numbers or text; with the package math-verify, also as expressions."""
    if canonical(a) == canonical(b):
        return True
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    return bool(verify(parse(f'${a}$'), parse(f'${b}$')))


# ---- scores ----

def majority_vote(answers, equal=operator.eq):
    """Return the most frequent answer; if several are, the first of them. None does not count as a vote; return it if
    there is no vote."""
    votes = [answer for answer in answers if answer is not None]
    return max(votes, key=lambda vote: sum(equal(vote, other) for other in votes), default=None)    # max: the first


def score(answers, verify, equal=operator.eq):
    """Return scores from 0 to 1 of the answers to one problem (None: no answer). `mean`: fraction for which
    verify(answer) is true; `majority`: 1 if it is true for the majority vote; `best_of_n`: 1 if it is true for any
    answer, an upper bound, since the verifier chooses."""
    *right, majority = [answer is not None and bool(verify(answer))
                        for answer in [*answers, majority_vote(answers, equal)]]
    return {'mean': sum(right) / len(right), 'majority': float(majority), 'best_of_n': float(any(right))}


def mean_ci95(values):
    """Return the mean of the values, one per problem, and half the width of its 95 % confidence interval,
    1.96 std / sqrt(n); nan if n = 1. Outputs for the same problem are not independent: they share its difficulty and
    their tails."""
    if not values:
        raise ValueError('no values to average: give those of at least one problem')
    std = statistics.stdev(values) if len(values) > 1 else float('nan')
    return statistics.fmean(values), 1.96 * std / len(values) ** 0.5


def repeats(tokens, chunk=256, least=0.05):
    """Return True if a rollout repeats itself: zlib with a window of 1,024 bytes compresses some chunk of its tokens, 4
    bytes each, below a twentieth (report, IV-D). Short chunks never compress that far."""
    data = np.array(tokens, '<i4').tobytes()
    for piece in (data[i:i + 4 * chunk] for i in range(0, len(data), 4 * chunk)):
        deflate = zlib.compressobj(9, wbits=-10)   # window 2^10; negative: no header
        if len(deflate.compress(piece) + deflate.flush()) < least * len(piece):
            return True
    return False


# ---- output ----

def print_population(rounds, question, decode, judge=lambda question, text: '', spaced=str):
    """Print the Rounds of one question: per candidate the sampled tails ('!' marks a wrong one) and the output.
    judge(question, text) -> 'ok', 'wrong' or ''; spaced(text) -> the text with spaces for readability."""
    marks = []
    for t, now in enumerate(rounds):
        texts, before = [decode(c.output) for c in now.candidates], marks
        marks = [judge(question, text) for text in texts]
        print(f'\nround {t}' + (f': {marks.count("ok")} of {len(marks)} are right so far' if any(marks) else ''))
        for i, c in enumerate(now.candidates):
            reads = ' '.join(f'{j:2}{"!" if before[j] == "wrong" else " "}' for j in c.sampled)
            print(f'{i:2}  {f"reads {reads} " * bool(reads)}{marks[i]:6}{"" if c.prompt else "(finished) "}'
                  f'{spaced(texts[i])}')
    print()


def print_result(rounds, question, decode, show, *extras):
    """Print the answers to one question, and if `show` its rounds. The other arguments: see print_population."""
    if show:
        print_population(rounds, question, decode, *extras)
    votes = Counter(decode(c.answer).strip() for c in rounds[-1].candidates if c.answer is not None)
    said = ', '.join(f'{answer} ({n})' for answer, n in votes.most_common()) or 'none'
    print(f'answers: {said}; {sum(now.tokens for now in rounds):,} tokens generated')


def table(problems, rows):
    """Return the table of scores of a complete run. rows: those of its ResultsFile."""
    scores = [score(rows[k][-1]['answers'], lambda text: equal(text, answer), equal)
              for k, (_, answer) in enumerate(problems)]
    mean, half = mean_ci95([s['mean'] for s in scores])
    vote, best = (statistics.fmean(s[key] for s in scores) for key in ('majority', 'best_of_n'))
    tokens, seconds, prompt = ([row[key] for rounds in rows.values() for row in rounds]
                               for key in ('tokens', 'seconds', 'longest_prompt'))
    return '\n'.join([
        f'| problems | mean of {len(rows[0][-1]["answers"])}, % | majority, % | best, % | generated tokens per problem '
        '| longest prompt | hours | tokens/s |',
        '| --- ' * 8 + '|',
        f'| {len(problems)} | {100 * mean:.1f} +-{100 * half:.1f} | {100 * vote:.1f} | {100 * best:.1f} '
        f'| {sum(tokens) / len(problems):,.0f} | {max(prompt)} | {sum(seconds) / 3600:.2f} '
        f'| {sum(tokens) / max(sum(seconds), 1e-9):,.0f} |'])


# ---- the results file ----

COUNT, TOKEN = range(2 ** 50), range(2 ** 130)                  # large: pieces of text (tasks/client.py)
ROW = {'problem': COUNT, 'round': COUNT, 'answers': [(None, str)], 'right': [bool], 'tokens': COUNT,
       'longest_prompt': COUNT, 'seconds': float, 'tail_tokens': [[TOKEN]], 'answer_tokens': [(None, [TOKEN])]}


class ResultsFile:
    """The results of a run over a file of problems: a header with its settings, then one line per problem and round."""

    def __init__(self, path, header, total):
        """Open the file of a new run, or of one that resumes. total: number of rounds of all problems."""
        self.rows = read_results(path, header)                  # {problem: rows of its rounds}
        self.file, self.tokens = open(path, 'a', encoding='utf-8'), 0
        self.bar = tqdm(total=total, initial=sum(map(len, self.rows.values())), unit='round', dynamic_ncols=True)
        self.began = self.round_began = time.perf_counter()

    def stream(self, *_):
        """Count a generated token, and show the rate."""
        self.tokens += 1
        if self.tokens % 64 == 0:
            self.bar.set_postfix_str(f'{self.tokens / (time.perf_counter() - self.began):,.1f} tokens/s')

    def add(self, k, answer, now, decode):
        """Append a Round of problem k, whose right answer is `answer`."""
        texts = [None if c.answer is None else final_answer(decode(c.answer)) for c in now.candidates]
        self.rows[k].append({
            'problem': k, 'round': len(self.rows[k]), 'answers': texts,
            'right': [text is not None and equal(text, answer) for text in texts], 'tokens': now.tokens,
            'longest_prompt': max((len(c.prompt) for c in now.candidates if c.prompt), default=0),
            'seconds': round(time.perf_counter() - self.round_began, 3), 'sampled': [c.sampled for c in now.candidates],
            'tails': [decode(c.tail) for c in now.candidates],
            'tail_tokens': [c.tail for c in now.candidates], 'answer_tokens': [c.answer for c in now.candidates]})
        append_line(self.file, self.rows[k][-1])
        self.round_began = time.perf_counter()
        self.bar.update()

    def close(self):
        self.file.close()
        self.bar.close()


def outputs_of(row):
    """Return (output, answer, tail) per candidate of a row. Only the tail of an output is stored; later rounds need no
    more."""
    return [(tail, answer, tail) for tail, answer in zip(row['tail_tokens'], row['answer_tokens'])]


def append_line(file, row):
    """Append a line of JSON and flush it to disk."""
    file.write(json.dumps(row, ensure_ascii=False) + '\n')
    file.flush()
    os.fsync(file.fileno())


def read_results(path, header):
    """Return {problem: rows} of a results file, and drop an incomplete last line; start the file if it does not exist.
    Raise ValueError if its settings differ from `header`, or it is another kind of file."""
    content, start, rows = b'', b'{"settings": ', defaultdict(list)
    if os.path.exists(path):
        with open(path, 'rb') as file:
            content = file.read()
    complete = content.rfind(b'\n') + 1                         # length without an incomplete last line
    try:
        if content[:len(start)] != start[:len(content)]:        # another kind of file: leave it unchanged
            raise ValueError
        if not complete:
            with open(path, 'w', encoding='utf-8') as file:
                append_line(file, {'settings': header})
            return rows
        first, *lines = (parse_json(line, path, ROW if i else {'settings': dict})
                         for i, line in enumerate(content[:complete].split(b'\n')[:-1]))
        for row in lines:
            lengths = {len(row[key]) for key in ('answers', 'right', 'tail_tokens', 'answer_tokens')}
            if row['round'] != len(rows[row['problem']]) or lengths != {header.get('population', len(row['right']))}:
                raise ValueError
            rows[row['problem']].append(row)
    except ValueError:
        raise ValueError(f'{path} was not written by such a run: name another file with --out') from None
    before = first['settings']
    changed = [key for key in header if before.get(key) != header[key]]
    if changed:
        raise ValueError(f'{path} belongs to a run with {changed[0]} = {before.get(changed[0])!r}: name another file '
                         'with --out')
    os.truncate(path, complete)
    return rows


# ---- cost ----

def check_room(policy, questions, settings):
    """Raise ValueError if some prompt and its output would not fit the context. questions: texts. settings: of rsa.py.
    The context of a server is not known; the server refuses prompts that are too long."""
    if policy.model is None:
        return
    question, tails = max(map(policy.encode, questions), key=len), [[0] * settings.tail] * settings.candidates
    for t in {0, min(1, settings.rounds), settings.rounds}:
        limit = settings.budget if t < settings.rounds else settings.final_budget
        n, context = len(policy.build_prompt(question, tails if t else [])), policy.model.config.context
        if n + limit > context:
            raise ValueError(f'a prompt has {n:,} tokens; with a budget of {limit:,} new ones that is more than the '
                             f'context of {context:,}')


def forecast(policy, problems, settings):
    """Return an estimate of a run's memory, tokens and time as text, after one second of measurement. For a server it
    is the number of tokens only."""
    N, T, model = settings.population, settings.rounds, policy.model
    tokens = N * (T * settings.budget + settings.final_budget)  # per problem
    plan = (f'{len(problems)} problems, N={N}, C={settings.candidates}, T={T}, budget {settings.budget:,}, tail '
            f'{settings.tail:,}, last budget {settings.final_budget:,}')
    cost = f'tokens: at most {tokens:,} per problem, {tokens * len(problems):,} in all'
    if model is None:
        return f'{plan}\n{cost}'
    tails = [[0] * settings.tail] * settings.candidates if T else []
    prompt = max(len(policy.build_prompt(policy.encode(problem + INSTRUCTION), tails)) for problem, _ in problems)
    cache = model.make_cache(N, 1)
    position = sum(t.nbytes for t in cache.k + cache.v) / 2     # bytes per position of all sequences: the cache has two
    weights = sum(p.nbytes for p in model.parameters())
    cache.grow(512)
    steps, began = 0, time.perf_counter()
    while steps < 500 and (steps < 2 or time.perf_counter() - began < 1):
        policy.step(cache, torch.ones(N, dtype=torch.int64, device=model.device))
        steps += 1
    rate, GiB = steps * N / (time.perf_counter() - began), 2 ** 30
    return '\n'.join([
        f'{plan}; prompts of at most {prompt:,} tokens',
        f'memory: weights {weights / GiB:.2f} GiB, KV cache at most '
        f'{position * (prompt + settings.final_budget) / GiB:.2f} GiB',
        cost,
        f'time: {tokens * len(problems) / rate / 3600:,.2f} hours at {rate:,.1f} tokens/s, the speed of {N} short '
        'sequences; prefill and long sequences take more'])
