"""The loops task (tasks/loops/) in words, through the interface of released models: chat format, English prompts,
answers in \\boxed{}. From the project's root:

    python -m tasks.words.prepare && python train.py config/words.py
    python rsa.py --ckpt=runs/words --problems=tasks/words/problems.jsonl --aggregation_prompt=tasks/words/prompt.txt \\
        --budget=59 --final_budget=59 --tail=14 --rounds=4

It writes a packed set like tasks/loops/prepare.py, whose prompts are those that rsa.py makes (tasks/problems.py), and
problems.jsonl, held-out problems of 25 to 32 steps with their answers. A problem and the beginning of a solution:

    Start with 5. Do this 4 times: a) -2 b) *7 c) +3. What is the last digit?

    <think>5
    4a-2=3
    4b*7=1
    ...</think>The last digit is \\boxed{5}.
"""
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import configurator
from runtime.language import run_language
from tasks.loops import task
from tasks.loops.prepare import CANDIDATES
from tasks.problems import INSTRUCTION, message, read_words
from data.reasoning import Turn, trim, write_packed
from data.tokenizer import save_tokenizer, train_bpe

HERE = Path(__file__).parent
PER_ROUND = 8                                       # steps of a continuation: 59 tokens, with <think> and the value
LINES = 2                                           # of a tail: 14 tokens


@dataclass
class WordsConfig:
    out: str = str(HERE)
    context: int = 256                              # tokens in a window
    traces: int = 20_000                            # whole solutions
    votes: int = 30_000                             # continuations of what several candidates left
    problems: int = 100                             # held out
    seed: int = 0

    def __post_init__(self):
        configurator.check_ranges(self, context=(200, 10**7), traces=(1, None), votes=(1, None), problems=(1, None))


def in_words(problem):
    """Return the text of a task.Problem."""
    steps = ' '.join(f'{label}) {operation}' for label, operation in zip('abcdefgh', problem.operations))
    return f'Start with {problem.start}. Do this {problem.loops} times: {steps}. What is the last digit?'


def lines_of(problem, chain):
    """Return the lines of a chain, one for each of its pairs (steps done, value): the first states the value alone."""
    return [f'{text}\n' for text in task.step_texts(problem, chain)]


def sample(language, words, problem, tails, chain):
    """Return a training sample, a list of one Turn. tails: texts. The answer stands there if all steps are done."""
    question = language.encode(in_words(problem) + INSTRUCTION)
    content = message(question, [language.encode(tail) for tail in tails], words)
    prompt = language.prompt([{'role': 'user', 'content': content}])
    think = language.open_think + language.encode(''.join(lines_of(problem, chain)))
    if chain[-1][0] < problem.steps:
        return [Turn(prompt, think, [])]
    answer = language.encode(f'The last digit is \\boxed{{{chain[-1][1]}}}.') + language.encode_with_special('<|end|>')
    return [Turn(prompt, think + language.close_think, answer)]


def aggregation(language, words, rng, problem):
    """Draw a sample of what experts left, as in tasks/loops/task.py, with their tails in words."""
    chains, written, _, chain = task.draw_aggregation(rng, problem, rng.choice(CANDIDATES), PER_ROUND)
    tails = [''.join(lines_of(problem, c[-1 - max(written, LINES):])[1:][-LINES:]) for c in chains]
    return sample(language, words, problem, tails, chain)


def prepare_words(config):
    rng, out, words = random.Random(config.seed), Path(config.out), read_words(HERE / 'prompt.txt')
    texts = []
    for _ in range(2000):                           # for the vocabulary
        problem = task.draw_problem(rng, 3, 36, 'train')
        chain = task.continue_chain(problem, [(0, problem.start)], problem.steps, rng, 0)
        texts += [in_words(problem) + INSTRUCTION, ''.join(lines_of(problem, chain)), words, '--- 1 ---\n--- 2 ---\n',
                  'The last digit is \\boxed{5}.']
    enc = train_bpe(texts, 400)
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(out / 'bpe.json', enc)
    language = run_language(out)

    def trace(split):
        problem = task.draw_problem(rng, 3, 24, split)
        chain = task.continue_chain(problem, [(0, problem.start)], problem.steps, rng, task.NOISE_RATE)
        return sample(language, words, problem, [], chain)

    def vote(split):
        return aggregation(language, words, rng, task.draw_problem(rng, 3, 72, split))
    splits = {}
    for split, share in ('train', 1), ('val', 20):
        samples = [draw(split) for n, draw in ((config.traces, trace), (config.votes, vote))
                   for _ in range(max(1, n // share))]
        splits[split], done = trim(samples, config.context, 'drop')
        print(f'{split}: {done["kept"]:,} samples kept, {done["dropped"]:,} are too long')
    write_packed(splits, out, config.context, enc)
    with open(out / 'problems.jsonl', 'w') as file:
        for problem in task.test_problems('hard', config.problems):
            row = {'problem': in_words(problem), 'answer': str(task.solve(problem.question))}
            file.write(json.dumps(row) + '\n')


if __name__ == '__main__':
    with configurator.one_line_errors('tasks.words.prepare'):
        prepare_words(*configurator.read(sys.argv[1:], WordsConfig))
