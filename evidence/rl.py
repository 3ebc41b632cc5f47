"""Evaluate reinforcement learning (rl.py) on the loops task. First train config/loops.py; then

    python -m evidence.rl main       before RL, after it, after longer RL: at four lengths, by three methods
    python -m evidence.rl models     before and after RL, from three models of the task
    python -m evidence.rl compare    RL with one setting changed: GRPO, two updates, ... (VARIANTS)
    python -m evidence.rl aggregation --seeds=5    RL with and without aggregation prompts
    python -m evidence.rl long       programs of up to 234 steps, by a model that was trained on up to 72
    python -m evidence.rl without    RL from a model whose data had no aggregation examples
    python -m evidence.rl errors     how many outputs of all rounds of RSA are wrong, and why
    python -m evidence.rl replay     token probabilities of generator and learner, with and without router replay

Claims (ZAYA1-8B report, arXiv 2605.05365, IV). (1) RL with verifiable rewards corrects the errors that the training
data contains on purpose: refuted where the mean before RL is not below that after it. (2) With router replay, generator
and learner agree on token probabilities (KL 1.3e-4, Pearson's r above 0.9996): refuted where replay does not reduce the
difference. (3) After RL, the mean of RSA's candidates is no lower than the majority vote of as many independent chains:
refuted where the mean of C=4 is significantly below the majority vote of C=1.

The seed is that of RL and of sampling. All runs start from one model, whose own measurements have seed 0; only in
`models` each seed has its own model.
"""
import functools
import random
import re
import statistics
from collections import Counter
from pathlib import Path

import torch

import rl
from tasks.loops import task
from evaluate import steps
from evidence.claims import by_seed, fill_table, picture, print_table, print_verdicts, read_table, run_experiments
from evidence.quantization import CHANGES, with_changed_matrices
from evidence.rsa import (BOUNDS, by_length, compare_methods, methods, prepare_data, print_methods, run_table,
                          trained_model)
from rsa import RSASettings, load_policy, markovian_rsa
from runtime.device import pick_device
from sample import SamplingOptions

MODEL = 'runs/loops'                                            # from which RL starts by default
METHODS = 'one unbounded rollout each', 'C=1', 'C=4'
LONGER = dict(max_steps=48, draws=4)                            # about 16 minutes on one core, RL takes 5
# no_aggregation has half the groups, so that a step generates about equally many tokens.
VARIANTS = {'RL': {}, 'grpo': dict(advantage='grpo'), 'no_aggregation': dict(aggregation=0.0, groups=12),
            'moving_balancer': dict(balancer_lr=3e-3), 'two_updates': dict(updates=2),
            'bf16_replay': dict(generator='bfloat16'), 'bf16_no_replay': dict(generator='bfloat16', replay=False)}
QUICK_RL = dict(max_steps=1, groups=4, rollouts=2, draws=1, candidates=2, level=3, eval_problems=0)


def train_rl(config, run, seed, model, changes):
    """Run rl.py from the model in a folder with changed settings, or resume. Return the run folder: that of the model
    if `changes` is None."""
    if changes is None:
        return model
    out = f'{config.folder("rl")}/{Path(model).name}_{run}{seed}'
    rl.train(rl.RLConfig(init_from=model, out_dir=out, seed=seed, **changes | (QUICK_RL if config.quick else {})))
    return out


def rl_table(name, config, runs, lengths, n, model=lambda seed: MODEL, seeds_before=(0,)):
    """Fill and report results/NAME.csv, with a setting per length, run and method.

    runs: {name: changed settings of rl.py, or None for the model without RL}. n: problems per length. model(seed) ->
    the folder of the model from which RL starts. seeds_before: the seeds of the model without RL."""
    settings = {True: {}, False: {}}                            # before RL, after it
    for setting, (split, how) in methods(config, lengths).items():
        length, method = setting.split(': ')
        for run in runs if method.split(', T=')[0] in METHODS else ():
            settings[runs[run] is None][f'{length}: {run}: {method}'] = run, split, how
    policy_of = lambda run, seed: load_policy(train_rl(config, run, seed, model(seed), runs[run]), pick_device('auto'))
    run_table(name, config, settings[True], n, policy_of, seeds_before)
    report(name, run_table(name, config, settings[False], n, policy_of))


