"""What learning from rewards does (rl.py) on the loops task. First `make demo`, or at least runs/loops; then

    python -m evidence.rl main       before RL and after it: one rollout, lone chains and Markovian RSA, at four lengths
    python -m evidence.rl compare    after RL with one setting changed: GRPO, no aggregation prompts, ... (VARIANTS)
    python -m evidence.rl long       programs of up to 26 operations: up to 234 steps, where training had up to 72
    python -m evidence.rl without    from a model whose data had no aggregation examples
    python -m evidence.rl errors     the outputs of RSA that are wrong, round by round: what went wrong in them
    python -m evidence.rl replay     the generator's and the learner's probabilities, with router replay and without

Claims (ZAYA1-8B report, arXiv 2605.05365, IV). (1) Rewards for answers alone unlearn the errors that the training data
has on purpose. (2) With replay, both probabilities of a token agree in spite of rounding: KL 1.3e-4, Pearson's r above
0.9996.
(3) After it, the mean of RSA's candidates is no lower than the majority of as many independent chains.

Tests. (1), (3): held-out problems, some longer than any that RL had; a row whose mean lies below the majority of C=1
refutes (3). (2): rollouts by weights in bf16 and int8, and the float32 learner on them. The seeds are of RL and of the
problems' rollouts: all runs of an experiment begin with the same model.

Each is a table in results/ but for replay, which prints one.
"""
import functools
import random
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import configurator
import rl
from data.loops import task
from data.loops.evaluate import TableConfig, steps
from evidence.claims import ClaimConfig, by_seed, picture, table, verdict
from evidence.quantization import CHANGES, in_few_bits
from evidence.rsa import BOUNDS, QUICK, figures, judge, methods, prepare_once, report, speaker_of
from rsa import load_speaker, markovian_rsa, sampler


@dataclass
class EvidenceConfig(ClaimConfig):
    init_from: str = 'runs/loops'   # the model that RL begins with, of main, compare, errors and replay
    out: str = 'runs/rl_evidence'   # folder of the runs


VARIANTS = {'RL': {}, 'grpo': dict(advantage='grpo'), 'no_aggregation': dict(aggregation=0.0, groups=12),
            'moving_balancer': dict(balancer_lr=3e-3), 'two_updates': dict(updates=2),
            'bf16_replay': dict(generator='bfloat16'), 'bf16_no_replay': dict(generator='bfloat16', replay=False)}
LONGER = dict(max_steps=48, draws=4)                            # some 15 minutes of one core, where RL takes 5
QUICK_RL = dict(max_steps=1, groups=2, rollouts=2, draws=1, candidates=2, level=3, eval_problems=0)


def learned(config, run, seed, init_from, **changes):
    """Run rl.py with these settings, or go on with it where it was stopped. Return the folder of the run."""
    out = f'{config.out}/{"quick_" * config.quick}{Path(init_from).name}/{run}{seed}'
    rl.train(rl.RLConfig(init_from=init_from, out_dir=out, seed=seed, **changes | (QUICK_RL if config.quick else {})))
    return out


def model_of(config, name, operations, sets):
    """The folder of a model trained by the recipe of the loops task, now if it is not there."""
    quick = 'quick_' * config.quick
    data, samples = f'{config.out}/{quick}{name}_data', 100 if config.quick else 30_000
    prepare_once(data, traces=samples, votes=samples, operations=operations)
    folder = f'{config.out}/{quick}{name}'
    speaker_of(folder, f'--dataset={" ".join(f"{data}/{part}" for part in sets)}', *QUICK * config.quick)
    return folder


def measured(name, config, model, runs, lengths, problems, before='before'):
    """Fill and report results/NAME.csv: a row for each length, run and method. model() -> the folder of the model that
    RL begins with. runs: {name: what is changed}. before: what that model's rows are called; '': it has none."""
    device, (lengths, problems) = configurator.pick_device('auto'), ('easy', 1) if config.quick else (lengths, problems)
    settings = {setting.replace(': ', f': {run}: ', 1): (run, *how) for setting, how in methods(lengths).items()
                if 'one bounded' not in setting for run in [before, *runs] if run}

    def one(setting, seed):
        run, split, how = settings[setting]
        folder = model() if run == before else learned(config, run, seed, model(), **runs[run])
        return figures(load_speaker(folder, device), task.test_problems(split, problems), seed, **how)
    table(name, config, [setting for setting in settings if settings[setting][0] == before], one, seeds=[0])
    rows = table(name, config, [setting for setting in settings if settings[setting][0] != before], one)
    report(rows)
    return rows


def main_table(config):
    runs = {'RL': {}, 'longer': LONGER}
    rows = measured('rl', config, lambda: config.init_from, runs, 'easy medium hard deep', 100)
    for run in runs:
        majority, mean = ({row['setting'].split(': ')[0]: by_seed(rows, row['setting'], column) for row in rows
                           if f'{run}: {C}' in row['setting']} for C, column in (('C=1', 'majority'), ('C=4', 'mean')))
        for length in mean:
            verdict(f'{length} steps, {run}: the majority of C=1 below the mean of C=4', majority[length], mean[length])
    config.quick or picture('rl', draw)


