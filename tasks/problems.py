"""A file of problems in words, solved by Markovian RSA (rsa.py): the prompts, the answers, the run over all of them.

    {"problem": "What is 2 + 2?", "answer": "4"}                one line of the file

`python rsa.py --ckpt=FOLDER --problems=FILE.jsonl`. In round 0 a candidate reads the problem, and is asked to put its
answer into \\boxed{}. Later it reads one user's message with the problem and C tails, of the REASONING of the round
before (what stands before </think>): AGGREGATE below, in other words where it reads only its own tail, or answers. The
plan of that message is the published one (Zyphra's fork of vLLM, examples/markovian_rsa), the words are not; who wants
those brings them in a file. Tails go into the prompt as the tokens they are, so that its length is bounded.
"""
import json
import operator
import os
import re
import statistics
import time
import zlib
from collections import Counter
from fractions import Fraction

import numpy as np
import torch
from tqdm import tqdm

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


# ---- the file ----

def read_problems(path):
    """Return [(problem, answer), ...], texts. Raise ValueError that names the line."""
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
    """Return the aggregation prompt in a file. Raise ValueError unless it holds {problem} and {candidates}."""
    with reading(path):
        words = read_bytes(path).decode()
    for name in '{problem}', '{candidates}':
        if words.count(name) != 1:
            raise ValueError(f'{path}: must hold {name} once: it says where that goes in the prompt')
    return words


def message(question, tails, words=None, compact='tail'):
    """Return what the user says, a list of texts and lists of tokens (Language.prompt). question: tokens of the
    problem. tails: lists of tokens; [] in round 0. words: of an aggregation prompt, instead of those above."""
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
    r"""Return what the last \boxed{...} in a text holds, braces inside included; without one, the text."""
    at = text.rfind('\\boxed{')
    if at < 0:
        return text.strip()
    depth, start = 1, at + len('\\boxed{')
    for end in range(start, len(text)):
        depth += (text[end] == '{') - (text[end] == '}')
        if depth == 0:
            return text[start:end].strip()
    return text[start:].strip()                                 # cut off inside the box


def canonical(answer):
    """Return a Fraction for a number as people write it (7, -1,200, 0.50, 3/4, LaTeX's fractions), else plain text."""
    text = re.sub(r'\\(text|mathrm|mathbf)\{([^{}]*)\}', r'\2', answer.strip())
    text = re.sub(r'\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}', r'\1/\2', text)
    text = re.sub(r'\\[()\[\],;! ]|\\(left|right)(?![a-z])|[$\s]|\^?\\circ', '', text).rstrip('.')
    number = re.fullmatch(r'([-+]?)(\d+|\d{1,3}(?:,\d{3})+)?(\.\d+)?(?:/(\d+))?', text)
    if number and len(text) < 1000 and (number[2] or number[3]) and int(number[4] or 1):
        value = Fraction((number[2] or '0').replace(',', '') + (number[3] or '')) / int(number[4] or 1)
        return -value if number[1] == '-' else value
    return text.casefold()


def equal(a, b):
    """Are two answers the same? As numbers or text; with the package math-verify, also as LaTeX expressions."""
    if canonical(a) == canonical(b):
        return True
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    return bool(verify(parse(f'${a}$'), parse(f'${b}$')))


# ---- scores ----

def majority_vote(answers, equal=operator.eq):
    """Return the most frequent answer, of several the first to appear. None is no vote; return it if nobody votes."""
    votes = [answer for answer in answers if answer is not None]
    return max(votes, key=lambda vote: sum(equal(vote, other) for other in votes), default=None)    # the first of them


def score(answers, verify, equal=operator.eq):
    """Return scores, 0 to 1, of the answers to one problem (None: there is none): `mean`, the share that verify(answer)
    calls right; `majority`, 1 if the majority's is; `best_of_n`, 1 if any is: a bound, for it lets verify choose."""
    *right, majority = [answer is not None and bool(verify(answer))
                        for answer in [*answers, majority_vote(answers, equal)]]
    return {'mean': sum(right) / len(right), 'majority': float(majority), 'best_of_n': float(any(right))}


def mean_ci95(values):
    """Return the mean of values, one a problem, and half the width of its 95 % confidence interval, 1.96 std / sqrt(n);
    nan if n = 1. One value an output would be too many: outputs to a problem share its difficulty and their tails."""
    if not values:
        raise ValueError('no values to average: give those of at least one problem')
    std = statistics.stdev(values) if len(values) > 1 else float('nan')
    return statistics.fmean(values), 1.96 * std / len(values) ** 0.5


def repeats(tokens, chunk=256, least=0.05):
    """Return True if a rollout repeats itself: some chunk of its tokens, 4 bytes each, shrinks below a twentieth under
    zlib with a window of 1,024 bytes (report, IV-D). What is short does not shrink so far, whatever it says."""
    data = np.array(tokens, '<i4').tobytes()
    for piece in (data[i:i + 4 * chunk] for i in range(0, len(data), 4 * chunk)):
        deflate = zlib.compressobj(9, wbits=-10)   # a window of 2^10; negative: nothing around the data
        if len(deflate.compress(piece) + deflate.flush()) < least * len(piece):
            return True
    return False