def report(name, rows):
    """Print the table and the verdicts of results/NAME.csv."""
    if name == 'rl_compare':                                    # a line per run, a column per length and method
        print_methods([row | {'setting': f'{length}, {method.split(", T=")[0]}: {run}'}
                       for row in rows for length, run, method in [row['setting'].split(': ')]])
    else:
        print_methods(rows)
    print_verdicts(VERDICTS[name](rows))


def run_by_run(rows, *pairs):
    """Return the verdicts on the pairs of runs (lower, higher) for each method."""
    return compare_methods(rows, *((f'{a}: {method}', f'{b}: {method}') for a, b in pairs for method in METHODS))


def against_vote(rows, run='RL'):
    """Return the verdicts on claim (3): the majority vote of C=1 below the mean of C=4."""
    return compare_methods(rows, (f'{run}: C=1', f'{run}: C=4'), columns=('majority', 'mean'))


VERDICTS = {
    'rl': lambda rows: run_by_run(rows, ('before', 'RL')) + against_vote(rows) + against_vote(rows, 'longer'),
    'rl_models': lambda rows: run_by_run(rows, ('before', 'RL')) + against_vote(rows),
    'rl_compare': lambda rows: run_by_run(rows, ('grpo', 'RL'), ('moving_balancer', 'RL'), ('two_updates', 'RL'),
                                          ('bf16_no_replay', 'bf16_replay')),
    'rl_aggregation': lambda rows: run_by_run(rows, ('no_aggregation', 'RL')),
    'rl_long': lambda rows: compare_methods(rows, ('RL: C=1', 'RL: C=4')) + against_vote(rows),
    'rl_without': lambda rows: compare_methods(rows, ('RL: C=4', 'RL: one unbounded rollout each')),
}


def main_table(config):
    rl_table('rl', config, {'before': None, 'RL': {}, 'longer': LONGER}, 'easy medium hard deep', 100)
    config.quick or picture('rl', draw)


def models(config):
    model = lambda seed: trained_model(config, 'with', seed, prepare_data(config))[0]
    rl_table('rl_models', config, {'before': None, 'RL': {}}, 'hard deep', 40, model, range(config.seeds))


def compare(config):
    runs = {run: changes for run, changes in VARIANTS.items() if run != 'no_aggregation'}
    rl_table('rl_compare', config, runs, 'hard deep', 40)

    def curves(run, seed):
        log = read_table(Path(train_rl(config, run, seed, MODEL, VARIANTS[run]), 'log.csv'))
        return {key: ' '.join(f'{float(row[key]):.3f}' for row in log) for key in ('reward', 'round_reward')}
    fill_table('rl_rewards', config, VARIANTS, curves)
    config.quick or picture('rl_rewards', draw_rewards)


def aggregation(config):
    rl_table('rl_aggregation', config, {run: VARIANTS[run] for run in ('RL', 'no_aggregation')}, 'hard deep', 40)


def long(config):
    """Test a model that was trained on programs of up to 26 operations, run up to 9 times, but of at most 72 steps."""
    data = prepare_data(config, f'{config.out}/long', operations=26)
    rl_table('rl_long', config, {'before': None, 'RL': dict(operations=26)}, 'hard deep deeper deepest', 40,
             lambda seed: trained_model(config, 'long', 0, data)[0])
    config.quick or picture('rl_long', draw_long)


def without(config):
    model = lambda seed: trained_model(config, 'without', 0, prepare_data(config))[0]
    rl_table('rl_without', config, {'before': None, 'RL': {}}, 'easy hard', 40, model)


# ---- error analysis ----

def state(problem, text):
    """Return (steps done, value) at the end of a trace; the first is None if the trace does not end in a step."""
    digits = re.findall(r'\d', text)
    return task.steps_at_end(problem, text), int(digits[-1]) if digits else None


def ends_and_vote(problem, tails):
    """Return where the tails end, [(steps done, value)], the start if there are none; and their vote or None."""
    ends = [state(problem, task.ENC.decode(task.without_end(tail))) for tail in tails] or [(0, problem.start)]
    return ends, task.majority_vote(ends) if all(place is not None for place, _ in ends) else None


