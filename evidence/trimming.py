"""Compare answer-preserving trimming with other cuts: `python -m evidence.trimming`; the same command resumes.

Claim (ZAYA1-8B report, arXiv 2605.05365, III). Reasoning longer than the context is best cut at its end, right before
the answer, so that the answer stays (ap); the alternatives drop long samples (drop), or truncate them and lose the
answer (truncate). No figure is published.

Test. Solutions of 3 to 36 steps in a context of 116 tokens, which holds the question and about 18 steps. Three training
seeds per rule (data/reasoning.py), 100 held-out problems per length. Each model answers in one rollout within that
context, or by Markovian RSA, which solves all lengths in it.

`truncate` or `drop` as good as `ap`, in one rollout on 14 to 32 steps, would refute the claim.

For seeds 0 to 2 the CSV holds percentages rounded to 0.1, and tokens and longest prompts over all seeds together.
"""
from tasks.loops import task
from evaluate import steps
from evidence.claims import fill_table, print_verdicts, run_claim
from evidence.rsa import (BOUNDS, UNBOUNDED, bars, by_length, compare_methods, prepare_data, print_methods, score,
                          trained_model)

CONTEXT, RULES = 116, ('ap', 'truncate', 'drop')


def settings_of(splits):
    """Return {'25-32: ap: C=4, T=4': (rule, split, settings of measure)}."""
    found = {}
    for split in splits:
        T = task.rounds_needed(task.LENGTHS[split][1], BOUNDS['budget'])
        for rule in RULES:
            found[f'{steps(split)}: {rule}: one rollout'] = rule, split, UNBOUNDED
            found[f'{steps(split)}: {rule}: C=4, T={T}'] = rule, split, dict(candidates=4, rounds=T, **BOUNDS)
    return found


def report(rows):
    print_methods(rows)
    print_verdicts(compare_methods(rows, *((f'{rule}: {way}', f'ap: {way}') for way in ('one rollout', 'C=4')
                                           for rule in RULES[1:])))


def main(config):
    settings = settings_of(['easy'] if config.quick else ['easy', 'medium', 'hard'])
    problems = 1 if config.quick else 100

    def one(setting, seed):
        rule, split, how = settings[setting]
        data = prepare_data(config, f'{config.out}/trimming_{rule}', context=CONTEXT, rule=rule)
        _, policy = trained_model(config, rule, seed, data, f'--context={CONTEXT}', '--batch_size=18')
        return score(policy, task.test_problems(split, problems), seed, **how)
    report(fill_table('trimming', config, settings, one))


def draw(figure, rows):
    """Plot the mean of 16 outputs for each rule, in one rollout and under RSA."""
    groups = {length: {f'{rule}, {way}': names[f'{rule}: {way}'] for way in ('one rollout', 'C=4') for rule in RULES}
              for length, names in by_length(rows).items()}
    bars(figure, rows, groups, 'steps per problem')


if __name__ == '__main__':
    run_claim('trimming', main, draw)
