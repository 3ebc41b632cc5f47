"""Does answer-preserving trimming teach what other cuts do not? `python -m evidence.trimming`, and again after a stop.

Claim (ZAYA1-8B report, arXiv 2605.05365, III). Reasoning longer than the context is best cut from its end, right before
the answer, so that the answer stays; the alternatives drop long samples, or truncate blindly and lose the answer. No
figure is published.

Test. Solutions of 3 to 36 steps, in windows of 116 tokens: room for some 18 steps beside the question. The three ways
to cut (data/reasoning.py), three training seeds each, 100 held-out problems of each length; a rollout may answer in the
rest of that context, or Markovian RSA goes on from tails, so that all lengths can be answered in it.

Refuted by: `truncate` or `drop` no worse than `ap`, in one rollout, on 14 to 32 steps.

The rows of seeds 0 to 2 come from the table that an earlier program printed: shares are rounded to 0.1 %, and tokens
and longest prompts are those of all seeds together.
"""

from tasks.loops import task
from evaluate import steps
from evidence.claims import run_claim, table
from evidence.rsa import BOUNDS, UNBOUNDED, bars, data_of, figures, judge, report, trained_model

CONTEXT, RULES = 116, ('ap', 'truncate', 'drop')


def settings_of(splits):
    """{'25-32: ap: C=4, T=4': (rule, split, settings of measure)}"""
    found = {}
    for split in splits:
        T = task.rounds_needed(task.LENGTHS[split][1], BOUNDS['budget'])
        for rule in RULES:
            found[f'{steps(split)}: {rule}: one rollout'] = rule, split, UNBOUNDED
            found[f'{steps(split)}: {rule}: C=4, T={T}'] = rule, split, dict(candidates=4, rounds=T, **BOUNDS)
    return found


def main(config):
    settings = settings_of(['easy'] if config.quick else ['easy', 'medium', 'hard'])
    problems = 1 if config.quick else 100

    def one(setting, seed):
        rule, split, how = settings[setting]
        data = data_of(config, f'{config.out}/trimming_{rule}', context=CONTEXT, rule=rule)
        _, policy = trained_model(config, rule, seed, data, f'--context={CONTEXT}', '--batch_size=18')
        return figures(policy, task.test_problems(split, problems), seed, **how)
    rows = table('trimming', config, settings, one)
    report(rows)
    judge(rows, *((f'{rule}: {way}', f'ap: {way}') for way in ('one rollout', 'C=4') for rule in RULES[1:]))


def draw(plt, rows):
    """In one rollout, only who has learned from answers that were kept answers what does not fit into the context."""
    rows = [row | {'setting': f'{length}: {rule}, {way.split(", ")[0]}'} for row in rows
            for length, rule, way in [row['setting'].split(': ')]]
    ways = [f'{rule}, {way}' for way in ('one rollout', 'C=4') for rule in RULES]
    return bars(plt, rows, ['3-7', '14-20', '25-32'], ways, 'steps of the problem')


if __name__ == '__main__':
    run_claim('trimming', main, draw)
