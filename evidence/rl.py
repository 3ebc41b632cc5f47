"""What learning from rewards does (rl.py) on the loops task. First `make demo`, or at least runs/loops; then

    python -m evidence.rl main       before RL, after it, after a longer one: at four lengths, in three ways to think
    python -m evidence.rl models     before RL and after it, from three models of the task
    python -m evidence.rl compare    after RL with one setting changed: GRPO, two updates, ... (VARIANTS)
    python -m evidence.rl aggregation --seeds=5    after RL with aggregation prompts and without
    python -m evidence.rl long       programs of up to 234 steps, by a model that was trained on up to 72
    python -m evidence.rl without    from a model whose data had no aggregation examples
    python -m evidence.rl errors     how many outputs of all rounds of RSA are wrong, and what went wrong in them
    python -m evidence.rl replay     the generator's and the learner's probabilities, with router replay and without

Claims (ZAYA1-8B report, arXiv 2605.05365, IV). (1) Rewards alone unlearn the errors that the training data has on
purpose. (2) With replay, the generator's and the learner's probabilities of a token agree: KL 1.3e-4, Pearson's r above
0.9996. (3) After RL, the mean of RSA's candidates is no lower than the majority of as many independent chains.

Tests, on held-out problems, some with more steps than any of RL's. (1) is refuted where the mean before RL is not below
that after it. (2): bf16 and int8 weights write, the float32 learner scores; refuted where replay brings the two no
nearer. (3) is refuted where the mean of C=4 lies below the majority of C=1; alike, they are not to be told apart.

A seed is one of RL, and of the rollouts of problems. All begin with one model, whose own rows have seed 0; only in
`models`, each seed has a model of its own.
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
from evaluate import TableConfig, steps
from evidence.claims import by_seed, picture, run_experiments, read_table, table, verdict
from evidence.quantization import CHANGES, in_few_bits
from evidence.rsa import BOUNDS, data_of, figures, judge, methods, report, trained_model
from rsa import load_policy, markovian_rsa, sampler
from runtime.device import pick_device

MODEL = 'runs/loops'                                            # with which RL begins, if nothing else is said
WAYS = 'one unbounded rollout each', 'C=1', 'C=4'
LONGER = dict(max_steps=48, draws=4)                            # some 16 minutes of one core, where RL takes 5
# no_aggregation has half the groups, so that a step generates about as many tokens.
VARIANTS = {'RL': {}, 'grpo': dict(advantage='grpo'), 'no_aggregation': dict(aggregation=0.0, groups=12),
            'moving_balancer': dict(balancer_lr=3e-3), 'two_updates': dict(updates=2),
            'bf16_replay': dict(generator='bfloat16'), 'bf16_no_replay': dict(generator='bfloat16', replay=False)}
QUICK_RL = dict(max_steps=1, groups=4, rollouts=2, draws=1, candidates=2, level=3, eval_problems=0)


def loaded(folder):
    return load_policy(folder, pick_device('auto'))


def learned(config, run, seed, model, **changes):
    """Run rl.py from the model in a folder with these settings, or go on where it was stopped. Return its folder."""
    out = f'{config.folder("rl")}/{Path(model).name}_{run}{seed}'
    rl.train(rl.RLConfig(init_from=model, out_dir=out, seed=seed, **changes | (QUICK_RL if config.quick else {})))
    return out


def measured(name, config, model, runs, lengths, problems, seeds_before=(0,)):
    """Fill and report results/NAME.csv: a row for each length, run and way to think. Return the rows.

    model(seed) -> the folder of the model that RL begins with. runs: {name: the settings of rl.py that it changes}, or
    None: the model as it is, without RL. problems: how many of each length. seeds_before: of the rows without RL."""
    lengths, problems, settings = 'easy' if config.quick else lengths, 1 if config.quick else problems, {}
    for setting, (split, how) in methods(lengths).items():
        length, way = setting.split(': ')
        if way.split(', T=')[0] in WAYS:
            settings |= {f'{length}: {run}: {way}': (run, split, how) for run in runs}

    def one(setting, seed):
        run, split, how = settings[setting]
        folder = model(seed) if runs[run] is None else learned(config, run, seed, model(seed), **runs[run])
        return figures(loaded(folder), task.test_problems(split, problems), seed, **how)
    before = [setting for setting, (run, *_) in settings.items() if runs[run] is None]
    table(name, config, before, one, seeds=seeds_before)
    rows = table(name, config, [setting for setting in settings if setting not in before], one)
    report(rows)
    return rows


def main_table(config):
    rows = measured('rl', config, lambda seed: MODEL, {'before': None, 'RL': {}, 'longer': LONGER},
                    'easy medium hard deep', 100)
    for setting in dict.fromkeys(row['setting'] for row in rows if ': RL: ' in row['setting']):
        before, after = (by_seed(rows, setting.replace('RL', run), 'mean') for run in ('before', 'RL'))
        verdict(f'{setting}: the mean before RL below that after it', before * len(after), after)
    judge(rows, *[(f'{run}: C=1', f'{run}: C=4') for run in ('RL', 'longer')], columns=('majority', 'mean'))
    config.quick or picture('rl', draw)


def models(config):
    model = lambda seed: trained_model(config, 'with', seed, data_of(config))[0]
    rows = measured('rl_models', config, model, {'before': None, 'RL': {}}, 'hard deep', 40, range(config.seeds))
    judge(rows, *[(f'before: {way}', f'RL: {way}') for way in WAYS])
    judge(rows, ('RL: C=1', 'RL: C=4'), columns=('majority', 'mean'))


def compare(config):
    runs = {run: changes for run, changes in VARIANTS.items() if run != 'no_aggregation'}
    rows = measured('rl_compare', config, lambda seed: MODEL, runs, 'hard deep', 40)
    pairs = [*((name, 'RL') for name in ('grpo', 'moving_balancer', 'two_updates')), ('bf16_no_replay', 'bf16_replay')]
    judge(rows, *[(f'{a}: {way}', f'{b}: {way}') for a, b in pairs for way in WAYS])

    def curves(run, seed):
        log = read_table(Path(learned(config, run, seed, MODEL, **VARIANTS[run]), 'log.csv'))
        return {key: ' '.join(f'{float(row[key]):.3f}' for row in log) for key in ('reward', 'round_reward')}
    table('rl_rewards', config, VARIANTS, curves)
    config.quick or picture('rl_rewards', draw_rewards)


def aggregation(config):
    runs = {run: VARIANTS[run] for run in ('RL', 'no_aggregation')}
    rows = measured('rl_aggregation', config, lambda seed: MODEL, runs, 'hard deep', 40)
    judge(rows, *[(f'no_aggregation: {way}', f'RL: {way}') for way in WAYS])


def long(config):
    """The model was trained on programs of up to 26 operations, run up to 9 times, but of 72 steps at most."""
    model = lambda seed: trained_model(config, 'long', 0, data_of(config, f'{config.out}/long', operations=26))[0]
    rows = measured('rl_long', config, model, {'before': None, 'RL': dict(operations=26)},
                    'hard deep deeper deepest', 40)
    judge(rows, ('RL: C=1', 'RL: C=4'))
    judge(rows, ('RL: C=1', 'RL: C=4'), columns=('majority', 'mean'))
    config.quick or picture('rl_long', draw_long)


def without(config):
    model = lambda seed: trained_model(config, 'without', 0, data_of(config))[0]
    measured('rl_without', config, model, {'before': None, 'RL': {}}, 'easy hard', 40)


# ---- what goes wrong ----

def state(problem, text):
    """(steps done, value) where a trace ends; the first is None if it ends in no such way."""
    digits = re.findall(r'\d', text)
    return task.place_of(problem, text), int(digits[-1]) if digits else None


def ends_and_vote(problem, tails):
    """Where the tails end, [(steps done, value)], or the start without them; and their vote, None if there is none."""
    ends = [state(problem, task.ENC.decode(task.without_end(tail))) for tail in tails] or [(0, problem.start)]
    return ends, task.vote(ends) if all(place is not None for place, _ in ends) else None


def what_went_wrong(problem, tails, output, budget):
    """None for a right output. Else 'outvoted': the tails' vote is wrong, a tie, or not to be read; 'place': it does
    not go on from a tail; 'misread': it states a wrong value though the vote is right; 'computed': a right value, then
    a wrong step or end."""
    if task.verify(problem.question, tails, output, budget):
        return None
    ends, vote = ends_and_vote(problem, tails)
    if vote is None or vote[1] != task.value_at(problem, vote[0]):
        return 'outvoted'
    text = task.ENC.decode(output)
    begin = task.begin_of(problem, text)
    if begin not in {place for place, _ in ends}:
        return 'place'
    return 'computed' if text[0] == str(task.value_at(problem, begin)) else 'misread'


KINDS = 'outvoted', 'place', 'misread', 'computed'


def wrong_outputs(policy, problems, C, T, seed):
    """Let RSA solve the problems. Return how many outputs it had in all rounds, how many were wrong and why, and how
    many problems have no right answer among their last outputs."""
    questions, counts, lost = [problem.question for problem in problems], Counter(), 0
    results = markovian_rsa([policy.encode(question) for question in questions],
                            sampler(policy, TableConfig(seed=seed)), policy.build_prompt, candidates=C, rounds=T,
                            answer_of=policy.answer_of, seed=seed, **BOUNDS)
    for problem, result in zip(problems, results):
        tails = []
        for now in result['rounds']:
            for draw, prompt, output in zip(now['sampled'], now['prompts'], now['outputs']):
                if prompt is not None:
                    counts[what_went_wrong(problem, [tails[j] for j in draw], output, BOUNDS['budget'])] += 1
            tails = now['tails']
        right = str(task.solve(problem.question))
        lost += not any(answer and policy.decode(answer) == right for answer in result['answers'])
    return dict(outputs=counts.total(), wrong=counts.total() - counts[None], **{kind: counts[kind] for kind in KINDS},
                lost=lost)


def report_errors(rows):
    print(f'\n| steps, C | model | outputs | wrong | {" | ".join(KINDS)} | problems without a right answer |')
    print('| --- ' * (5 + len(KINDS)) + '|')
    for setting in dict.fromkeys(row['setting'] for row in rows):
        outputs, wrong, *kinds = (
            int(sum(by_seed(rows, setting, column))) for column in ('outputs', 'wrong', *KINDS, 'lost'))
        print(f'| {setting.replace(": ", " | ")} | {outputs:,} | {wrong:,} ({wrong / outputs:.1%}) '
              f'| {" | ".join(f"{count:,}" for count in kinds)} |')


def errors(config):
    lengths, problems = (['easy'], 1) if config.quick else (['hard', 'deep'], 40)
    settings = {f'{steps(split)}, C={C}: {run}': (run, split, C)
                for split in lengths for C in (1, 4) for run in ('before', 'RL')}

    def one(setting, seed):
        run, split, C = settings[setting]
        policy = loaded(MODEL if run == 'before' else learned(config, 'RL', seed, MODEL))
        T = task.rounds_needed(task.LENGTHS[split][1], BOUNDS['budget'])
        return wrong_outputs(policy, task.test_problems(split, problems), C, T, seed)
    report_errors(table('rl_errors', config, settings, one))


# ---- replay ----

def report_replay(rows):
    print('\n| generator, replay | tokens | KL | Pearson\'s r | largest difference | moved by more than 0.1 '
          '| another expert in some layer |')
    print('| --- ' * 7 + '|')
    for row in rows:
        print(f'| {row["setting"]} | {int(row["tokens"]):,} | {float(row["kl"]):.2g} | {float(row["pearson_r"]):.7f} '
              f'| {float(row["largest_difference"]):.4f} | {float(row["moved"]):.2f} % | {float(row["other"]):.1f} % |')


@torch.no_grad()
def replay(config):
    """One batch of rollouts by each generator, and the learner's probabilities of their tokens. KL is estimated
    as the mean of p/q - 1 - ln(p/q), which is never negative, over the tokens drawn from q."""
    learner, rng = load_policy(MODEL, torch.device('cpu')).model, random.Random(0)
    generators = {'float32': lambda: learner, 'bf16': lambda: rl.generator_of(learner, 'bfloat16'),
                  'int8': lambda: in_few_bits(learner, CHANGES['int8'])}
    rollouts_of = functools.cache(lambda name: rl.roll_out(generators[name](), prompts, 170, seed=0))
    prompts = [task.build_prompt(task.ENC.encode_ordinary(task.draw_problem(rng, 25, 32, 'train').question), [])
               for _ in range(2 if config.quick else 128)]

    def one(setting, seed):
        name, on = setting.split(', ')
        rollouts = rollouts_of(name)                            # the same with replay and without
        q = torch.cat([x.q for x in rollouts]).double()
        p, _, other = rl.probabilities(learner, rollouts, on == 'on')
        ratio, r, moved = p / q, torch.corrcoef(torch.stack([p.double(), q]))[0, 1], (p - q).abs()
        furthest = moved.topk(min(40, len(q))).indices
        return dict(tokens=len(q), kl=(ratio - 1 - ratio.log()).mean().item(), pearson_r=f'{r:.7f}',
                    largest_difference=moved.max().item(), moved=100 * (moved > 0.1).double().mean().item(),
                    other=100 * other, furthest=' '.join(f'{q[i]:.4f}:{p[i]:.4f}' for i in furthest))
    report_replay(table('rl_replay', config, [f'{name}, {on}' for name in generators for on in ('on', 'off')], one,
                        seeds=[0]))
    config.quick or picture('rl_replay', draw_replay)


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


def draw_long(plt, rows):
    """Beyond any length of the training, most is wrong: on an even scale."""
    figure = draw(plt, rows)
    figure.axes[0].set(yscale='linear', ylim=(-3, 103), ylabel='wrong answers, %')
    return figure


def draw_rewards(plt, rows):
    """The rewards of problems, which become longer, and of rounds, step by step: means over the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.6), sharey=True, layout='constrained')
    for axis, key, label in zip(axes, ('reward', 'round_reward'), ('problems', 'rounds')):
        for run, color in zip(VARIANTS, plt.cm.tab10.colors):
            of_seeds = [map(float, row[key].split()) for row in rows if row['setting'] == run]
            means = list(map(statistics.fmean, zip(*of_seeds)))
            axis.plot(range(1, len(means) + 1), means, color=color, linewidth=1.2, label=run.replace('_', ' '))
        axis.set(xlabel='step', ylabel=f'right rollouts of {label}', ylim=(0.6, 1.01))
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=4, frameon=False)
    return figure


def draw_replay(plt, rows):
    """The 40 tokens whose probability moved furthest between generator and learner: with replay they move less."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), sharey=True, layout='constrained')
    for axis, name in zip(axes, ('bf16', 'int8')):
        for on, color in ('off', 'tab:orange'), ('on', 'tab:blue'):
            text, = [row['furthest'] for row in rows if row['setting'] == f'{name}, {on}']
            q, p = zip(*[map(float, pair.split(':')) for pair in text.split()])
            axis.plot(q, [b - a for a, b in zip(q, p)], '.', color=color, markersize=4, label=f'replay {on}')
        axis.set(xlabel=f"q, by the generator's {name} weights", xlim=(-0.03, 1.03))
    axes[0].set(ylabel='p - q, p the learner\'s')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=2, frameon=False)
    return figure


if __name__ == '__main__':
    run_experiments('rl', {'main': main_table, 'models': models, 'compare': compare, 'aggregation': aggregation,
                            'long': long,
                    'without': without, 'errors': errors, 'replay': replay})
