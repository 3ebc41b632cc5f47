"""The figures of RESULTS.md and README.md are those of evidence/results/*.csv."""
import statistics

import pytest

from common import ROOT
from evidence import attention, balancer, cca_parts, kv_cache, residual, router, rsa, rsa_cost
from evidence.claims import RESULTS, ClaimConfig, by_seed, read_table, with_seeds

TEXTS = {name: (ROOT / name).read_text().replace('**', '') for name in ('RESULTS.md', 'README.md')}
TABLES = [(rsa.report, 'rsa_lengths'), (rsa.report, 'rsa_aggregation'), (rsa.report, 'trimming'),
          (rsa_cost.report, 'rsa_cost'), (lambda rows: balancer.report(router.derived(rows)), 'balancer'),
          (lambda *tables: router.report(*map(router.derived, tables)), 'router router_deep')]


def rows_of(name):
    return read_table(RESULTS / f'{name}.csv')


def stands(line, text='RESULTS.md'):
    assert line in TEXTS[text], f'{text} lacks: {line}'


@pytest.mark.parametrize('report, names', TABLES, ids=[names for _, names in TABLES])
def test_results_has_every_line_of_the_table_that_its_script_prints(report, names, capsys):
    report(*map(rows_of, names.split()))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    assert len(lines) > 5
    for line in lines:
        stands(line)


def test_every_picture_has_a_table_is_small_and_is_shown():
    for name in [path.stem for path in RESULTS.glob('*.svg')]:
        assert any(f'evidence/results/{name}.svg' in text for text in TEXTS.values()), name
        assert (RESULTS / f'{name}.csv').exists() and (RESULTS / f'{name}.svg').stat().st_size < 60_000


def test_readme_s_table_of_rsa_is_that_of_25_to_32_steps():
    more = {'C=1, T=4': ': each goes on from its own tail', 'C=4, T=4': ': each reads four tails'}
    rows = rows_of('rsa_lengths')
    for setting in 'one unbounded rollout each', *more:
        name = setting + more.get(setting, '')
        mean, majority, tokens, longest = (
            by_seed(rows, f'25-32: {setting}', column) for column in ('mean', 'majority', 'tokens', 'longest'))
        stands(f'| {name} | {with_seeds(mean, ".1f")} | {statistics.fmean(majority):.1f} | {tokens[0]:,.0f} '
               f'| {longest[0]:.0f} |', 'README.md')


@pytest.mark.parametrize('script', [attention, cca_parts, kv_cache, residual])
def test_results_has_every_line_that_a_claim_prints_of_its_finished_table(script, capsys):
    script.main(ClaimConfig())                                  # every row is there: nothing is measured again
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    assert len(lines) > 3
    for line in lines:
        stands(line)


def test_readme_tells_the_losses_of_the_demo():
    first, last = ([float(row['val_loss']) for row in rows_of('training') if row['val_loss']][i] for i in (0, -1))
    text = ' '.join(TEXTS['README.md'].split())
    assert f'falls from {first:.2f}' in text and f'to {last:.2f} after 200 steps' in text


ROUNDS = {'3-7': 1, '14-20': 2, '25-32': 4, '56-64': 8}


def test_the_tables_of_rl_with_one_thing_changed():
    main, rows = rows_of('rl'), rows_of('rl_compare')
    means = lambda run, steps, method: with_seeds([float(row['mean']) for row in main + rows if (
        row['run'], row['steps'], row['method']) == (run, steps, method)], '.1f')
    for steps, method in ('25-32', 'one rollout'), ('25-32', 'C=4'), ('56-64', 'C=1'), ('56-64', 'C=4'):
        what = {'one rollout': 'one unbounded rollout each'}.get(method, f'{method}, T={ROUNDS[steps]}')
        stands(f'| {steps}, {what} | ' + ' | '.join(
            means(run, steps, method) for run in ('after', 'grpo', 'no_aggregation')) + ' |')
    for row in rows:
        shown = row['steps'] == '25-32' or row['steps'] == '3-7' and row['method'] != 'C=1'
        if row['run'] == 'without' and shown:
            before = [f'{float(other["mean"]):.1f}' for other in rows if other['run'] == 'without_before' and (
                other['steps'], other['method']) == (row['steps'], row['method'])]
            what = {'one rollout': 'one unbounded rollout each'}.get(
                row['method'], f'{row["method"]}, T={ROUNDS[row["steps"]]}')
            stands(f'| {row["steps"]}, {what} | {"".join(before)}{" " if before else ""}| {float(row["mean"]):.1f} |')


def test_the_tables_of_learning_from_rewards():
    rows = rows_of('rl')
    for steps, method in dict.fromkeys((row['steps'], row['method']) for row in rows):
        get = lambda run, column: [float(row[column]) for row in rows if (
            row['run'], row['steps'], row['method']) == (run, steps, method)]
        what = {'one rollout': 'one unbounded rollout each'}.get(method, f'{method}, T={ROUNDS[steps]}')
        stands(f'| {steps} | {what} | {get("before", "mean")[0]:.1f} | {with_seeds(get("after", "mean"), ".1f")} '
               f'| {with_seeds(get("after", "majority"), ".1f")} |')
    rows, columns = rows_of('rl_errors'), ('outputs', 'wrong', 'outvoted', 'place', 'misread', 'computed')
    for steps, C in dict.fromkeys((row['steps'], row['C']) for row in rows):
        for run, label in ('before', 'before'), ('after', 'after, two seeds'):
            found = [row for row in rows if (row['steps'], row['C']) == (steps, C) and row['run'].startswith(run)]
            sums = ' | '.join(f'{sum(int(row[column]) for row in found):,}' for column in columns)
            stands(f'| {steps}, C={C} | {label} | {sums} |')
    for row in rows_of('rl_replay')[2:]:
        stands(f'| {row["generator"].replace("bfloat16", "bf16")} | {"on" if row["replay"] == "True" else "off"} '
               f'| {row["kl"]} | {row["pearson_r"]} | {row["largest_difference"]} '
               f'| {100 * float(row["other_expert"]):.1f} % |')
