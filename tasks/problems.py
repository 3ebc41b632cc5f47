"""Problem files for Markovian RSA (rsa.py): prompts, scores, and the results file of a run.

    {"problem": "What is 2 + 2?", "answer": "4"}                one line of the file, or one entry of a JSON array

Also read: `question` for the problem, answers after ####, and boxed answers in a `solution` (read_problem).
`python rsa.py --ckpt=FOLDER --problems=FILE.jsonl`. In round 0 a candidate reads the problem and the instruction to put
its answer into \\boxed{}. In later rounds it reads one user message with the problem and C tails of the previous
round's reasoning (the text before </think>): AGGREGATE below, CONTINUE if C = 1, or ANSWERS if --compact=answer. The
message has the structure of the published one (Zyphra's fork of vLLM, examples/markovian_rsa), in other words; a file
given by --aggregation_prompt replaces it. Tails are inserted as tokens, so that the prompt's length is bounded.
"""
import contextlib
import hashlib
import json
import math
import operator
import os
import re
import statistics
import sys
import time
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configurator import refuse_unused
from runtime.checkpoint import exclusive_lock
from tasks.answers import JUDGE, equal, final_answer, start_worker
from validate import check, parse_json, read_text

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
    """Return the (problem, answer) pairs of a file, as texts. Print to standard error which keys they are from. Raise
    ValueError that names the line or entry."""
    text = read_text(path)
    if text.lstrip().startswith('['):
        entries = {f'{path}, entry {i}': entry
                   for i, entry in enumerate(parse_json(text.encode(), path, [{str: object}]), 1)}
    else:
        entries = {(where := f'{path}, line {i}'): parse_json(line.encode(), where, {str: object})
                   for i, line in enumerate(text.split('\n'), 1) if line.strip()}
    if not entries:
        raise ValueError(f'{path} holds no problem')
    texts, places = zip(*(read_problem(entry, where) for where, entry in entries.items()))
    shown = ', '.join(f'{name}: {" or ".join(sorted(set(of)))} ({shorten(text)})'
                      for name, of, text in zip(('problem', 'answer'), zip(*places), texts[0]))
    print(f'{path}: {len(texts):,} problem{"s" * (len(texts) > 1)}; {shown}', file=sys.stderr)
    return list(texts)


def read_problem(entry, where):
    """Return (problem, answer), and as texts where in the entry they were found. The case of keys is ignored."""
    keys, found = {key.lower(): key for key in reversed(entry)}, []

    def texts(names, schema):
        for key in filter(None, map(keys.get, names)):
            if entry[key] is not None:
                check(entry[key], schema, where, key)
                yield str(entry[key]), key
    problems = ((text, key) for text, key in texts(('problem', 'question'), str) if text.strip())
    answers = filter(None, (answer_in(text, key) for text, key in texts(('answer', 'solution'), (str, float))))
    for name, items in ('problem or question', problems), ('answer, or solution with a \\boxed{} answer', answers):
        found.append(next(items, None))
        if found[-1] is None:
            raise ValueError(f'{where}: {name} is missing or empty')
    return tuple(zip(*found))


def answer_in(text, key):
    """Return the reference answer in a text and where it was found, or None."""
    if '####' in text:                                          # as in GSM8K: a solution, then the answer
        text, place = text.rpartition('####')[2], f'what follows #### in {key}'
    elif re.search(r'\\(boxed|fbox)', text):
        text, place = final_answer(text), f'the last box in {key}'
    elif key.lower() == 'solution':
        return None
    else:
        place = key
    return (text.strip(), place) if text.strip() else None


def shorten(text, length=50):
    """Return a text on one line, quoted, with at most `length` characters."""
    text = ' '.join(text.split())
    return repr(text if len(text) <= length else text[:length - 3] + '...')


# ---- prompts ----

def read_words(path):
    """Return the aggregation prompt in a file. Raise ValueError unless it contains {problem} and {candidates} once."""
    words = read_text(path)
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


# ---- scores ----

def majority_vote(answers, equal=operator.eq):
    """Return the most frequent answer; if several are, the first of them. None does not count as a vote; return it if
    there is no vote."""
    votes = [answer for answer in answers if answer is not None]
    return max(votes, key=lambda vote: sum(equal(vote, other) for other in votes), default=None)    # max: the first


