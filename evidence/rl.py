"""What learning from rewards does (rl.py) on the loops task. First `make demo`, or at least runs/loops; then

    python -m evidence.rl main       after RL: one rollout, lone chains and Markovian RSA, at every length
    python -m evidence.rl compare    the same with one setting changed: GRPO, no aggregation prompts, ... (VARIANTS)
    python -m evidence.rl replay     the generator's and the learner's probabilities, with router replay and without
    python -m evidence.rl errors     the outputs of RSA that are wrong, round by round: what went wrong in them

Claims (ZAYA1-8B report, arXiv 2605.05365, IV). (1) Rewards for answers alone unlearn the errors that the training data
has on purpose. (2) With replay, both probabilities of a token agree in spite of rounding: KL 1.3e-4, Pearson's r above
0.9996.
(3) After it, the mean of RSA's candidates is no lower than the majority of as many independent chains.

Tests. (1), (3): held-out problems, some longer than any that RL had; each row that `main` prints would refute (3) where
its mean lies below the majority of C=1. (2): rollouts by weights in bf16 and int8, and the float32 learner on them.

The tables are CSV, on the standard output; those in results/ were printed so. A run that is there is not repeated.
"""
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass

import torch

import configurator
import rl
from data.loops import task
from data.loops.evaluate import TableConfig, measure, steps
from evidence.quantization import CHANGES, in_few_bits
from rsa import load_speaker, markovian_rsa, sampler


@dataclass
class EvidenceConfig:
    init_from: str = 'runs/loops'
    out: str = 'runs/rl_evidence'   # folder of the runs
    seeds: int = 3                  # of RL; they all begin with the same model
    problems: int = 100             # of each length
    max_steps: int = 28             # of a run
    splits: str = 'easy medium hard deep'

    def __post_init__(self):
        configurator.check_ranges(self, seeds=(1, None), problems=(1, None), max_steps=(1, None))
        TableConfig(split=self.splits)                          # raises for a split that it does not know


def learned(config, name, seed, **changes):
    """Run rl.py with these settings, or go on with it where it was stopped. Return the folder of the run."""
    out = os.path.join(config.out, f'{name}{seed}')
    rl.train(rl.RLConfig(init_from=config.init_from, out_dir=out, seed=seed, max_steps=config.max_steps, **changes))
    return out


def rows(folder, split, problems, seed=0):
    """Measure one rollout, lone chains and RSA. Yield (method, Row)."""
    speaker, table = load_speaker(folder, configurator.pick_device('auto')), TableConfig(seed=seed)
    held_out, T = task.test_problems(split, problems), task.rounds_needed(task.LENGTHS[split][1], table.budget)
    if task.LENGTHS[split][1] <= 36:                            # as long as solutions were in training
        yield 'one rollout', measure(speaker, held_out, table, split, candidates=1, rounds=0, tail=1)
    for C in 1, 4:
        yield f'C={C}', measure(speaker, held_out, table, split, candidates=C, rounds=T, budget=table.budget,
                                tail=table.tail)


def print_rows(label, folder, split, problems, seed):
    for method, row in rows(folder, split, problems, seed):
        print(f'{label},{seed},{steps(split)},{method},{100 * row.mean:.2f},{100 * row.half:.2f},'
              f'{100 * row.majority:.1f},{row.tokens:.0f}', flush=True)


HEAD = 'run,seed,steps,method,mean,ci95,majority,tokens'


def main_table(config):
    print(HEAD)
    for split in config.splits.split():
        print_rows('before', config.init_from, split, config.problems, 0)
    for seed in range(config.seeds):
        folder = learned(config, 'main', seed)
        for split in config.splits.split():
            print_rows('after', folder, split, config.problems, seed)


VARIANTS = {'grpo': dict(advantage='grpo'), 'no_aggregation': dict(aggregation=0.0, groups=12),
            'balancer': dict(balancer_lr=3e-3), 'two_updates': dict(updates=2),
            'bf16_replay': dict(generator='bfloat16'), 'bf16_no_replay': dict(generator='bfloat16', replay=False)}


def compare(config):
    """no_aggregation has half the groups, so that a step generates about as many tokens."""
    print(HEAD)
    for seed in range(config.seeds):
        for name, changes in {'main': {}, **VARIANTS}.items():
            folder = learned(config, name, seed, **changes)
            for split in config.splits.split():
                print_rows(name, folder, split, config.problems, seed)