# ---- what was thought ----

def print_population(result, question, decode, judge=lambda question, text: '', spaced=str):
    """Print a result of markovian_rsa round by round: who read whom ('!': a tail that is wrong), and what each said.
    judge(question, text) -> 'ok', 'wrong' or ''; spaced(text) -> the text, easier to read."""
    marks = []
    for t, now in enumerate(result['rounds']):
        said, before = [decode(output) for output in now['outputs']], marks
        marks = [judge(question, text) for text in said]
        print(f'\nround {t}' + (f': {marks.count("ok")} of {len(marks)} are right so far' if any(marks) else ''))
        for i, drawn in enumerate(now['sampled']):
            reads = ['reads', *(f'{j:2}{"!" if before[j] == "wrong" else " "}' for j in drawn), ''] if drawn else []
            print(f'{i:2}  {" ".join(reads)}{marks[i]:6}{"" if now["prompts"][i] else "(finished) "}{spaced(said[i])}')
    print()


def print_result(result, question, decode, show, *extras):
    """Print what came of one question, with the rounds if `show` says so. The rest as in print_population."""
    if show:
        print_population(result, question, decode, *extras)
    votes = Counter(decode(answer).strip() for answer in result['answers'] if answer is not None)
    said = ', '.join(f'{answer} ({n})' for answer, n in votes.most_common()) or 'none'
    print(f'answers: {said}; {result["tokens"]:,} tokens generated')


# ---- the run ----

def solve(problems, policy, think, path, settings, config):
    """Run, and print the table; or only what it will take, if config, that of rsa.py, wants a dry run. The rest as in
    run."""
    if config.dry_run:
        return print(forecast(policy, problems, **settings))
    names = 'ckpt problems temperature top_p min_p aggregation_prompt'.split() + ['model'] * bool(config.server)
    print(table(problems, run(problems, policy, think, path, settings | {key: getattr(config, key) for key in names})))


def run(problems, policy, think, path, settings):
    """Solve the problems, and write every round down as it ends: a run that was killed repeats no round that had ended.

    think(k, question, done, stream): rsa.rounds_of for problem k, after the rounds that are done; it calls stream for
    every token. path: of the file to write. settings: of the run, which must be the same when it goes on. Return
    {k: its rounds}, as written.
    """
    written = read_results(path, settings)
    total, tokens, began = len(problems) * (settings['rounds'] + 1), 0, time.perf_counter()
    with open(path, 'a', encoding='utf-8') as file, tqdm(
            total=total, initial=sum(map(len, written.values())), unit='round', dynamic_ncols=True) as bar:
        def stream(row, token):
            nonlocal tokens
            tokens += 1
            if tokens % 64 == 0:
                bar.set_postfix_str(f'{tokens / (time.perf_counter() - began):,.1f} tokens/s')
        for k, (problem, answer) in enumerate(problems):
            rounds, since = written.setdefault(k, []), time.perf_counter()
            done = [[{'outputs': now['tail_tokens'], 'answers': now['answer_tokens'], 'tails': now['tail_tokens']}]
                    for now in rounds]                          # whole outputs are not written, and not needed
            for now, in think(k, policy.encode(problem + INSTRUCTION), done, stream):
                texts = [None if a is None else final_answer(policy.decode(a)) for a in now['answers']]
                rounds.append({
                    'problem': k, 'round': len(rounds), 'answers': texts,
                    'right': [text is not None and equal(text, answer) for text in texts], 'tokens': now['tokens'],
                    'longest_prompt': max((len(prompt) for prompt in now['prompts'] if prompt), default=0),
                    'seconds': round(time.perf_counter() - since, 3), 'sampled': now['sampled'],
                    'tails': [policy.decode(tail) for tail in now['tails']],
                    'tail_tokens': now['tails'], 'answer_tokens': now['answers']})
                append_line(file, rounds[-1])
                since = time.perf_counter()
                bar.update()
    return written


def append_line(file, row):
    """Append a line, and see that it is on the disk."""
    file.write(json.dumps(row, ensure_ascii=False) + '\n')
    file.flush()
    os.fsync(file.fileno())


COUNT, TOKEN = range(2 ** 50), range(2 ** 130)                  # a server without a tokenizer: pieces (tasks/client.py)
ROW = {'problem': COUNT, 'round': COUNT, 'answers': [(None, str)], 'right': [bool], 'tokens': COUNT,
       'longest_prompt': COUNT, 'seconds': float, 'tail_tokens': [[TOKEN]], 'answer_tokens': [(None, [TOKEN])]}