def merge_equal(answers):
    """Return {answer: the first answer that equals it}, for votes: the judge is slow, and compares texts only once."""
    merged = {}
    for answer in filter(None, answers):
        if answer not in merged:
            merged[answer] = next((first for first in dict.fromkeys(merged.values()) if equal(first, answer)), answer)
    return merged


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


def percent(mean, half):
    """Return a mean and half the width of its confidence interval (mean_ci95) in percent, as text."""
    return f'{100 * mean:.1f} ' + (f'+-{100 * half:.1f}' if math.isfinite(half) else '-')


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
    scores = []
    for k, (_, gold) in enumerate(problems):
        answers = rows[k][-1]['answers']
        merged = merge_equal(answers)
        scores.append(score(answers, lambda answer: equal(gold, answer), lambda a, b: merged.get(a) == merged.get(b)))
    mean = percent(*mean_ci95([s['mean'] for s in scores]))
    vote, best = (statistics.fmean(s[key] for s in scores) for key in ('majority', 'best_of_n'))
    tokens, seconds, prompt = ([row[key] for rounds in rows.values() for row in rounds]
                               for key in ('tokens', 'seconds', 'longest_prompt'))
    return '\n'.join([
        f'| problems | mean of {len(answers)}, % | majority, % | best, % | generated tokens per problem '
        '| longest prompt | hours | tokens/s | answers compared by |',
        '| --- ' * 9 + '|',
        f'| {len(problems)} | {mean} | {100 * vote:.1f} | {100 * best:.1f} | {sum(tokens) / len(problems):,.0f} '
        f'| {max(prompt)} | {sum(seconds) / 3600:.2f} | {sum(tokens) / max(sum(seconds), 1e-9):,.0f} | {JUDGE} |'])


# ---- the results file ----

COUNT, TOKEN = range(2 ** 50), range(2 ** 130)                  # large: pieces of text (tasks/client.py)
HEADER = {'settings': dict, 'digests': {str: str}}
ROW = {'problem': COUNT, 'digest': str, 'round': COUNT, 'answers': [(None, str)], 'right': [bool], 'tokens': COUNT,
       'longest_prompt': COUNT, 'seconds': float, 'tail_tokens': [[TOKEN]], 'answer_tokens': [(None, [TOKEN])]}


def digest(data):
    """Return a short digest of text or bytes."""
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()[:16]


def digests_of(folder, words):
    """Return {what: digest} of what a model's answers depend on: the wording of the prompts, and the files of a model
    or tokenizer in `folder` ('': none). words: see message."""
    digests = {'the wording of the prompts': digest(INSTRUCTION + (words or AGGREGATE + CONTINUE + ANSWERS))}
    for pattern in '*.safetensors', 'ckpt.pt', 'ckpt.pt/*', '*config.json', 'tokenizer.json', 'bpe.json', '*.jinja':
        for path in Path(folder).glob(pattern) if folder else ():
            if path.is_file():
                digests[f'{path.relative_to(folder).as_posix()} of --ckpt'] = digest(sampled_bytes(path))
    return digests


