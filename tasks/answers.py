r"""Answers to problems: find the answer in a model's output, and decide whether it equals the reference answer (gold).

equal compares the text first. Then math-verify (https://github.com/huggingface/Math-Verify) parses both answers as
LaTeX and compares them as mathematics. It runs in a separate process: SymPy may compute for hours, 9^{9^9} for example,
and only a process can be stopped on every platform, in every thread, and during a long operation in C.
"""
import contextlib
import functools
import json
import logging
import math
import re
import subprocess
import sys
import threading
from pathlib import Path

from configurator import package

JUDGE = 'exact text, then math-verify 0.9.0'
SECONDS = 5                             # time limit per comparison; most take 20 ms
LENGTH = 500                            # characters; longer answers are compared only as text


# ---- extraction ----

def final_answer(text):
    r"""Return the answer that a text states: the content of its last non-empty \boxed or \fbox, else what follows the
    last '####', 'Answer:' or 'answer is', else the last line that is not only punctuation."""
    for box in reversed(list(re.finditer(r'\\(?:boxed|fbox)(?![a-zA-Z])\s*', text))):
        content = argument(text[box.end():])
        if re.sub(r'\\[,;:! ]|\\text\{\s*\}|[~$\s]', '', content):
            return content
    stated = re.findall(r'(?:####|\banswer\b[*_\s]*(?:is\b|:)[:*_]*)\s*(\S.*)', text, re.IGNORECASE)
    if stated:                                                  # 'The answer is **7**. I hope it is correct.'
        return re.split(r'\.(?:\s|\W*$)', stated[-1])[0].strip('* ')
    lines = [line.strip() for line in text.splitlines() if line.strip(' \t$*#`\\[]().')]
    return lines[-1] if lines else ''


def argument(text):
    r"""Return the LaTeX argument at the start of a text: the content of {...}, or the first word. If the braces never
    close, because the output was cut off, return the rest of the line."""
    if not text.startswith('{'):
        return re.match(r'[^\s$]*', text)[0].rstrip('.,')
    depth = 0
    for token in re.finditer(r'\\.|[{}]', text, re.DOTALL):     # \{ and \} are characters, not groups
        depth += (token[0] == '{') - (token[0] == '}')
        if depth == 0:
            return text[1:token.start()].strip()
    return text[1:].lstrip().partition('\n')[0].strip(' $')


# ---- equality ----

# What math-verify 0.9.0 misreads: literal text, then patterns, each replaced in this order. The table in
# tests/test_answers.py has a pair of answers for each.
TEXT = r'\\(?:text[a-z]*|mathrm|mathbf|mbox) *\{'
LITERALS = {'–': '-', '·': r'\cdot ', '∞': r'\infty ', '°': r'^\circ ', '½': r' 1/2', '¼': r' 1/4', '¾': r' 3/4',
            '⅓': r' 1/3', '⅔': r' 2/3', r'\lbrace': r'\{', r'\rbrace': r'\}', r'\varnothing': r'\emptyset',
            r'\degree': r'^\circ '}
SUPERSCRIPTS = str.maketrans('⁰¹²³⁴⁵⁶⁷⁸⁹', '0123456789')
PATTERNS = [(re.compile(pattern), replacement) for pattern, replacement in [
    ('[⁰¹²³⁴⁵⁶⁷⁸⁹]+', lambda found: f'^{{{found[0].translate(SUPERSCRIPTS)}}}'),
    (r'√ *(?:\(([^()]*)\)|(\d+|\w))', r'\\sqrt{\1\2}'),
    (r'\\\\\[[^\]]*\]', r'\\\\'),                               # \\[4pt] ends a row of a matrix
    (r'\\\$|[$€£`]|\*\*|(?<!\\)\\[()\[\]]|\\[bB]igg?[lrm]?(?![a-zA-Z])|\\! *|^ *\\approx', ''),
    (r'(?<!\\)\\[,;: ]|~|\s+', ' '),
    (TEXT + r'[^{}]*\b(?:and|or)\b[^{}]*\}', ' , '),            # 5\text{ cm and }6
    (r'(?<=[\d}]) *' + TEXT + r'[^{}]*\}(?:\^\{?\d\}?)?', ' '),             # units: 5\text{ cm}^2
    (r'^ *' + TEXT + r'([^{}]*)\} *$', r'\1'),
    (r'(?<=\d) +(?!\w*illion|thousand|hundred|dozen|sqrt|times|plus|minus|over)[a-zA-Z]{4,}(?: [a-zA-Z]+)*[ .]*$', ''),
    (r'(?<=\d)(?: +m| *[kcd]m)(?:\^\{?[23]\}?|/(?:h|hr|s|min))[ .]*$', ''),
    (r'^([-+]?\d+\.?\d*)[eE]([-+]?\d+)$', r'\1\\cdot 10^{\2}'),
    (r'^ *(-?\d+) +(\d+)/(\d+)$', r'\1\\frac{\2}{\3}'),         # a mixed number: 2 1/2
    (r'(\d+)\.(\d*)\\overline\{(\d+)\}', lambda match: repeating(*match.groups())),
    (r'(?<![a-zA-Z\\])pi(?![a-zA-Z])', r'\\pi '),
    (r'= *(\d{1,3}),(\d{3})$', r'=\1\2'),                       # x = 1,000
    (r'(?<=[)\]]) *U *(?=[(\[])', r'\\cup '),                   # (0, 1) U (2, 3)
    (r'^-?\d+(?: -?\d+)+$', lambda match: match[0].replace(' ', ',')),      # 1 2 is a list, 1 000 is 1,000
]]


