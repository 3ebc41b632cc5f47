"""Write the loops task (tasks/loops/) in the interface of released models: chat format, English prompts, answers in
\\boxed{}. From the project's root:

    python -m tasks.words.prepare && python train.py config/words.py
    python rsa.py --ckpt=runs/words --problems=tasks/words/problems.jsonl --aggregation_prompt=tasks/words/prompt.txt \\
        --budget=59 --final_budget=59 --tail=14 --rounds=4

The output is a packed dataset like that of tasks/loops/prepare.py, with the prompts of rsa.py (tasks/problems.py), and
problems.jsonl, held-out problems of 25 to 32 steps with their answers. A problem and the start of its solution:

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
from tasks.loops import task
from tasks.loops.prepare import CANDIDATES
from tasks.problems import INSTRUCTION, message, read_words
from data.language import language_of
from data.prepare import replacing
from data.reasoning import Turn, trim_and_report, write_packed
from data.tokenizer import train_bpe

HERE = Path(__file__).parent
PER_ROUND = 8                                       # steps per continuation: 59 tokens with <think> and first value
TAIL_LINES = 2                                      # 14 tokens


@dataclass
class WordsConfig:
    out: str = str(HERE)
    context: int = 256                              # tokens per window
    traces: int = 20_000                            # whole solutions
    votes: int = 30_000                             # aggregation samples
    problems: int = 100                             # held-out problems
    seed: int = 0

    def __post_init__(self):
        configurator.check_ranges(self, context=(200, 10**7), traces=(1, None), votes=(1, None), problems=(1, None))


def in_words(problem):
    """Return the text of a task.Problem."""
    steps = ' '.join(f'{label}) {operation}' for label, operation in zip(task.LABELS, problem.operations))
    return f'Start with {problem.start}. Do this {problem.loops} times: {steps}. What is the last digit?'


def lines_of(problem, chain):
    """Return the lines of a chain, one per pair (steps done, value): the first value, then the steps."""
    return [f'{text}\n' for text in task.step_texts(problem, chain)]


def training_sample(language, aggregation_prompt, problem, tails, chain):
    """Return a training sample, a list of one Turn, with the answer if all steps are done. tails: texts."""
    question = language.encode(in_words(problem) + INSTRUCTION)
    content = message(question, [language.encode(tail) for tail in tails], aggregation_prompt)
    prompt = language.prompt([{'role': 'user', 'content': content}])
    think = language.open_think + language.encode(''.join(lines_of(problem, chain)))
    done, value = chain[-1]
    if done < problem.steps:
        return [Turn(prompt, think, [])]
    answer = language.encode(f'The last digit is \\boxed{{{value}}}.') + language.encode_with_special('<|end|>')
    return [Turn(prompt, think + language.close_think, answer)]


def train_tokenizer(rng, aggregation_prompt):
    """Return a tokenizer trained on 2000 problems and solutions."""
    texts = []
    for _ in range(2000):
        problem = task.draw_problem(rng, 3, 36, 'train')
        chain = task.continue_chain(problem, [(0, problem.start)], problem.steps, rng, 0)
        texts += [in_words(problem) + INSTRUCTION, ''.join(lines_of(problem, chain)), aggregation_prompt,
                  '--- 1 ---\n--- 2 ---\n', 'The last digit is \\boxed{5}.']
    return train_bpe(texts, 400)


def prepare_words(config):
    """Draw, trim and pack the samples, and write them and the held-out problems as the WordsConfig says."""
    rng, aggregation_prompt = random.Random(config.seed), read_words(HERE / 'prompt.txt')
    enc = train_tokenizer(rng, aggregation_prompt)
    language = language_of(enc, config.out)

    def trace(split):
        problem = task.draw_problem(rng, 3, 24, split)
        chain = task.continue_chain(problem, [(0, problem.start)], problem.steps, rng, task.NOISE_RATE)
        return training_sample(language, aggregation_prompt, problem, [], chain)

    def aggregation(split):
        problem = task.draw_problem(rng, 3, 72, split)
        chains, written, _, chain = task.draw_aggregation(rng, problem, rng.choice(CANDIDATES), PER_ROUND)
        tails = [''.join(lines_of(problem, c[-1 - max(written, TAIL_LINES):])[1:][-TAIL_LINES:]) for c in chains]
        return training_sample(language, aggregation_prompt, problem, tails, chain)

    splits = {}
    for split, share in ('train', 1), ('val', 20):
        samples = [draw(split) for n, draw in ((config.traces, trace), (config.votes, aggregation))
                   for _ in range(max(1, n // share))]
        splits[split] = trim_and_report(split, samples, config.context, 'drop')
    with replacing(config.out) as folder:
        write_packed(splits, folder, config.context, enc)
        with open(folder / 'problems.jsonl', 'w') as file:
            for problem in task.test_problems('hard', config.problems):
                line = {'problem': in_words(problem), 'answer': str(task.solve(problem.question))}
                file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
    with configurator.one_line_errors('tasks.words.prepare'):
        prepare_words(*configurator.read(sys.argv[1:], WordsConfig))