def what_went_wrong(problem, tails, output, budget):
    """Return None for a correct output. Else 'outvoted': the vote of the tails is wrong, a tie, or cannot be parsed;
    'place': the output does not continue from a tail; 'misread': it states a wrong value though the vote is correct;
    'computed': the value is correct, a later step or the end is wrong."""
    if task.verify(problem.question, tails, output, budget):
        return None
    ends, vote = ends_and_vote(problem, tails)
    if vote is None or vote[1] != task.value_at(problem, vote[0]):
        return 'outvoted'
    text = task.ENC.decode(output)
    start = task.steps_at_start(problem, text)
    if start not in {place for place, _ in ends}:
        return 'place'
    return 'computed' if text[0] == str(task.value_at(problem, start)) else 'misread'


KINDS = 'outvoted', 'place', 'misread', 'computed'


def wrong_outputs(policy, problems, C, T, seed):
    """Solve the problems by RSA. Return the number of outputs in all rounds, how many were wrong and why, and how many
    problems have no correct answer among their last outputs."""
    questions, counts, lost = [problem.question for problem in problems], Counter(), 0
    results = markovian_rsa([policy.encode(question) for question in questions],
                            policy.sampler(SamplingOptions(seed=seed)), policy,
                            RSASettings(candidates=C, rounds=T, seed=seed, **BOUNDS))
    for problem, rounds in zip(problems, results):
        tails = []
        for now in rounds:
            for c in now.candidates:
                if c.prompt is not None:
                    counts[what_went_wrong(problem, [tails[j] for j in c.sampled], c.output, BOUNDS['budget'])] += 1
            tails = [c.tail for c in now.candidates]
        right = str(task.solve(problem.question))
        lost += not any(c.answer and policy.decode(c.answer) == right for c in rounds[-1].candidates)
    return dict(outputs=counts.total(), wrong=counts.total() - counts[None], **{kind: counts[kind] for kind in KINDS},
                lost=lost)


def report_errors(rows):
    lines = []
    for setting in dict.fromkeys(row['setting'] for row in rows):
        outputs, wrong, outvoted, place, misread, computed, lost = (
            int(sum(by_seed(rows, setting, column))) for column in ('outputs', 'wrong', *KINDS, 'lost'))
        lines.append([setting, f'{wrong:,} of {outputs:,} ({wrong / outputs:.1%})', f'{outvoted:,}', f'{computed:,}',
                      f'{place + misread:,}', lost])
    print_table(['steps, C: model', 'wrong outputs', 'outvoted', 'computed', 'place or misread',
                 'problems without a correct answer'], lines)


def errors(config):
    lengths, problems = (['easy'], 1) if config.quick else (['hard', 'deep'], 40)
    settings = {f'{steps(split)}, C={C}: {run}': (run, split, C)
                for split in lengths for C in (1, 4) for run in ('before', 'RL')}

    def one(setting, seed):
        run, split, C = settings[setting]
        policy = load_policy(train_rl(config, run, seed, MODEL, None if run == 'before' else {}), pick_device('auto'))
        T = task.rounds_needed(task.LENGTHS[split][1], BOUNDS['budget'])
        return wrong_outputs(policy, task.test_problems(split, problems), C, T, seed)
    report_errors(fill_table('rl_errors', config, settings, one))


# ---- replay ----

def report_replay(rows):
    print_table(['generator, replay', 'KL', "Pearson's r", 'largest difference', 'another expert in some layer'],
                [[row['setting'], f'{float(row["kl"]):.2g}', f'{float(row["pearson_r"]):.7f}',
                  f'{float(row["largest_difference"]):.4f}', f'{float(row["other"]):.1f} % of tokens'] for row in rows])
    kl = {row['setting']: float(row['kl']) for row in rows}
    print_verdicts((f'KL of {name}: with replay below without', f'{on:.2g} against {off:.2g}',
                    'reproduced' if on < off else 'contradicted at this size')
                   for name in ('bf16', 'int8') for on, off in [(kl[f'{name}, on'], kl[f'{name}, off'])])