def repeating(whole, decimals, period):
    r"""Return a repeating decimal, such as 0.1\overline{6}, as a fraction."""
    numerator = int(whole + decimals + period) - int(whole + decimals)
    return f'\\frac{{{numerator}}}{{{10 ** len(decimals) * (10 ** len(period) - 1)}}}'


def normalize(text):
    """Return an answer in LaTeX that math-verify reads correctly, without delimiters and units."""
    for literal, replacement in LITERALS.items():
        text = text.replace(literal, replacement)
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text.strip(' ,;').removesuffix('.')


@functools.lru_cache(maxsize=4096)                              # a majority vote compares the same pairs many times
def equal(gold, answer):
    """Return True if an answer equals the reference answer (gold). math-verify is not symmetric: the order matters."""
    if gold.strip() == answer.strip():
        return True
    if max(len(gold), len(answer)) > LENGTH:
        return False
    gold, answer = normalize(gold), normalize(answer)
    if not gold or not answer:
        return False
    if gold.casefold() == answer.casefold():
        return True
    if all(re.fullmatch(r"(?=.*[a-zA-Z]{4})[a-zA-Z .'-]+", text) for text in (gold, answer)):
        return False                            # words: math-verify multiplies their letters, so that angle = angel
    bases = [re.findall(r'\d_\{?(\d+)\}?$', text) for text in (gold, answer)]
    if all(bases) and bases[0] != bases[1]:     # 12_8 and 12_9: math-verify drops the base
        return False
    pairs = [(gold, answer)]
    if ('%' in gold) != ('%' in answer):        # 12.5 = 12.5\%: the problem may ask for a percentage
        pairs.append([re.sub(r'\\?%', '', text) for text in pairs[0]])
    return any(ask_worker(*pair) for pair in pairs)


# ---- the process of math-verify ----

_lock, _worker = threading.Lock(), []                           # at most one process


def start_worker():
    """Return the process of math-verify; start it unless it runs. Raise ValueError if the package is not installed."""
    if not _worker or _worker[0].poll() is not None:
        process = subprocess.Popen([sys.executable, '-m', 'tasks.answers'], cwd=Path(__file__).resolve().parents[1],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        status = process.stdout.readline().strip()              # importing SymPy takes a second
        if status != 'ready':
            process.communicate()
            raise ValueError(status or 'the process of math-verify does not start: see python -m tasks.answers')
        _worker[:] = [process]
    return _worker[0]


def ask_worker(gold, answer):
    """Return the verdict of math-verify. After SECONDS without one stop its process and return False."""
    def stop():
        _worker.clear()
        process.kill()
    with _lock:
        process = start_worker()
        timer = threading.Timer(SECONDS, stop)
        timer.start()
        reply = ''
        try:
            process.stdin.write(json.dumps([gold, answer]) + '\n')
            process.stdin.flush()
            reply = process.stdout.readline()
        except OSError:                                         # the process has ended
            pass
        finally:
            timer.cancel()
            timer.join()
            if not reply:
                stop()
                process.communicate()
        return reply == 'True\n'


def work():
    """Print 'ready', then for each line [gold, answer] of standard input True or False."""
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):                # where parsers print warnings
        try:
            package('math_verify')
        except ValueError as error:
            return print(error, file=output)
        from math_verify import LatexExtractionConfig, parse, verify
        logging.disable()
        print('ready', file=output, flush=True)
        for line in sys.stdin:
            gold, answer = (parse(f'${text}$', [LatexExtractionConfig()], parsing_timeout=None)
                            for text in json.loads(line))
            verdict = verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None) and near(gold, answer)
            print(verdict, file=output, flush=True)


def near(gold, answer):
    """Return False for two small numbers that differ: math-verify rounds decimals to 6 places."""
    try:
        a, b = float(gold[0]), float(answer[0])
    except (TypeError, ValueError, OverflowError):
        return True
    return max(abs(a), abs(b)) >= 1e-3 or math.isclose(a, b, rel_tol=1e-5)


if __name__ == '__main__':
    work()
