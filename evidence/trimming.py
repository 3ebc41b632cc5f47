"""Compare answer-preserving trimming with other cuts: `python -m evidence.trimming`; the same command resumes.

Claim (ZAYA1-8B report, arXiv 2605.05365, III). Reasoning longer than the context is best cut at its end, right before
the answer, so that the answer stays (ap); the alternatives drop long samples (drop), or truncate them and lose the
answer (truncate). No figure is published. `truncate` or `drop` as good as `ap`, in one rollout on 14 to 32 steps, would
refute the claim.

Test. Solutions of 3 to 36 steps in a context of 116 tokens, which holds the question and about 18 steps. Three training
seeds per rule (data/reasoning.py), 100 held-out problems per length. Each model answers in one rollout within that
context, or by Markovian RSA, which solves all lengths in it. The CSV's percentages of seeds 0 to 2 are rounded to 0.1;
their tokens and longest prompts are over all seeds together.
"""
from tasks.loops import task
from evaluate import steps
from evidence.claims import print_verdicts, run_claim
from evidence.rsa import (BOUNDS, UNBOUNDED, bars, by_length, compare_methods, prepare_data, print_methods, run_table,
                          trained_model)

CONTEXT, RULES = 116, ('ap', 'truncate', 'drop')


def main(config):
    settings = {}                                               # {setting: (rule, split, settings of score)}
    for split in ['easy'] if config.quick else ['easy', 'medium', 'hard']:
        T = task.rounds_needed(task.LENGTHS[split][1], BOUNDS['budget'])
        for rule in RULES:
            settings[f'{steps(split)}: {rule}: one rollout'] = rule, split, UNBOUNDED
            settings[f'{steps(split)}: {rule}: C=4, T={T}'] = rule, split, dict(candidates=4, rounds=T, **BOUNDS)

    def policy_of(rule, seed):
        data = prepare_data(config, f'{config.out}/trimming_{rule}', context=CONTEXT, rule=rule)
        return trained_model(config, rule, seed, data, f'--context={CONTEXT}', '--batch_size=18')[1]
    rows = run_table('trimming', config, settings, 100, policy_of)
    print_methods(rows)
    print_verdicts(compare_methods(rows, *((f'{rule}: {way}', f'ap: {way}') for way in ('one rollout', 'C=4')
                                           for rule in RULES[1:])))


def draw(figure, rows):
    """Plot the mean of 16 outputs for each rule, in one rollout and under RSA."""
    groups = {length: {f'{rule}, {way}': names[f'{rule}: {way}'] for way in ('one rollout', 'C=4') for rule in RULES}
              for length, names in by_length(rows).items()}
    bars(figure, rows, groups, 'steps per problem')


if __name__ == '__main__':
    run_claim('trimming', main, draw)
