"""The figures of RESULTS.md and README.md are those of evidence/results/*.csv."""
import statistics

import pytest

from common import ROOT
from evidence import attention, balancer, cca_parts, kv_cache, residual, rl, router, rsa, rsa_cost
from evidence.claims import RESULTS, ClaimConfig, by_seed, read_table, with_seeds

TEXTS = {name: (ROOT / name).read_text().replace('**', '') for name in ('RESULTS.md', 'README.md')}
TABLES = [(rsa.report, 'rsa_lengths'), (rsa.report, 'rsa_aggregation'), (rsa.report, 'trimming'),
          *[(rsa.report, f'rl{name}') for name in ('', '_models', '_compare', '_aggregation', '_long', '_without')],
          (rl.report_errors, 'rl_errors'), (rl.report_replay, 'rl_replay'),
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


def test_readme_tells_what_rl_gains_at_25_to_32_steps():
    rollout, four = (statistics.fmean(by_seed(rows_of('rl'), f'25-32: RL: {way}', 'mean'))
                     for way in ('one unbounded rollout each', 'C=4, T=4'))
    text = ' '.join(TEXTS['README.md'].split())
    assert f'one unbounded rollout is right in {rollout:.1f} %, C=4 in {four:.1f} %' in text