@torch.no_grad()
def replay(config):
    """Compare the token probabilities q of each generator with the learner's p, on one batch of rollouts. KL is
    estimated by the mean of p/q - 1 - ln(p/q), which is never negative, over tokens sampled from q."""
    learner, rng = load_policy(MODEL, torch.device('cpu')).model, random.Random(0)
    generators = {'float32': lambda: learner, 'bf16': lambda: rl.generator_of(learner, 'bfloat16'),
                  'int8': lambda: with_changed_matrices(learner, CHANGES['int8'])}
    rollouts_of = functools.cache(lambda name: rl.roll_out(generators[name](), prompts, 170, seed=0))
    prompts = [task.build_prompt(task.ENC.encode_ordinary(task.draw_problem(rng, 25, 32, 'train').question), [])
               for _ in range(2 if config.quick else 128)]

    def one(setting, seed):
        name, on = setting.split(', ')
        rollouts = rollouts_of(name)                            # the same rollouts with and without replay
        q = torch.cat([x.q for x in rollouts]).double()
        p, _, other = rl.probabilities(learner, rollouts, on == 'on')
        ratio, r, moved = p / q, torch.corrcoef(torch.stack([p.double(), q]))[0, 1], (p - q).abs()
        largest = moved.topk(min(40, len(q))).indices
        return dict(tokens=len(q), kl=(ratio - 1 - ratio.log()).mean().item(), pearson_r=f'{r:.7f}',
                    largest_difference=moved.max().item(), moved=100 * (moved > 0.1).double().mean().item(),
                    other=100 * other, furthest=' '.join(f'{q[i]:.4f}:{p[i]:.4f}' for i in largest))
    report_replay(fill_table('rl_replay', config, [f'{name}, {on}' for name in generators for on in ('on', 'off')], one,
                        seeds=[0]))
    config.quick or picture('rl_replay', draw_replay)


def draw(figure, rows):
    """Plot wrong answers before and after RL against the length of the problem."""
    axis = figure.subplots()
    lengths = by_length(rows)
    for method, color, mark in zip(METHODS, ('tab:green', 'tab:orange', 'tab:blue'), '^so'):
        for run, style, fill in ('before', '--', 'none'), ('RL', '-', 'full'):
            wrong = {i: [max(0.02, 100 - mean) for mean in by_seed(rows, names[f'{run}: {method}'], 'mean')]
                     for i, names in enumerate(lengths.values()) if f'{run}: {method}' in names}
            means = list(map(statistics.fmean, wrong.values()))
            axis.plot(list(wrong), means, mark + style, color=color, fillstyle=fill,
                      label=f'{method.removesuffix(" each")}, {run.replace("RL", "after")} RL')
            axis.plot(*zip(*[(i, value) for i in wrong for value in wrong[i]]), mark, color=color, markersize=2)
    axis.set(xticks=range(len(lengths)), xticklabels=lengths, xlabel='steps per problem', yscale='log',
             ylim=(0.015, 110), ylabel='wrong answers, % (0.02: none)')


def draw_long(figure, rows):
    """Plot wrong answers on problems longer than those in training, on a linear scale."""
    draw(figure, rows)
    figure.axes[0].set(yscale='linear', ylim=(-3, 103), ylabel='wrong answers, %')


def draw_rewards(figure, rows):
    """Plot the rewards of problems, which become longer, and of rounds per step: means over seeds."""
    figure.set_figheight(3.6)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, label in zip(axes, ('reward', 'round_reward'), ('problems', 'rounds')):
        for run in VARIANTS:
            per_seed = [map(float, row[key].split()) for row in rows if row['setting'] == run]
            means = list(map(statistics.fmean, zip(*per_seed)))
            axis.plot(range(1, len(means) + 1), means, linewidth=1.2, label=run.replace('_', ' '))
        axis.set(xlabel='step', ylabel=f'correct rollouts of {label}, fraction', ylim=(0.6, 1.01))


def draw_replay(figure, rows):
    """Plot the 40 tokens whose probability differs most between generator and learner, with and without replay."""
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name in zip(axes, ('bf16', 'int8')):
        for on, color in ('off', 'tab:orange'), ('on', 'tab:blue'):
            text, = [row['furthest'] for row in rows if row['setting'] == f'{name}, {on}']
            q, p = zip(*[map(float, pair.split(':')) for pair in text.split()])
            axis.plot(q, [b - a for a, b in zip(q, p)], '.', color=color, markersize=4, label=f'replay {on}')
        axis.set(xlabel=f'probability q of the {name} generator', xlim=(-0.03, 1.03))
    axes[0].set(ylabel='p - q, p of the learner')


if __name__ == '__main__':
    run_experiments('rl', {'main': main_table, 'models': models, 'compare': compare, 'aggregation': aggregation,
                           'long': long, 'without': without, 'errors': errors, 'replay': replay})