@torch.no_grad()
def replay(config, n_rollouts=128):
    """KL is the mean of q/p's unbiased, never negative estimate: p/q - 1 - ln(p/q), over the tokens drawn from q."""
    print('generator,replay,tokens,kl,pearson_r,largest_difference,moved_by_more_than_0.1,other_expert')
    learner = load_speaker(config.init_from, torch.device('cpu')).model
    generators = {'float32': learner, 'bfloat16': rl.generator_of(learner, 'bfloat16'),
                  'int8': in_few_bits(learner, CHANGES['int8'])}
    rng = random.Random(0)
    questions = [task.draw_problem(rng, 25, 32, 'train').question for _ in range(n_rollouts)]
    prompts = [task.build_prompt(task.ENC.encode_ordinary(question), []) for question in questions]
    for name, generator in generators.items():
        rollouts = rl.roll_out(generator, prompts, 170, seed=0)
        q = torch.cat([x.q for x in rollouts]).double()
        for on in True, False:
            p, _, other = rl.probabilities(learner, rollouts, on)
            ratio, r, moved = p / q, torch.corrcoef(torch.stack([p.double(), q]))[0, 1], (p - q).abs()
            print(f'{name},{on},{len(q)},{(ratio - 1 - ratio.log()).mean():.2e},{r:.7f},{moved.max():.4f},'
                  f'{(moved > 0.1).double().mean():.6f},{other:.5f}', flush=True)


def state(problem, text):
    """(steps done, value) where a trace ends; the first is None if it ends in no such way."""
    digits = re.findall(r'\d', text)
    return task.place_of(problem, text), int(digits[-1]) if digits else None


def value_at(problem, done):
    value = problem.start
    for i in range(done):
        value = task.apply(problem.operations[i % len(problem.operations)], value)
    return value


def what_went_wrong(problem, tails, output, budget):
    """None for a right output. Else 'outvoted': the tails' vote is wrong or a tie; 'place': it does not go on from a
    tail; 'misread': it states a wrong value though the vote is right; 'computed': a right value, then a wrong step."""
    if task.verify(problem.question, tails, output, budget):
        return None
    ends = [state(problem, task.ENC.decode(task.without_end(tail))) for tail in tails] or [(0, problem.start)]
    vote = task.vote(ends) if all(place is not None for place, _ in ends) else None
    if vote is None or vote[1] != value_at(problem, vote[0]):
        return 'outvoted'
    text, K = task.ENC.decode(output), len(problem.operations)
    first = re.match(r'\d([1-9])([a-z])', text)
    begin = (problem.loops - int(first[1])) * K + task.LABELS.index(first[2]) if first else problem.steps
    if begin not in {place for place, _ in ends}:
        return 'place'
    return 'computed' if text[0] == str(value_at(problem, begin)) else 'misread'


def errors(config):
    """Of RSA with C=4 and lone chains: the outputs of all rounds that are wrong, by what went wrong; how many problems
    had a population all of whose last outputs are wrong."""
    print('run,steps,C,outputs,wrong,outvoted,place,misread,computed,problems,lost_together')
    folders = {'before': config.init_from, **{f'after{seed}': learned(config, 'main', seed)
                                              for seed in range(config.seeds)}}
    for name, folder in folders.items():
        speaker, table = load_speaker(folder, configurator.pick_device('auto')), TableConfig()
        for split in config.splits.split():
            questions = [problem.question for problem in task.test_problems(split, config.problems)]
            for C in 1, 4:
                T, counts, lost, outputs = task.rounds_needed(task.LENGTHS[split][1], 41), Counter(), 0, 0
                results = markovian_rsa([speaker.encode(question) for question in questions], sampler(speaker, table),
                                        speaker.build_prompt, candidates=C, rounds=T, budget=41, tail=10,
                                        answer_of=speaker.answer_of)
                for question, result in zip(questions, results):
                    before = None
                    for now in result['rounds']:
                        for draw, prompt, output in zip(now['draws'], now['prompts'], now['outputs']):
                            if prompt is not None:
                                tails = [before['tails'][j] for j in draw]
                                counts[what_went_wrong(task.parse(question), tails, output, 41)] += 1
                        before = now
                    right = str(task.solve(question))
                    lost += not any(answer and speaker.decode(answer) == right for answer in result['answers'])
                outputs, kinds = sum(counts.values()), ('outvoted', 'place', 'misread', 'computed')
                print(f'{name},{steps(split)},{C},{outputs},{outputs - counts[None]},'
                      f'{",".join(str(counts[kind]) for kind in kinds)},{len(questions)},{lost}', flush=True)


EXPERIMENTS = {'main': main_table, 'compare': compare, 'replay': replay, 'errors': errors}


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.rl', 'try fewer --problems',
                                      'an experiment goes on when the same command is run again'):
        if len(sys.argv) < 2 or sys.argv[1] not in EXPERIMENTS:
            raise ValueError(f'name an experiment: {", ".join(EXPERIMENTS)}')
        EXPERIMENTS[sys.argv[1]](*configurator.read(sys.argv[2:], EvidenceConfig))