def sampled_bytes(path, blocks=64, length=2 ** 18):
    """Return the size of a file and `blocks` blocks of its bytes, evenly spaced from its start to its end: all bytes of
    a file of up to 16 MiB; of larger ones the tables of tensors, which safetensors starts and torch.save ends with."""
    size = path.stat().st_size
    parts = [f'{size} '.encode()]
    with open(path, 'rb') as file:
        for i in range(min(blocks, -(-size // length))):
            file.seek(max(i * length, i * (size - length) // (blocks - 1)))
            parts.append(file.read(length))
    return b''.join(parts)


@contextlib.contextmanager
def open_results(path, header, problems, total):
    """Provide the ResultsFile of a new run, or of one that resumes. Only one process at a time may have it.
    header: {'settings': ..., 'digests': digests_of(...)}. total: number of rounds of all problems."""
    start_worker()                                              # without math-verify, fail before the first round
    with exclusive_lock(path + '.lock'):
        results = ResultsFile(path, header, problems, total)
        try:
            yield results
        finally:
            results.file.close()
            results.bar.close()


class ResultsFile:
    """The results of a run over a file of problems: a header with its settings and digests of what it depends on, then
    one line per problem and round, with a digest of the problem and its answer."""

    def __init__(self, path, header, problems, total):
        self.rows = read_results(path, header, problems)        # {problem: rows of its rounds}
        self.problems, self.file, self.tokens = problems, open(path, 'a', encoding='utf-8'), 0
        self.bar = tqdm(total=total, initial=sum(map(len, self.rows.values())), unit='round', dynamic_ncols=True)
        self.began = self.round_began = time.perf_counter()

    def stream(self, *_):
        """Count a generated token, and show the rate."""
        self.tokens += 1
        if self.tokens % 64 == 0:
            self.bar.set_postfix_str(f'{self.tokens / (time.perf_counter() - self.began):,.1f} tokens/s')

    def add(self, k, now, decode):
        """Append a Round of problem k."""
        seconds, (_, gold) = time.perf_counter() - self.round_began, self.problems[k]
        texts = [None if c.answer is None else final_answer(decode(c.answer)) for c in now.candidates]
        self.rows[k].append({
            'problem': k, 'digest': digest(repr(self.problems[k])), 'round': len(self.rows[k]), 'answers': texts,
            'right': [text is not None and equal(gold, text) for text in texts], 'tokens': now.tokens,
            'longest_prompt': max((len(c.prompt) for c in now.candidates if c.prompt), default=0),
            'seconds': round(seconds, 3), 'sampled': [c.sampled for c in now.candidates],
            'tails': [decode(c.tail) for c in now.candidates],
            'tail_tokens': [c.tail for c in now.candidates], 'answer_tokens': [c.answer for c in now.candidates]})
        append_line(self.file, self.rows[k][-1])
        self.round_began = time.perf_counter()
        self.bar.update()


def outputs_of(row):
    """Return (output, answer, tail) per candidate of a row. Only the tail of an output is stored; later rounds need no
    more."""
    return [(tail, answer, tail) for tail, answer in zip(row['tail_tokens'], row['answer_tokens'])]


def append_line(file, row):
    """Append a line of JSON and flush it to disk."""
    file.write(json.dumps(row, ensure_ascii=False) + '\n')
    file.flush()
    os.fsync(file.fileno())


def read_results(path, header, problems):
    """Return {problem: rows} of a results file, and drop an incomplete last line; start the file if it does not exist.
    Raise ValueError if its header or its problems differ from those given, or it is another kind of file. Problems may
    be added, and those without results changed."""
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
                append_line(file, header)
            return rows
        first, *lines = (parse_json(line, path, ROW if i else HEADER)
                         for i, line in enumerate(content[:complete].split(b'\n')[:-1]))
        for row in lines:
            lengths = {len(row[key]) for key in ('answers', 'right', 'tail_tokens', 'answer_tokens')}
            if row['round'] != len(rows[row['problem']]) or lengths != {first['settings'].get('population')}:
                raise ValueError
            rows[row['problem']].append(row)
    except ValueError:
        raise ValueError(f'{path} is no results file of this version: name another file with --out') from None
    if change := change_since(path, first, rows, header, problems):
        raise ValueError(f'{change}: name another file with --out')
    os.truncate(path, complete)
    return rows


def change_since(path, before, rows, header, problems):
    """Return what was changed since a results file was written, or None. before: its header."""
    for key, value in header['settings'].items():
        if before['settings'].get(key) != value:
            return f'{path} belongs to a run with {key} = {before["settings"].get(key)!r}'
    for key in sorted(before['digests'].keys() | header['digests']):
        if before['digests'].get(key) != header['digests'].get(key):
            return f'{key} was changed since {path} was started'
    for k, of_problem in sorted(rows.items()):
        if k >= len(problems):
            return f'problem {k + 1}, which has results in {path}, was removed'
        if {row['digest'] for row in of_problem} != {digest(repr(problems[k]))}:
            return f'problem {k + 1} ({shorten(problems[k][0])}) or its answer was changed since {path} was started'


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