def compare(config):
    """Without aggregation a step has half the groups, so that it generates about as many tokens."""
    rows = measured('rl_compare', config, lambda: config.init_from, VARIANTS, 'hard deep', 40, before='')
    judge(rows, *[(f'{worse}: {way}', f'{better}: {way}') for worse, better in (
        *[(name, 'RL') for name in VARIANTS if name != 'RL' and 'bf16' not in name], ('bf16_no_replay', 'bf16_replay'))
                  for way in ('one unbounded rollout each', 'C=1', 'C=4')])


def long(config):
    """A model that was trained on 3 to 72 steps, of programs of 3 to 26 operations that run 1 to 9 times."""
    model = functools.cache(lambda: model_of(config, 'long', 26, ('traces:0.5', 'votes:0.5')))
    rows = measured('rl_long', config, model, {'RL': dict(operations=26)}, 'hard deep deeper deepest', 40)
    judge(rows, ('RL: C=1', 'RL: C=4'))
    config.quick or picture('rl_long', draw)


def without(config):
    model = functools.cache(lambda: model_of(config, 'without', task.MOST, ['traces']))
    measured('rl_without', config, model, {'RL': {}}, 'easy hard', 40)


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


KINDS = 'outvoted', 'place', 'misread', 'computed'


def wrong_outputs(speaker, problems, C, T, seed):
    """Let RSA solve the problems. Return how many outputs it had in all rounds, how many were wrong and why, and how
    many problems have no right answer among their last outputs."""
    questions, counts, lost = [problem.question for problem in problems], Counter(dict.fromkeys(KINDS, 0)), 0
    results = markovian_rsa([speaker.encode(question) for question in questions],
                            sampler(speaker, TableConfig(seed=seed)), speaker.build_prompt, candidates=C, rounds=T,
                            answer_of=speaker.answer_of, seed=seed, **BOUNDS)
    for problem, result in zip(problems, results):
        tails = []
        for now in result['rounds']:
            for draw, prompt, output in zip(now['draws'], now['prompts'], now['outputs']):
                if prompt is not None:
                    counts[what_went_wrong(problem, [tails[j] for j in draw], output, BOUNDS['budget'])] += 1
            tails = now['tails']
        right = str(task.solve(problem.question))
        lost += not any(answer and speaker.decode(answer) == right for answer in result['answers'])
    return dict(outputs=sum(counts.values()), wrong=sum(counts[kind] for kind in KINDS),
                **{kind: counts[kind] for kind in KINDS}, lost=lost)


def errors(config):
    lengths, problems = (['easy'], 1) if config.quick else (['hard', 'deep'], 40)
    settings = {f'{steps(split)}, C={C} | {run}': (run, split, C)
                for split in lengths for C in (1, 4) for run in ('before', 'RL')}

    def one(setting, seed):
        run, split, C = settings[setting]
        folder = config.init_from if run == 'before' else learned(config, run, seed, config.init_from)
        speaker = load_speaker(folder, configurator.pick_device('auto'))
        return wrong_outputs(speaker, task.test_problems(split, problems), C,
                             task.rounds_needed(task.LENGTHS[split][1], BOUNDS['budget']), seed)
    rows = table('rl_errors', config, settings, one)
    for setting in settings:
        sums = [sum(by_seed(rows, setting, column)) for column in ('outputs', 'wrong', *KINDS, 'lost')]
        print(f'| {setting} | {" | ".join(f"{count:,.0f}" for count in sums)} |')


def draw(plt, rows):
    """Rewards for answers unlearn the errors of the data, at every length and in every way to think."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
    lengths = list(dict.fromkeys(row['setting'].split(': ')[0] for row in rows))
    for method, color, mark in (('one unbounded rollout', 'tab:green', '^'), ('C=1', 'tab:orange', 's'),
                                ('C=4', 'tab:blue', 'o')):
        for run, style, fill in ('before', '--', 'none'), ('RL', '-', 'full'):
            wrong = {i: [max(0.02, 100 - float(row['mean'])) for row in rows
                         if row['setting'].startswith(f'{length}: {run}: {method}')]
                     for i, length in enumerate(lengths)}
            points = [(i, statistics.fmean(values)) for i, values in wrong.items() if values]
            axis.plot(*zip(*points), mark + style, color=color, fillstyle=fill,
                      label=f'{method}, {run.replace("RL", "after")} RL')
            axis.plot(*zip(*[(i, value) for i in wrong for value in wrong[i]]), mark, color=color, markersize=2)
    axis.set(xticks=range(len(lengths)), xticklabels=lengths, xlabel='steps of the problem', yscale='log',
             ylim=(0.015, 110), ylabel='wrong answers, % (0.02: none)')
    figure.legend(loc='outside upper center', ncols=3, frameon=False)
    return figure


EXPERIMENTS = {'main': main_table, 'compare': compare, 'long': long, 'without': without, 'errors': errors,
               'replay': replay}


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.rl', '',
                                      'an experiment goes on when the same command is run again'):
        if len(sys.argv) < 2 or sys.argv[1] not in EXPERIMENTS:
            raise ValueError(f'name an experiment: {", ".join(EXPERIMENTS)}')
        EXPERIMENTS[sys.argv[1]](*configurator.read(sys.argv[2:], EvidenceConfig))
