r"""Answers: what an output states, and which answers are equal. Each pair is (gold, answer)."""
import importlib.metadata
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings, strategies as st

from tasks import answers
from tasks.answers import equal, final_answer

# ---- extraction ----

STATED = [
    (r'so $\boxed{7}$.', '7'), (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
    (r'\boxed{\dfrac{\sqrt{3}}{2}} is it', r'\dfrac{\sqrt{3}}{2}'),
    (r'\boxed{1} no, \boxed{2}', '2'), (r'\boxed{7} \boxed{}', '7'), (r'\boxed{7} and $\boxed{ }$', '7'),
    (r'\boxed{7} \boxed{\,}', '7'), (r'\boxed{7} \boxed{\text{}}', '7'), (r'\boxed {7}', '7'), (r'\boxed 7', '7'),
    (r'It is $\boxed 7$.', '7'), (r'It is \boxed 7.', '7'), (r'\fbox{7}', '7'), (r'\fbox{3} then \boxed{4}', '4'),
    (r'\boxed{3} then \fbox{4}', '4'), (r'\boxed{\boxed{7}}', '7'), (r'\boxed{\{1,2\}}', r'\{1,2\}'),
    (r'\boxed{\left\{x \mid x>0\right\}}', r'\left\{x \mid x>0\right\}'),
    (r'\boxed{\left\{1\right.}', r'\left\{1\right.'),          # \{ is no group
    (r'\boxed{5 \text{ cm}}', r'5 \text{ cm}'), (r'\boxed{\text{Monday}}', r'\text{Monday}'),
    ('\\boxed{\n7\n}', '7'), ('\\boxed{7', '7'), (r'\boxed{\frac{1}{2}', r'\frac{1}{2}'),      # cut off
    ('$\\boxed{7$\nThat is all.', '7'), (r'\boxed{1} then \boxed{', '1'), (r'\boxedpt{3} \boxed{4}', '4'),
    (r'Answer: 3, in a box \boxed{4}', '4'), ('#### 3\n\\boxed{4}', '4'),                      # a box comes first
    ('3 + 4 = <<3+4=7>>7\n#### 7', '7'), ('#### 1,200', '1,200'), ('####7', '7'), ('#### Step 2\nAnswer: 7', '7'),
    ('Answer: 7', '7'), ('**Answer:** 7', '7'), ('**Answer**: 7', '7'), ('Final Answer: 7.', '7'), ('ANSWER: B', 'B'),
    ('Answer:\n7', '7'), ('The answer is 7.', '7'), ('The answer is: 7', '7'), ('The answer is **7**.', '7'),
    ('the final answer is $3.5$. I hope it is correct.', '$3.5$'), ('So the correct answer is (B).', '(B)'),
    ('The answer is 3. Wait.\nThe answer is 4.', '4'), ('The answer is 3.5 because', '3.5 because'),
    ('First\n\n 7 \n\n', '7'), ('\\[\nx = 7\n\\]', 'x = 7'), ('$$\n7\n$$\n', '7'), ('answers vary\n7', '7'),
    ('7', '7'), ('', ''), (' \n ', '')]


@pytest.mark.parametrize('text, answer', STATED)
def test_the_stated_answer_is_found(text, answer):
    assert final_answer(text) == answer


# ---- pairs ----

EQUAL = [
    # numbers
    ('5', ' 5 '), ('5', '5.'), ('5', '05'), ('5', '5.0'), ('5', '+5'), ('0', '-0'), ('0', '0.0'), ('-3', '−3'),
    ('-3', '–3'), ('-3', '- 3'), ('0.5', '.5'), ('-0.5', '-.5'), ('1/2', '0.5'), ('1/2', '.5'), ('0.5', '1/2'),
    ('0.125', r'\frac{1}{8}'), ('1/3', '0.333333'), ('0.333333', '1/3'), ('0.1', '0.10'), ('100', '100.'),
    ('1000', '1,000'), ('1,000', '1000'), ('1000', '1{,}000'), ('1{,}000', '1,000'), ('1000', r'1\,000'),
    ('1000', r'1,\!000'), (r'11,\! 111,\! 111,\! 100', '11111111100'), ('1234567', '1,234,567'), ('1000', '1 000'),
    ('1000', 'x = 1,000'),
    ('1234567.5', '1,234,567.5'), ('-1,234', '-1234'), ('1500', r'1.5 \times 10^3'), ('1500', '1.5 × 10^3'),
    ('1500', r'1.5\cdot10^{3}'), (r'3.0 \times 10^{-2}', '0.03'), ('1e3', '1000'), ('1.5e-3', '0.0015'),
    ('6.6e-34', r'6.6 \times 10^{-34}'), (r'0.\overline{3}', '1/3'), (r'0.1\overline{6}', r'\frac16'),
    (r'2.\overline{36}', r'\frac{26}{11}'),
    # fractions and mixed numbers
    (r'\frac{3}{4}', r'\frac34'), (r'\frac34', '3/4'), (r'\frac{3}{4}', r'\dfrac{3}{4}'), ('3/4', r'\tfrac34'),
    (r'\frac{3}{4}', '0.75'), (r'-\frac{1}{2}', r'\frac{-1}{2}'), (r'-\frac{1}{2}', r'\frac{1}{-2}'),
    ('3/4', '(3)/(4)'),
    (r'\frac{1}{2}', r'\frac{2}{4}'), (r'\dfrac{\sqrt{2 + \sqrt{3}}}{2}', r'\frac{\sqrt{2+\sqrt{3}}}{2}'),
    (r'\dfrac{x^{2}}{y^{3}}', r'\frac{x^2}{y^3}'), (r'\frac{3}{4}', r'\frac 34'), (r'\frac{13}{4}', r'\frac{13}4'),
    (r'\frac{1}{12}', r'\frac1{12}'), ('3/4', r'{3 \over 4}'), ('3/4', r'\left(\frac{3}{4}\right)'), ('3/4', '¾'),
    ('1/2', '½'), ('1/3', '⅓'), ('2/3', '⅔'), ('1/4', '¼'), ('1/2', '1 / 2'), (r'-\frac{35}{9}', '-35/9'),
    (r'2\frac{1}{2}', r'\frac{5}{2}'), (r'\frac{5}{2}', r'2\frac{1}{2}'), (r'2\frac12', '2.5'),
    ('5/2', r'2\dfrac{1}{2}'),
    (r'-2\frac{1}{2}', '-5/2'), ('5/2', '2 1/2'), ('-5/2', '-2 1/2'), ('5/2', r'2 \frac{1}{2}'), ('5/2', '2½'),
    ('5/2', r'2~\frac{1}{2}'), ('5/2', r'2\,\frac{1}{2}'),
    # percentages, currency, degrees
    ('50', r'50\%'), (r'50\%', '50'), (r'50\%', '50 %'), (r'50\%', r'50 \%'), (r'50\%', '50 percent'), (r'50\%', '0.5'),
    (r'50\%', r'50 \text{ percent}'), (r'12.5\%', '12.5'), ('12.5', '12.5 %'), (r'\frac14', '25%'), (r'\$5', '5'),
    ('5', r'\$5'), (r'\$5', '$5'), ('5', r'\$5.00'), (r'\$1{,}000', '1000'), ('5', '5 dollars'), ('5', '€5'),
    ('5', '£5'),
    (r'\$8.50', '$8.50 per hour'), ('90', r'90^{\circ}'), (r'90^\circ', '90'), (r'90^{\circ}', '90°'),
    (r'90^\circ', '90 degrees'), (r'90^\circ', r'90 \text{ degrees}'), ('90', r'90^\circ\text{C}'),
    ('90', r'90\degree'),
    # units (they are not compared)
    (r'5 \text{ cm}', '5'), ('5', r'5 \text{ cm}'), (r'5 \text{ cm}', '5 cm'), ('5', r'5\mathrm{~cm}'), ('5', '5cm'),
    ('5', r'5 \text{ cm}^2'), ('5', r'5 \text{ square units}'), ('5', '5 km/h'), ('5', '5 m/s.'), ('5', '5 cm²'),
    ('5', r'5 \text{ km/h}'), ('5', '5 apples'), ('7', '7 people per day'), ('5', r'5\,\mathrm{m}^{2}'), ('5', '5 m^2'),
    (r'36\pi', r'36\pi \text{ cubic inches}'), (r'36\pi', r'36\pi cm'), (r'10\sqrt{3}', r'10\sqrt{3}\text{ cm}^{2}'),
    ('5', r'\text{5 cm}'), ('5', '5 units.'), ('7', '$7$ hours'), (r'\frac12', '1/2 cups'),
    # choices and words
    ('A', '(A)'), ('(A)', 'A'), ('A', r'\text{A}'), ('A', r'\text{(A)}'), (r'\textbf{(A)}', 'A'), ('A', r'\mathrm{A}'),
    ('B', '**B**'), ('B', 'B.'), ('b', 'B'), (r'\text{A, C}', 'A, C'), (r'\text{Monday}', 'monday'),
    ('Yes', r'\text{Yes.}'),
    (r'\text{even}', 'even'), (r'\text{June 20}', 'June 20'), ('no solution', r'\text{No solution}'), ('True', 'true'),
    ('red', r'\mbox{red}'), ('Ellipse', 'ellipse'), ('Saturday', '**Saturday**'), ('blue', r'\textit{blue}'),
    # equations: a value may be given with its name
    ('2^{10}', '2¹⁰'),
    ('7', 'x=7'), ('x=7', '7'), ('x=7', '$x = 7$'), ('7', '3+4=7'), ('x=7', '7=x'), ('7', r'\approx 7'),
    ('y=2x+1', '2x+1=y'), ('y=2x+1', 'y-2x-1=0'), ('3x-2y=5', '3x - 2y - 5 = 0'), ('x^2+y^2=1', 'y^2+x^2=1'),
    ('2x+1', 'y=2x+1'), ('2x+1', 'f(x) = 2x+1'), (r'\{1,2\}', r'x \in \{1,2\}'), ('1,2', 'x=1 or x=2'),
    ('1,2', r'x = 1 \text{ or } x = 2'), ('1,-2', r'x_1=1, x_2=-2'), (r'\pm 2', '2, -2'), ('-2,2', 'x=±2'),
    (r'1\pm\sqrt{2}', r'1+\sqrt{2},1-\sqrt{2}'),
    # expressions
    (r'2\sqrt{3}', r'\sqrt{12}'), (r'2\sqrt3', r'2\sqrt{3}'), (r'2\sqrt{3}', '2√3'), (r'2\sqrt{3}', '2√(3)'),
    (r'2\sqrt{3}', '2*sqrt(3)'), (r'\frac{1}{\sqrt{2}}', r'\frac{\sqrt{2}}{2}'), ('x^2+2x+1', '(x+1)^2'),
    ('(x+1)(x-1)', 'x^2-1'), ('x^2', 'x²'), ('4x^3', '4x³'), ('x_1', 'x_{1}'), (r'3\pi', '3π'),
    (r'\frac{\pi}{6}', 'π/6'),
    ('2^{10}', '1024'), ('120', '5!'), (r'\binom{5}{2}', '10'), ('3+4i', '4i+3'), (r'\log_2 8', '3'),
    (r'\sqrt[3]{8}', '2'),
    ('6', '2×3'), ('12', '3·4'), ('6', '12÷2'), (r'\sin x', r'\sin(x)'), (r'\infty', '∞'), (r'\sqrt{2}', '2^{1/2}'),
    (r'\frac{n(n+1)}{2}', r'\frac{n^2+n}{2}'), ('2516_8', '2516_{8}'),
    ('2516_8', '2516'),      # the problem names the base
    ('3:5', '3 : 5'),
    # intervals, tuples, sets, matrices
    ('x<5', r'(-\infty,5)'), (r'(-\infty,5)', 'x<5'), ('x<5', '5>x'), ('[1,2)', r'\left[1,2\right)'), (r'x\ge5', 'x≥5'),
    (r'x\le 5', r'x\leqslant 5'), (r'(-\infty,2)\cup(3,\infty)', r'(3,\infty)\cup(-\infty,2)'),
    (r'(-\infty, 2) \cup (3, \infty)', '(-∞,2)∪(3,∞)'), (r'(-\infty,-2)\cup(2,\infty)', '(-∞, -2) U (2, ∞)'),
    ('[-2,7]', r'-2 \le x \le 7'), ('[-2,7]', r'x \in [-2,7]'), (r'(3,\infty)', r'(3,+\infty)'),
    (r'\mathbb{R}', r'(-\infty,\infty)'),
    ('(1,2)', r'\left( 1 , 2 \right)'), (r'\left( 3, \frac{\pi}{2} \right)', '(3, π/2)'), ('(-3,-4)', '(−3,−4)'),
    ('(0.5,1)', r'(\frac12,1)'), ('(1,2)', '(x,y)=(1,2)'), ('(1,2)', r'\bigl(1,2\bigr)'), ('(6,31,-1)', '(6, 31, -1)'),
    (r'\{1,2,3\}', r'\{3,2,1\}'), (r'\{1,2,3\}', '{1,2,3}'), (r'\{1,2\}', '1,2'), (r'\{1,2\}', r'\lbrace 1,2\rbrace'),
    ('1, 2', '2, 1'), ('1,2', r'1 \text{ and } 2'), ('1,3,5', '1, 3, and 5'), (r'\emptyset', r'\varnothing'),
    (r'\emptyset', r'\{\}'), (r'\emptyset', '∅'), ('5,6', '$5$ and $6$'),
    (r'\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}', r'\begin{bmatrix}1&2\\3&4\end{bmatrix}'),
    (r'\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}', r'\begin{pmatrix}\frac{1}{2}\\[4pt] 2\end{pmatrix}'),
    (r'\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}', r'\left(\begin{matrix} -1 & 0 \\ 0 & -1 \end{matrix}\right)'),
    # delimiters
    ('7', '$$7$$'), ('7', r'\(7\)'), ('7', r'\[7\]'), ('7', '**7**'), ('7', '$7$.'), ('7', r'\boxed{7}'), ('7', '{7}'),
    ('7', r'\displaystyle 7'), ('7', r'\mathbf{7}'), ('7', r'7\,'), ('7', r'\quad 7'), ('7', '`7`'), ('7', '7,')]

UNEQUAL = [
    ('5', '6'), ('5', '-5'), ('5', '55'), ('5', '5.1'), ('12', '1 2'), ('12', '1,2'), ('1 2', '12'),
    ('3', '1 2'),                                               # 1 2 is not 1 + 2
    ('21/2', r'2\frac{1}{2}'), (r'2\frac{1}{2}', '21/2'), ('1', r'2\frac{1}{2}'), (r'-2\frac{1}{2}', '-3/2'),
    ('-35/9', '-3 5/9'), ('1', '2½'), ('1000', '1.000'), ('1000', '10,00'), ('1,000', '1'), ('1/2', '2'), ('3/4', '3'),
    ('0.33', '1/3'), ('3.14', r'\pi'), (r'\frac{22}{7}', r'\pi'), (r'\frac{3}{4}', r'\frac{4}{3}'), (r'\frac34', '34'),
    (r'\frac{1}{12}', r'\frac{1}{1}2'), ('100', '10^3'), ('1000000', '1000001'), ('123456789', '123456788'),
    (r'6.63 \times 10^{-34}', r'1.05 \times 10^{-34}'), ('0.0000001', '0.0000002'), ('0.0001', '0'), ('1e10', '1e11'),
    ('1/3', r'0.\overline{34}'), (r'50\%', '5'), ('50', '0.05'), ('12.5', r'1.25\%'), (r'12.5\%', '125'),
    ('0.125', r'125\%'), (r'90^\circ', '180'), (r'90^\circ', '9'), (r'\$5', '50'), ('32', '32 million'),
    ('5', '5 hundred'),
    (r'5 \text{ cm}', r'6 \text{ cm}'), ('5', '-5 cm'), (r'5\text{ cm}', r'5\text{ cm and } 6\text{ cm}'),
    ('3', r'3\text{ feet }6\text{ inches}'), ('5', '5 or more'), ('5', '5 or 6'), ('2', '2 times x'), ('2', '2 sqrt 3'),
    ('A', 'B'), ('(A)', '(B)'), ('A', 'AB'), ('A', 'A, C'), ('Monday', 'Sunday'), ('yes', 'no'), ('no solution', '0'),
    ('angle', 'angel'), ('north', 'thorn'),                     # not products of letters
    ('June 20', 'June 21'), ('June 20', '20'), ('infinitely many', 'none'), ('none', '0'), ('x=7', 'x=8'), ('7', 'x=8'),
    ('x=7', 'y=7'), ('x=1,2', '1'), ('7', 'x=7, y=8'), ('x+1', 'y+1'), ('x^2', 'x_2'), ('x^2', '2x'), ('7', '7x'),
    ('7x', '7'), ('7', r'7\pi'), ('7', '7i'), (r'2\sqrt{3}', r'3\sqrt{2}'), (r'2\sqrt{3}', r'2+\sqrt{3}'),
    (r'2\sqrt{3}', '3.46'), (r'\sqrt{2}', '1.414'), (r'36\pi', '36'), ('2^{10}', '210'), ('3+4i', '3-4i'), ('5', '5!'),
    ('y=2x+1', 'y=2x-1'), ('y=2x+1', '1'), ('y=2x+1', 'x=2y+1'), ('4ab', '4a'), ('a/b', 'b/a'), ('2516_8', '2516_9'),
    ('3:5', '5:3'), ('10:30', '10:31'),
    ('(1,2)', '(2,1)'),                                         # order matters in a tuple
    ('(1,2)', '2,1'), ('(1,2)', '(1,2,3)'), ('(1,2)', '[1,2]'), ('[1,2)', '(1,2]'), ('(1,2)', '1'), ('1,2', '2'),
    ('2', '1,2'), (r'\{1,2\}', r'\{1,3\}'), (r'\{1,2\}', r'\{1\}'), (r'\{1,2\}', r'\{1,2,3\}'), (r'\pm 2', '2'),
    ('2', r'\pm 2'), (r'(-\infty,5)', r'(-\infty,5]'), ('x<5', r'(-\infty,5]'), ('x<5', 'x>5'), ('x<5', r'x\le 5'),
    ('x<5', '5'), (r'(-\infty,2)\cup(3,\infty)', '(2,3)'), (r'\infty', r'-\infty'), ('0', r'\emptyset'),
    (r'\begin{pmatrix}1&2\\3&4\end{pmatrix}', r'\begin{pmatrix}1&3\\2&4\end{pmatrix}'),
    (r'\begin{pmatrix}1\\2\end{pmatrix}', r'\begin{pmatrix}1&2\end{pmatrix}'),
    ('7', ''), ('', '7'), ('7', '$$'), ('7', 'I do not know'), ('7', '6 apples and 7 pears'), ('7', r'\frac{7}{'),
    (r'\frac{1}{0}', '1'), ('7', '7' * 600), ('x' * 600, 'y' * 600)]


@pytest.mark.parametrize('gold, answer', EQUAL)
def test_answers_that_are_equal(gold, answer):
    assert equal(gold, answer)


@pytest.mark.parametrize('gold, answer', UNEQUAL)
def test_answers_that_differ(gold, answer):
    assert not equal(gold, answer)


# ---- notations ----

# Reference answers as in MATH-500, each with a wrong answer that is close to it.
MATH = [
    ('5', '6'), ('-7', '7'), ('204', '240'), ('1024', '1028'), ('12,500', '12,000'), ('0.35', '0.53'), ('3.75', '3.57'),
    (r'\frac{3}{8}', r'\frac{8}{3}'), (r'-\frac{5}{12}', r'\frac{5}{12}'), (r'\frac{17}{24}', r'\frac{17}{42}'),
    (r'\dfrac{7}{20}', r'\dfrac{7}{2}'), (r'2\sqrt{5}', r'5\sqrt{2}'), (r'\sqrt{29}', r'\sqrt{92}'),
    (r'3\sqrt{2}-1', r'3\sqrt{2}+1'),
    (r'\frac{\sqrt{5}}{3}', r'\frac{\sqrt{3}}{5}'), (r'\frac{1+\sqrt{5}}{2}', r'\frac{1-\sqrt{5}}{2}'),
    (r'8\pi', r'9\pi'),
    (r'\frac{2\pi}{3}', r'\frac{3\pi}{2}'), (r'16\pi-8', r'16\pi+8'), ('2^{12}', '2^{11}'), ('3-2i', '3+2i'),
    ('-5+12i', '5+12i'), ('x^2-5x+6', 'x^2+5x+6'), ('3x^3-2x+7', '3x^3-2x-7'), ('(x+2)(x-9)', '(x-2)(x+9)'),
    ('2n+1', '2n-1'), (r'\frac{x+1}{x-2}', r'\frac{x-1}{x+2}'), ('5ab^2', '5a^2b'),
    (r'(2,-\frac{1}{3})', r'(-\frac{1}{3},2)'),
    ('(4,7)', '(7,4)'), ('(-1,0,3)', '(-1,3,0)'), (r'\left(5,\frac{\pi}{4}\right)', r'\left(5,\frac{\pi}{3}\right)'),
    ('[-3,5)', '(-3,5]'), (r'(-\infty,4]', r'(-\infty,4)'), (r'(-\infty,-1)\cup(6,\infty)', '(-1,6)'),
    ('2,3,7', '2,3,8'),
    (r'\{-4,9\}', r'\{4,-9\}'), ('y=3x-4', 'y=4x-3'), (r'\begin{pmatrix} 3 & -1 \\ 0 & 2 \end{pmatrix}',
                                                       r'\begin{pmatrix} 3 & 1 \\ 0 & 2 \end{pmatrix}'),
    (r'45^\circ', r'54^\circ'), (r'15\%', r'51\%'), (r'\$6.50', r'\$5.60'), (r'\text{Tuesday}', r'\text{Thursday}'),
    (r'\text{(C)}', r'\text{(D)}'), (r'\frac{9!}{3!}', r'\frac{9!}{2!}'), ('-1', '1')]


def spaced(text):
    return text if '\\text' in text else re.sub(r'(?<=[\w})])([-+=])(?=[\w\\(])', r' \1 ', text).replace(',', ', ')


def is_number(text):
    return re.fullmatch(r'[-\d.,]*|-?\\d?frac\{\d+\}\{\d+\}', text)


NOTATIONS = {
    'as it is': lambda text: text,
    'box': lambda text: final_answer(f'Thus the answer is $\\boxed{{{text}}}$.'),
    'box in display math': lambda text: final_answer(f'So\n\\[\n\\boxed{{{text}}}\n\\]\n'),
    'dollars': lambda text: final_answer(f'The answer is ${text}$.'),
    'bold': lambda text: final_answer(f'**Final answer:** **${text}$**'),
    'last line': lambda text: final_answer(f'We add them.\n\n$${text}$$'),
    'parentheses': lambda text: rf'\( {text} \)',
    'display math': lambda text: rf'\[{text}\].',
    'dfrac': lambda text: re.sub(r'\\d?frac', r'\\dfrac', text),
    'short frac': lambda text: re.sub(r'\\d?frac\{(\d)\}\{(\d)\}', r'\\frac\1\2', text),
    'slash': lambda text: re.sub(r'\\d?frac\{(\d+)\}\{(\d+)\}', r'\1/\2', text),
    'left and right': lambda text: re.sub(r'(?<!left)\((.*?)(?<!right)\)', r'\\left(\1\\right)', text),
    'spaces': spaced,
    'without spaces': lambda text: text if '\\text' in text or '\\pi ' in text else text.replace(' ', ''),
    'thin spaces': lambda text: rf'\,{text}\!',
    'displaystyle': lambda text: rf'$\displaystyle {text}$',
    'braces': lambda text: re.sub(r'\^(\d)', r'^{\1}', text),
    'name': lambda text: text if '=' in text or '\\text' in text else f'x = {text}',
    'unit': lambda text: text + r' \text{ cm}' if is_number(text) and text.count(',') != 2 else text,
    'Unicode': lambda text: text.replace('-', '−').replace(r'\pi', 'π').replace(r'\infty', '∞').replace(r'\cup', '∪')}


def test_answers_to_math_problems_are_judged_in_any_notation():
    wrong = [(gold, said, name) for gold, _ in MATH for name, write in NOTATIONS.items()
             if not equal(gold, said := write(gold))]
    assert len(wrong) <= 0.02 * len(MATH) * len(NOTATIONS), wrong
    wrong = [(gold, said, name) for i, (gold, other) in enumerate(MATH)
             for name, write in [*NOTATIONS.items()][i % 4::4] if equal(gold, said := write(other))]
    assert not wrong


# ---- the process ----

@settings(max_examples=60)
@given(st.text(max_size=20) | st.lists(st.sampled_from(
    ['\\frac', '{', '}', '(', ')', '[', '\\boxed', '1', '23', 'x', '^', '_', '\\text', '$', '\\', '%', ',', '\n', '=',
     '<', '\\sqrt', ' ', '\\begin{pmatrix}', '&', '\\\\', '!', '\\int', '\\sum']), max_size=12).map(''.join))
def test_any_text_gets_a_verdict_in_bounded_time(text):
    start = time.perf_counter()
    assert equal('7', final_answer(text)) in (True, False) and equal(text, text) and equal(text, '1/2') in (True, False)
    assert time.perf_counter() - start < 2 * answers.SECONDS + 30           # two comparisons, and starting the process


def test_a_comparison_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(answers, 'SECONDS', 0.3)
    equal('1', 'x')                                             # the process has started
    start = time.perf_counter()
    assert not equal('7', '9^{9^{9^{9}}}')
    assert time.perf_counter() - start < 10
    monkeypatch.undo()
    assert equal('7', '14/2')                                   # a new process


def test_a_process_that_ended_is_replaced():
    equal('1', 'y')
    answers._worker[0].kill()
    answers._worker[0].wait()
    assert equal('7', '21/3')


def test_threads_may_compare():
    verdicts = []
    threads = [threading.Thread(target=lambda i=i: verdicts.append(equal(str(i), f'{2 * i}/2'))) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 5


def test_without_the_package_the_error_says_how_to_get_it(tmp_path):
    (tmp_path / 'math_verify.py').write_text('raise ImportError')
    code = 'from tasks.answers import equal; assert equal("7", "$7$"); equal("7", "8")'
    result = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(tmp_path)},
                            capture_output=True, text=True)
    assert 'ValueError: this needs the package math_verify: pip install math_verify' in result.stderr


def test_the_judge_is_named_with_the_version_that_is_tested():
    assert answers.JUDGE.endswith(f'math-verify {importlib.metadata.version("math-verify")}')