def read_results(path, settings):
    """Return {k: rounds} of the run that wrote this file; begin it if there is none. A line that was cut short goes.
    Raise ValueError if that run had other settings, or the file is something else."""
    content, header = b'', b'{"settings": '
    if os.path.exists(path):
        with open(path, 'rb') as file:
            content = file.read()
    whole = content.rfind(b'\n') + 1                            # where the last line ends
    written = {}
    try:
        if content[:len(header)] != header[:len(content)]:      # nothing of a strange file is touched
            raise ValueError
        if not whole:
            with open(path, 'w', encoding='utf-8') as file:
                append_line(file, {'settings': settings})
            return {}
        first, *rows = (parse_json(line, path, ROW if i else {'settings': dict})
                        for i, line in enumerate(content[:whole].split(b'\n')[:-1]))
        for row in rows:
            rounds = written.setdefault(row['problem'], [])
            lengths = {len(row[key]) for key in ('answers', 'right', 'tail_tokens', 'answer_tokens')}
            if row['round'] != len(rounds) or lengths != {settings.get('population', len(row['right']))}:
                raise ValueError
            rounds.append(row)
    except ValueError:
        raise ValueError(f'{path} was not written by such a run: name another file with --out') from None
    before = first['settings']
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        raise ValueError(f'{path} was begun with another {changed[0]}, {before.get(changed[0])!r}: name another file '
                         'with --out')
    os.truncate(path, whole)
    return written


def table(problems, written):
    """Return the table of a whole run."""
    last = [(answer, written[k][-1]) for k, (_, answer) in enumerate(problems)]
    scores = [score(now['answers'], lambda text: equal(text, answer), equal) for answer, now in last]
    mean, half = mean_ci95([s['mean'] for s in scores])
    vote, best = (statistics.fmean(s[key] for s in scores) for key in ('majority', 'best_of_n'))
    rows = [row for rounds in written.values() for row in rounds]
    tokens, seconds, prompt = ([row[key] for row in rows] for key in ('tokens', 'seconds', 'longest_prompt'))
    return '\n'.join([
        f'| problems | mean of {len(last[0][1]["answers"])}, % | majority, % | best, % | generated tokens a problem '
        '| longest prompt | hours | tokens/s |',
        '| --- ' * 8 + '|',
        f'| {len(problems)} | {100 * mean:.1f} +-{100 * half:.1f} | {100 * vote:.1f} | {100 * best:.1f} '
        f'| {sum(tokens) / len(problems):,.0f} | {max(prompt)} | {sum(seconds) / 3600:.2f} '
        f'| {sum(tokens) / max(sum(seconds), 1e-9):,.0f} |'])


def check_room(policy, questions, *, candidates, rounds, budget, tail, final_budget, **_):
    """Raise ValueError if a prompt and what is written after it will not fit the context: now, not rounds later.
    questions: texts. The context of a server is known to nobody but the server, which will say so."""
    if policy.model is None:
        return
    question, tails = max(map(policy.encode, questions), key=len), [[0] * tail] * candidates
    first, between, last = ([], budget if rounds else final_budget), (tails, budget), (tails, final_budget)
    for tails, limit in (first, *[between] * (rounds > 1), *[last] * (rounds > 0)):
        n, context = len(policy.build_prompt(question, tails)), policy.model.config.context
        if n + limit > context:
            raise ValueError(f'a prompt has {n:,} tokens; with a budget of {limit:,} new ones that is more than the '
                             f'context of {context:,}')


def forecast(policy, problems, *, population, candidates, rounds, budget, tail, final_budget, **_):
    """Say what a run will take, after a second of measurement unless a server does it. Return it as text."""
    model, prompts = policy.model, []
    plan = (f'{len(problems)} problems, N={population}, C={candidates}, T={rounds}, budget {budget:,}, tail {tail:,}, '
            f'last budget {final_budget:,}')
    tokens = population * (rounds * budget + final_budget)      # of a problem
    cost = f'tokens: at most {tokens:,} a problem, {tokens * len(problems):,} in all'
    if model is None:
        return f'{plan}\n{cost}'
    for problem, _ in problems:
        question = policy.encode(problem + INSTRUCTION)
        prompts.append(len(policy.build_prompt(question, [[0] * tail] * candidates if rounds else [])))
    cache = model.make_cache(population, 1)
    place = sum(t.nbytes for t in cache.k + cache.v) / 2        # of a position, all rows: there are two
    weights = sum(p.nbytes for p in model.parameters())
    cache.grow(512)
    steps, began = 0, time.perf_counter()
    while steps < 500 and (steps < 2 or time.perf_counter() - began < 1):
        policy.step(cache, torch.ones(population, dtype=torch.int64, device=model.device))
        steps += 1
    rate = steps * population / (time.perf_counter() - began)
    GB = 2 ** 30
    return '\n'.join([
        f'{plan}; prompts of at most {max(prompts):,} tokens',
        f'memory: weights {weights / GB:.2f} GiB, and at most {place * (max(prompts) + final_budget) / GB:.2f} GiB of '
        'cache',
        cost,
        f'time: {tokens * len(problems) / rate / 3600:,.2f} hours for so many at {rate:,.1f} tokens/s, the speed of '
        f'{population} rows at the start; reading prompts comes on top, and long rows are slower'])
